#!/usr/bin/env bash
# Trains on a Cloud TPU pod: queues for one, runs on all its workers, shows the log, deletes the pod.
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --type=TYPE --runtime=VERSION [options] --config=…
#
#   --runtime=VERSION  v2-alpha-tpuv6e, v2-alpha-tpuv5 (v5p), v2-alpha-tpuv5-lite (v5e) or
#                      tpu-ubuntu2204-base (v4)
#   --project=PROJECT  else gcloud's own
#   --slices=N         so many slices of TYPE, joined (multislice)
#   --setup=COMMAND    runs on each worker first: to mount what holds the workdir and the corpora
#   --create=FLAG      one more for `gcloud … create`, as --spot or --valid-until-duration=6h, which
#                      limits the wait; may be repeated
#   --existing         takes the queued resource NAME that is there, and makes none
#   --keep             does not delete it in the end
#   --dry-run          says the commands, and runs none
#
# For example:
#
#   launch/tpu_pod.sh --name=gpt3-xl --zone=us-east5-a --type=v5p-32 --runtime=v2-alpha-tpuv5 \
#     --setup='sudo mkdir -p /bucket && sudo mount -t nfs 10.0.0.2:/share /bucket' \
#     --config=configs/gpt3.py:xl --config.workdir=/bucket/xl --config.data.sources=/bucket/corpus
#
# Wants gcloud, logged in, and its key in ssh-agent (ssh-add ~/.ssh/google_compute_engine). The run
# ends with this command, so start it where it may stay; started again, it goes on.
set -euo pipefail
[[ "${1:-}" != --help && "${1:-}" != -h ]] || { sed -En '2,/^set/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

mistake() {
  echo "error: $1; try launch/tpu_pod.sh --name=a --zone=us-east5-a --type=v5p-32 …" >&2
  exit 2
}

dry='' name='' zone='' type='' runtime='' slices=1 setup='' existing='' keep='' project=() more=()
while [[ "${1:-}" == --* && "$1" != --config=* ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --project=*) project=("$1") ;;
    --slices=*) slices=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --create=*) more+=("${1#*=}") ;;
    --existing) existing=1 ;;
    --keep) keep=1 ;;
    --dry-run) dry=1 ;;
    *) mistake "got '$1', wanted an option that the head of launch/tpu_pod.sh names" ;;
  esac
  shift
done
[[ "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || mistake "--name: got '$name', wanted a-z, 0-9 and -"
for key in zone type runtime; do
  [ "${!key}" ] || mistake "--$key: got none, wanted one as in the head of launch/tpu_pod.sh"
done
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || mistake "--slices: got '$slices', wanted a number from 1"
[[ "${1:-}" == --config=* ]] || mistake "got '${1:-}', wanted --config=…"
# What lies on a worker's own disk is not seen by the others, and is deleted with the worker.
[[ " $*" =~ " --config.workdir="(/|gs://) ]] ||
  mistake "--config.workdir: got none or a relative one, wanted gs://… or one that --setup mounts"

queued=(gcloud compute tpus queued-resources)
where=(--zone="$zone" "${project[@]}" --quiet)
# In batches of 64, which is gcloud's default, the workers of a large pod would wait for the rest.
workers=("${where[@]}" --node=all --worker=all --batch-size=all)
delete=("${queued[@]}" delete "$name" "${where[@]}" --force)
describe=("${queued[@]}" describe "$name" "${where[@]}" --format='value(state.state)')
nodes=(--node-id="$name")
[ "$slices" = 1 ] || nodes=(--node-count="$slices")
# With its commit, which the run writes down; and with uv, as the workers' Python may be too old.
install="{ [ -d gptjax ] || git init -q gptjax; } && cd gptjax && git fetch -q ~/gptjax.bundle HEAD \
&& git checkout -q --detach FETCH_HEAD && python3 -m pip install -q --target ~/uv uv \
&& ~/uv/bin/uv venv -q --allow-existing --python='>=3.11,<3.14' .venv \
&& ~/uv/bin/uv pip install -q -e '.[tpu,gcs]' -c constraints.txt"
printf -v train ' %q' .venv/bin/python -m gptjax.train "$@"

tell() {
  printf '+'
  printf ' %q' "$@"
  echo
}

# A command has a process group of its own: a signal to this script does not wait for its end, and
# leaves no part of it behind. gcloud itself would connect again.
run() {
  tell "$@"
  [ "$dry" ] && return
  set -m
  "$@" </dev/null &
  set +m
  child=$!
  local code=0
  wait "$child" || code=$?
  child=''
  return "$code"
}

child='' made=''
finish() {
  local code=$?
  trap '' INT TERM HUP
  [ -z "$child" ] || kill -KILL -- "-$child" 2>/dev/null || true
  if [ "$made" ] && [ "$keep" ] && [ -z "$dry" ]; then
    echo "tpu      $name is kept, and costs, until: ${delete[*]}"
  elif [ "$made" ] && [ -z "$keep" ] && ! run "${delete[@]}"; then
    echo "error: $name may still be there, and cost; try ${delete[*]}" >&2
  fi
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

wait_until_active() {
  tell "${describe[@]}"
  [ "$dry" ] && return
  local state='' last='' silent=0
  until [ "$state" = ACTIVE ]; do
    # One answer that does not come costs no place in the queue.
    state=$("${describe[@]}") && silent=0 || silent=$((silent + 1))
    if [ "$state" != "$last" ]; then
      echo "tpu      $name is ${state:-silent} after $((SECONDS / 60)) min"
      last=$state
    fi
    if [[ "$state" =~ ^(FAILED|SUSPEND.*|DELETING)$ || $silent = 5 ]]; then
      echo "error: $name: got ${state:-no state}, wanted ACTIVE; try ${describe[*]}" >&2
      exit 1
    fi
    [ "$state" = ACTIVE ] || sleep "${POLL_SECONDS:-30}"
  done
}

if [ "$(git status --porcelain -uno)" ]; then
  echo "note: the pod gets the last commit, without what was changed since" >&2
fi
run mkdir -p build
run git bundle create --quiet "build/$name.bundle" HEAD
made=1
if [ -z "$existing" ]; then
  # What gcloud refuses to create may be somebody's of the same name: that is not deleted.
  run "${queued[@]}" create "$name" "${where[@]}" --accelerator-type="$type" \
    --runtime-version="$runtime" "${nodes[@]}" "${more[@]}" || { code=$? made=; exit "$code"; }
fi
wait_until_active
[ -z "$setup" ] || run "${queued[@]}" ssh "$name" "${workers[@]}" --command="$setup"
run "${queued[@]}" scp "build/$name.bundle" "$name:gptjax.bundle" "${workers[@]}"
run "${queued[@]}" ssh "$name" "${workers[@]}" --command="$install"
run "${queued[@]}" ssh "$name" "${workers[@]}" --command="cd gptjax && exec$train"
