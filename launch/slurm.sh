#!/usr/bin/env bash
# Trains on the GPUs of several machines under SLURM: one process a node, with all GPUs of the node.
#
#   launch/slurm.sh [--dry-run] [flags of sbatch, as --NAME=VALUE] --config=… [any of gptjax.train]
#
# For example:
#
#   launch/slurm.sh --nodes=4 --partition=gpu --time=24:00:00 --config=configs/gpt3.py:6.7b \
#     --config.workdir=runs/6.7b --config.data.sources=data/corpus --config.mesh.fsdp=32
#
# Submits itself; the log is runs/slurm-JOB.log. In a job that is there (salloc) it trains at once.
# Where a node fails or the job is preempted, SLURM starts it again, and it goes on from its last
# checkpoint; two minutes before the job's time is over it saves, and is queued again. Wants this
# repository, the workdir, the corpora and an environment with gptjax and a JAX for the GPU in
# folders that all nodes see; PYTHON names the interpreter.
#SBATCH --job-name=gptjax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -euo pipefail
[[ "${1:-}" != --help && "${1:-}" != -h ]] || { sed -En '2,/^set/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }
# SLURM runs a copy of this file that lies elsewhere, in the folder where sbatch was.
[ "${SLURM_JOB_ID:-}" ] || cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

mistake() {
  echo "error: $1; try ${2:-launch/slurm.sh --nodes=2 --config=configs/gpt3.py:125m …}" >&2
  exit 2
}

dry='' flags=()
while [[ "${1:-}" == --* && "$1" != --config=* ]]; do
  case $1 in
    --dry-run) dry=1 ;;
    *) flags+=("$1") ;;
  esac
  shift
done
[[ "${1:-}" == --config=* ]] || mistake "got '${1:-}', wanted --NAME=VALUE … --config=…"

if [ -z "${SLURM_JOB_ID:-}" ]; then
  [ "$dry" ] || command -v sbatch >/dev/null || mistake "got no sbatch, wanted SLURM" launch/gpu.sh
  [ "$dry" ] || mkdir -p runs # a job whose log has no folder ends and says nothing
  command=(sbatch --output=runs/slurm-%j.log "${flags[@]}" launch/slurm.sh "$@")
else
  [ "${#flags[@]}" = 0 ] || mistake "got '${flags[*]}' in a job, wanted --config=… first" salloc
  [ -f gptjax/train.py ] || mistake "got $PWD, wanted the repository" "sbatch from its root"
  [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ] || mistake "got a job without GPUs, wanted some" "sbatch --gpus-per-node=8"
  # Processes end with one that fails by themselves. SLURM would kill those that saved, as soon as
  # the first of them ends with 75, and the job end with the code of a killed one. A process may use
  # every core of its node.
  command=(srun --kill-on-bad-exit=0 --cpu-bind=none launch/gpu.sh --hosts=auto "$@")
fi
if [ "$dry" ]; then
  printf '+'
  printf ' %q' "${command[@]}"
  echo
  exit
fi
code=0
"${command[@]}" || code=$?
# It saved, and asks to be started again.
[ "$code" != 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
