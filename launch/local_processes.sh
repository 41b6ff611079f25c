#!/usr/bin/env bash
# Several processes on this machine, each with some CPU devices, that train together over loopback.
#
#   launch/local_processes.sh [--dry-run] PROCESSES DEVICES --config=… [any flag of gptjax.train]
#
# Names the process that dies first, and ends the others. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ && "${2:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: got '${1:-} ${2:-}', wanted PROCESSES DEVICES; try launch/local_processes.sh 2 4 …" >&2
  exit 2
fi
processes=$1 devices=$2
shift 2
port=${PORT:-$("$PYTHON" -c 'import socket
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
pids=()
for ((i = 0; i < processes; i++)); do
  command=("$PYTHON" -m gptjax.train "$@" "--config.hosts=127.0.0.1:$port,$processes,$i")
  if [ "$dry" ]; then
    printf '+ JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=%s' "$devices"
    printf ' %q' "${command[@]}"
    echo ' &'
  else
    "${command[@]}" </dev/null &
    pids+=($!)
  fi
done
[ "$dry" ] && exit

trap 'kill -INT "${pids[@]}" 2>/dev/null' INT TERM
code=0
left=$processes
while [ "$left" -gt 0 ] && [ "$code" = 0 ]; do
  wait -n -p ended || code=$?
  left=$((left - 1))
done
if [ "$code" != 0 ]; then
  for i in "${!pids[@]}"; do
    [ "${pids[$i]}" = "${ended:-}" ] && echo "process $i ended first, with code $code" >&2
  done
  sleep 2 # for what the others have to say of it
  kill -KILL "${pids[@]}" 2>/dev/null || true
  wait
fi
exit "$code"
