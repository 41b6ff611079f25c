#!/usr/bin/env bash
# GPT-3 Small on one GPU, for some minutes: text, tokenizer, bf16 training, validation, curve.
#
#   launch/gpu_smoke.sh [--dry-run] [--config.batch.sequences=… and other flags of gptjax.train]
#
# Wants what launch/gpu.sh wants.
set -euo pipefail
[[ "${1:-}" != --help && "${1:-}" != -h ]] || { sed -En '2,/^set/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
PYTHON=${PYTHON:-.venv/bin/python}

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
for word in "$@"; do
  if [[ "$word" != --config.* ]]; then
    echo "error: got '$word', wanted [--dry-run] --config.…; try launch/gpu_smoke.sh --dry-run" >&2
    exit 2
  fi
done

run() {
  printf '+'
  printf ' %q' "$@"
  echo
  [ "$dry" ] || "$@"
}

# Not every size of vocabulary can be learned from the standard library's 12 MB: 32768 can.
run "$PYTHON" -m gptjax.prepare --config=configs/corpus.py --config.source=stdlib \
  --config.out=data/stdlib-2048 --config.vocab_size=32768
run launch/gpu.sh --config=configs/gpt3.py:125m --config.workdir=runs/gpu-smoke \
  --config.data.sources=data/stdlib-2048 --config.model.vocab_size=32768 \
  --config.train_tokens=10e6 --config.lr.warmup_tokens=1e6 --config.lr.decay_tokens=10e6 \
  --config.batch.sequences=32 --config.batch.ramp_tokens=2e6 --config.compute.microbatch=8 \
  --config.eval.every_tokens=2e6 --config.save.every_tokens=5e6 "$@"
run "$PYTHON" -m gptjax.generate --workdir=runs/gpu-smoke --prompt='def main('
run "$PYTHON" -m gptjax.report runs/gpu-smoke
