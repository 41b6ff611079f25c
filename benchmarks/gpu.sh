#!/usr/bin/env bash
# Measures training on one NVIDIA GPU beside PyTorch, in 10 minutes.
#
#   benchmarks/gpu.sh [--dry-run] [--out=runs/gpu] [--seconds=590] [--parts=tests,125m,350m,…]
#     [--contenders=ours-bf16,torch-compiled-bf16] [--batch=N] [--corpus=data/stdlib-2048]
#
# Parts, in the order that --parts gives them:
#   tests      pytest -m gpu: the kernels of the GPU are the reference
#   125m …     a size of configs/gpt3.py at context 2048, bf16: tokens/s, MFU and memory of ours
#              (no remat, cuDNN's attention) and PyTorch's (compiled, SDPA, fused AdamW, autocast), with
#              as many rows as fit: those of --batch, or half of them, or half of these
#   attention  a dense and a banded layer from 1024 tokens up
#   curve      100 steps of 125m on real text, both from the same weights; the text is the standard
#              library's, unless --corpus is there: 32768 tokens, windows of 2048
#
# A part has a time limit, and all have --seconds together; one that fails stops no other, is told
# in the end, and makes the exit code 1. Writes results.json, results.md, curve.png and log.txt into
# --out. torch-flex-bf16 is PyTorch with FlexAttention in banded layers.
#
# Wants an environment with gptjax, its tests' packages, a JAX for the GPU and a torch for it; PYTHON
# names the interpreter. Without that torch ours is measured alone. Nothing is fetched.
set -euo pipefail
[[ "${1:-}" != --help && "${1:-}" != -h ]] || { sed -En '2,/^set/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
PYTHON=${PYTHON:-.venv/bin/python}

mistake() {
  echo "error: $1; try benchmarks/gpu.sh --dry-run" >&2
  exit 2
}

dry='' out=runs/gpu seconds=590 contenders='' batch='' corpus=data/stdlib-2048
parts=tests,125m,attention,curve,xl-16h,760m,350m
for word in "$@"; do
  case $word in
    --dry-run) dry=1 ;;
    --out=?*) out=${word#*=} ;;
    --seconds=*) seconds=${word#*=} ;;
    --parts=?*) parts=${word#*=} ;;
    --contenders=?*) contenders=${word#*=} ;;
    --batch=*) batch=${word#*=} ;;
    --corpus=?*) corpus=${word#*=} ;;
    *) mistake "got '$word', wanted --NAME=VALUE as in the head of benchmarks/gpu.sh" ;;
  esac
done
[[ $seconds =~ ^[1-9][0-9]*$ ]] || mistake "--seconds: got '$seconds', wanted a number from 1"
[[ $batch =~ ^([1-9][0-9]*)?$ ]] || mistake "--batch: got '$batch', wanted a number from 1"
IFS=, read -ra parts <<<"$parts"
for part in "${parts[@]}"; do
  [[ $part =~ ^(tests|attention|curve|125m|350m|760m|xl|xl-16h|2\.7b|6\.7b)$ ]] ||
    mistake "--parts: got '$part', wanted tests, attention, curve or a size up to 6.7b"
done

# The most that a part takes, compiling included.
limit() {
  case $1 in
    tests) echo 120 ;;
    attention) echo 60 ;;
    curve) echo 120 ;;
    *) echo 180 ;;
  esac
}

# Rows to begin with on 80 GB. What does not fit is halved, but a program that was compiled in vain
# takes a minute.
rows() {
  case $1 in
    125m) echo 32 ;;
    350m | 760m) echo 16 ;;
    xl | xl-16h) echo 8 ;;
    *) echo 4 ;;
  esac
}

# What a part runs, in `command`.
choose() {
  case $1 in
    tests)
      command=(env XLA_PYTHON_CLIENT_PREALLOCATE=false "$PYTHON" -m pytest -m gpu -n 8 "${tested[@]}")
      ;;
    attention)
      command=("$PYTHON" -m benchmarks.attention --rows=4 --json="$made/attention.json")
      ;;
    curve)
      command=("$PYTHON" -m benchmarks.curve --steps=100 --out="$made/curve.png"
        --json="$made/curve.json" --config=configs/gpt3.py:125m --config.data.sources="$corpus"
        --config.model.vocab_size=32768 --config.train_tokens=3276800.0
        --config.batch.sequences=16 --config.batch.ramp_tokens=0.0
        --config.compute.microbatch=16 --config.lr.warmup_tokens=5e5
        --config.lr.decay_tokens=3276800.0)
      [ "$with_torch" ] || command+=(--contenders=ours-bf16)
      ;;
    *)
      command=("$PYTHON" -m benchmarks.train_step --against=torch --size="$1" --context=2048
        --remat=none --batch="${batch:-$(rows "$1")}" --halve --contenders="$contenders"
        --json="$made/$1.json")
      ;;
  esac
}

say() {
  printf '+'
  printf ' %q' "$@"
  echo
}

mapfile -t tested < <(grep -l 'pytest\.mark\.gpu' tests/test_*.py)
prepare=(timeout 300 nice -n 19 "$PYTHON" -m gptjax.prepare --config=configs/corpus.py --config.source=stdlib
  --config.out="$corpus" --config.vocab_size=32768 --config.workers=4)
with_torch=1 made=MADE
if [ "$dry" ]; then
  contenders=${contenders:-ours-bf16,torch-compiled-bf16}
  for part in "${parts[@]}"; do
    [ "$part" != curve ] || say "${prepare[@]}"
    choose "$part"
    say timeout --kill-after=10 "$(limit "$part")" "${command[@]}"
  done
  say "$PYTHON" -m benchmarks.gpu_results "$made" "$out"
  exit
fi

# stderr says what is there and what is missing; stdout, whether torch can use the GPU.
seen=$(XLA_PYTHON_CLIENT_PREALLOCATE=false "$PYTHON" -m benchmarks.gpu_results --seen) || {
  echo "error: $PYTHON: got no JAX with a GPU, wanted one that runs gptjax; try nvidia-smi, and if" \
    "it lists a GPU, $PYTHON -m pip install -e '.[test,cuda12]' -c constraints.txt (or cuda13)" >&2
  exit 2
}
lacking=()
if [ "$seen" != torch ]; then
  with_torch=''
  [ "$contenders" = ours-bf16 ] || lacking=("a torch for this GPU: ours was measured alone")
  contenders=ours-bf16
fi
contenders=${contenders:-ours-bf16,torch-compiled-bf16}

made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
mkdir -p "$out"

measure() {
  local failed=() preparing='' part left most began code told
  # The corpus is made on the CPU while the GPU is measured.
  if [[ " ${parts[*]} " == *' curve '* && ! -e "$corpus" ]]; then
    say "${prepare[@]}"
    "${prepare[@]}" >"$made/prepare.txt" 2>&1 &
    preparing=$!
  fi
  for part in "${parts[@]}"; do
    echo
    if [ "$part" = curve ] && [ "$preparing" ]; then
      wait "$preparing" || cat "$made/prepare.txt"
      preparing=''
    fi
    left=$((seconds - SECONDS)) most=$(limit "$part")
    [ "$most" -le "$left" ] || most=$left
    began=$SECONDS code=0
    if [ "$most" -lt 10 ]; then
      code=124
      told="$part: no time was left"
    else
      choose "$part"
      say "${command[@]}"
      timeout --kill-after=10 "$most" "${command[@]}" || code=$?
      told="$part: code $code"
      [ "$code" != 124 ] && [ "$code" != 137 ] || told="$part: not done in $most s"
    fi
    printf '%s\t%s\t%s\n' "$part" "$code" $((SECONDS - began)) >>"$made/parts.tsv"
    [ "$code" = 0 ] || failed+=("$told")
    # After each part, so that whatever ends this leaves what there is.
    "$PYTHON" -m benchmarks.gpu_results "$made" "$out" || failed+=("$part: its table")
  done
  [ -z "$preparing" ] || kill "$preparing" 2>/dev/null || true
  echo
  cat "$out/results.md"
  for told in "${lacking[@]}" "${failed[@]}"; do
    echo "failed   $told"
  done
  [ $((${#lacking[@]} + ${#failed[@]})) = 0 ]
}

measure 2>&1 | tee "$out/log.txt"
