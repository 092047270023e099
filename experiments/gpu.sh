#!/usr/bin/env bash
# What only a GPU can show, in three parts. Each takes less than ten minutes and ends in tables.
#
#   experiments/gpu.sh 1 OUT [NANOGPT]      parity with a CPU; a training step
#   experiments/gpu.sh 2 OUT [NANOGPT]      long contexts, ways round the blend, generation, attention
#   experiments/gpu.sh 3 OUT BOOKS BOOK     a base of GPT-2's shape trained on BOOKS, and fine-tuned
#                                           on BOOK with seven schedules and five seeds
#
# OUT: a folder for the results, JSON and text. NANOGPT: a checkout of it. BOOKS, BOOK: text files, or
# what else `source` takes. PYTHON names the interpreter. QUICK=--quick tries parts 1 and 2 in small.
# What takes too long is stopped, and the rest goes on. Rows are written as soon as they are known.
set -u
cd "$(dirname "$0")/.."
if [[ ${1:-} != [123] || -z ${2:-} || $1 == 3 && -z ${4:-} ]]; then
  echo "give part 1, 2 or 3, a folder for the results, and for part 3 the books and the book" >&2
  exit 2
fi
part=$1 out=$2 python=${PYTHON:-python3} quick=${QUICK:-}
mkdir -p "$out"
export PYTHONUNBUFFERED=1

# seconds, name, command: run it, keep what it prints
limited() {
  local seconds=$1 name=$2
  shift 2
  echo "== $name"
  timeout --signal=INT --kill-after=20 "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
  [ "${PIPESTATUS[0]}" -eq 0 ] || echo "== $name ended with status ${PIPESTATUS[0]}"
}

bench() {
  local seconds=$1 name=$2
  shift 2
  local command=("$python" -m experiments.bench --only "$name" --json "$out/$name.json")
  limited "$seconds" "$name" "${command[@]}" $quick "$@"
}

case $part in
1)
  limited 190 parity "$python" -m experiments.parity --json "$out/parity.json" $quick
  bench 370 step ${3:+--nanogpt "$3"}
  ;;
2)
  bench 200 long --rounds 3
  bench 90 blend
  bench 130 generate ${3:+--nanogpt "$3"}
  bench 120 attention --rounds 5
  ;;
3)
  base=runs/pretrain_gpu sweep=runs/sweep_gpt2
  limited 330 base "$python" train.py configs/pretrain_gpu.toml --source "$3" --overwrite
  # a run that is finished needs its last.pt no more: 1.5 GB each
  while sleep 3; do
    for f in "$sweep"/*/results.json; do rm -f "${f%results.json}last.pt"; done
  done &
  trap 'kill $!' EXIT
  tune=("$python" sweep.py configs/sweep_gpt2.toml --source "$4" --init_from "$base")
  limited 220 sweep "${tune[@]}"
  "${tune[@]}" --report >"$out/report.txt"  # also where not all cells were done in time
  cp "$base/results.json" "$out/base.json"
  cp "$sweep"/table.* "$sweep"/*.png "$out"
  ;;
esac
