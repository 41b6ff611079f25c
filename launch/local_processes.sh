#!/usr/bin/env bash
# Several processes on this machine, each with some CPU devices, that train together over loopback.
#
#   launch/local_processes.sh [--dry-run] PROCESSES DEVICES --config=… [any flag of gptjax.train]
#
# Names the process that dies first, and ends the others. After SIGTERM it ends with 75 when all is
# saved, to be started again. PYTHON names the interpreter.
set -euo pipefail
[[ "${1:-}" != --help && "${1:-}" != -h ]] || { sed -En '2,/^set/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
PYTHON=${PYTHON:-.venv/bin/python}

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ && "${2:-}" =~ ^[1-9][0-9]*$ && "${3:-}" == --config=* ]]; then
  echo "error: got '${1:-} ${2:-} ${3:-}', wanted PROCESSES DEVICES --config=…; try launch/local_processes.sh 2 4 …" >&2
  exit 2
fi
processes=$1 devices=$2
shift 2
port=${PORT:-$("$PYTHON" -c 'import socket
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
pids=() stopped=''

end_all() {
  for pid in "${pids[@]}"; do
    kill -KILL -- "-$pid" 2>/dev/null || true
  done
}
# The first signal asks them to end, and is waited for; another one ends them.
stop() {
  if [ "$stopped" ]; then
    end_all
  else
    stopped=$1
    kill "-$2" "${pids[@]}" 2>/dev/null || true
  fi
}
trap end_all EXIT
trap 'stop 130 INT' INT
trap 'stop 143 INT' HUP
trap 'stop 143 TERM' TERM

for ((i = 0; i < processes; i++)); do
  command=("$PYTHON" -m gptjax.train "$@" "--config.hosts=127.0.0.1:$port,$processes,$i")
  if [ "$dry" ]; then
    printf '+ JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=%s' "$devices"
    printf ' %q' "${command[@]}"
    echo ' &'
  else
    set -m # a group of its own: without it, it would ignore Ctrl-C
    "${command[@]}" </dev/null &
    set +m
    pids+=($!)
  fi
done

left=${#pids[@]}
while [ "$left" -gt 0 ]; do
  code=0
  wait -n -p ended || code=$?
  if [ -z "${ended:-}" ]; then # a signal came
    [ "$code" != 127 ] || break
    continue
  fi
  left=$((left - 1))
  # They saved, and want to be started again: so does this.
  [ "$code" != 75 ] || stopped=75
  if [ "$code" != 0 ] && [ -z "$stopped" ]; then
    for i in "${!pids[@]}"; do
      [ "${pids[$i]}" != "$ended" ] || echo "process $i ended first, with code $code" >&2
    done
    sleep 2 # for what the others have to say of it
    exit "$code"
  fi
done
[ -z "$stopped" ] || exit "$stopped"
