#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process.
#
#   launch/gpu.sh [--dry-run] [--hosts=HOSTS] --config=… [any other flag of gptjax.train]
#
# For example:
#
#   launch/gpu.sh --config=configs/gpt3.py:125m --config.workdir=runs/125m \
#     --config.data.sources=data/corpus --config.mesh.fsdp=8
#
# Wants an environment with gptjax and a JAX for the GPU (pip install -e '.[cuda12]' or
# '.[cuda13]'); PYTHON names its interpreter. CUDA_VISIBLE_DEVICES=0,1 leaves the other GPUs alone;
# with --hosts this machine is one of several, as --config.hosts says it: auto, as in
# launch/slurm.sh, or the first one's ADDRESS:PORT, how many, and which of them this is.
set -euo pipefail
[[ "${1:-}" != --help && "${1:-}" != -h ]] || { sed -En '2,/^set/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
PYTHON=${PYTHON:-.venv/bin/python}

dry='' hosts=one
while [[ "${1:-}" == --dry-run || "${1:-}" == --hosts=* ]]; do
  case $1 in
    --hosts=*) hosts=${1#*=} ;;
    *) dry=1 ;;
  esac
  shift
done
if [[ "${1:-}" != --config=* || " $* " == *' --dry-run '* ]]; then
  echo "error: got '${1:-}', wanted [--dry-run] --config=…; try launch/gpu.sh --config=configs/gpt3.py:125m …" >&2
  exit 2
fi
if [[ " $*" == *' --config.hosts='* ]]; then
  echo "error: got --config.hosts, wanted --hosts before --config; try launch/gpu.sh --hosts=10.0.0.1:8476,2,0 --config=…" >&2
  exit 2
fi

settings=()
# JAX takes 75 % of the memory and no more; only NCCL and other libraries need what is left.
if [ -z "${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then
  settings+=(XLA_CLIENT_MEM_FRACTION=0.9)
fi
command=(env "${settings[@]}" "$PYTHON" -m gptjax.train "$@" --config.hosts="$hosts")
if [ "$dry" ]; then
  printf '+'
  printf ' %q' "${command[@]}"
  echo
  exit
fi

seen=$(env "${settings[@]}" XLA_PYTHON_CLIENT_PREALLOCATE=false \
  "$PYTHON" -c 'import jax; print(jax.default_backend())') || seen="none in $PYTHON"
if [ "$seen" != gpu ]; then
  echo "error: JAX's devices on $HOSTNAME: got $seen, wanted gpu; try nvidia-smi, and if it lists a" \
    "GPU, $PYTHON -m pip install -e '.[cuda12]' -c constraints.txt (or cuda13)" >&2
  exit 2
fi
exec "${command[@]}"
