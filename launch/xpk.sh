#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, as a workload of xpk (pip install xpk).
#
#   launch/xpk.sh --name=NAME --cluster=CLUSTER --type=TYPE [options] --config=… [of gptjax.train]
#
#   --slices=N          so many slices of TYPE, joined (multislice)
#   --image=IMAGE       has gptjax for the TPU installed, and is used as it is
#   --base-image=IMAGE  without --image: gets this commit, and installs it when it starts; python:3.12
#   --storage=NAME      of `xpk storage attach`, for the workdir and the corpora; may be repeated
#   --xpk=FLAG          one more for `xpk workload create` (--xpk=--priority=high); may be repeated
#   --dry-run           says the commands, and runs none
#
# For example:
#
#   launch/xpk.sh --name=gpt3-13b --cluster=mine --type=v5p-256 --slices=2 --storage=bucket \
#     --config=configs/gpt3.py:13b-5120 --config.workdir=/bucket/13b \
#     --config.data.sources=/bucket/corpus --config.mesh.fsdp=128
#
# Wants xpk and its tools (gcloud, kubectl, crane), and a cluster that xpk made.
set -euo pipefail
[[ "${1:-}" != --help && "${1:-}" != -h ]] || { sed -En '2,/^set/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

mistake() {
  echo "error: $1; try launch/xpk.sh --name=a --cluster=mine --type=v5p-32 --config=…" >&2
  exit 2
}

run() {
  printf '+'
  printf ' %q' "$@"
  echo
  [ "$dry" ] || "$@"
}

dry='' name='' cluster='' type='' slices=1 image='' base=python:3.12 more=()
while [[ "${1:-}" == --* && "$1" != --config=* ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --base-image=*) base=${1#*=} ;;
    --storage=*) more+=("$1") ;;
    --xpk=*) more+=("${1#*=}") ;;
    --dry-run) dry=1 ;;
    *) mistake "got '$1', wanted an option that the head of launch/xpk.sh names" ;;
  esac
  shift
done
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  mistake "--name: got '$name', wanted up to 40 of a-z, 0-9 and -"
[ "$cluster" ] || mistake "--cluster: got none, wanted its name"
[ "$type" ] || mistake "--type: got none, wanted a TPU and its size"
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || mistake "--slices: got '$slices', wanted a number from 1"
[[ "${1:-}" == --config=* ]] || mistake "got '${1:-}', wanted --config=…"
[[ " $*" =~ " --config.workdir="(/|gs://) ]] ||
  mistake "--config.workdir: got none or a relative one, wanted gs://… or a mounted storage"

[ "$dry" ] || command -v xpk >/dev/null || mistake "got no xpk, wanted pip install xpk"
printf -v command ' %q' python -m gptjax.train "$@"
command="exec$command"
if [ "$image" ]; then
  from=(--docker-image="$image")
else
  # A clone leaves data/, runs/ and .venv/ at home.
  run rm -rf "build/xpk-$name"
  run git clone --quiet . "build/xpk-$name"
  from=(--base-docker-image="$base" --script-dir="build/xpk-$name")
  command="pip install -q -e '.[tpu,gcs]' -c constraints.txt && $command"
fi
run xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$type" \
  --num-slices="$slices" "${from[@]}" --command="$command" "${more[@]}"
