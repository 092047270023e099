#!/usr/bin/env bash
# What only a GPU can show, in three parts. Each takes less than ten minutes and ends in tables.
#
#   experiments/gpu.sh 1 OUT [NANOGPT]      parity with a CPU; a training step
#   experiments/gpu.sh 2 OUT [NANOGPT]      long contexts, the blend, generation, attention
#   experiments/gpu.sh 3 OUT BOOKS BOOK     a base of GPT-2's shape trained on BOOKS, and fine-tuned
#                                           on BOOK with seven schedules and five seeds
#
# OUT: a folder for the results, JSON and text. NANOGPT: a checkout of it. BOOKS, BOOK: text files, or
# what else `source` takes. What takes too long is stopped, and the rest goes on. Rows are written as
# soon as they are known.
#
# PYTHON names the interpreter. QUICK=--quick tries parts 1 and 2 in small. RUNS is the folder of the
# runs of part 3, a new one: they write 4 GB each and keep 0.5 (runs/gpu; in memory, as in /dev/shm, is
# faster). Without a network, TIKTOKEN_CACHE_DIR names the folder of the tokenizer's files.
set -u
if [[ ${1:-} != [123] || -z ${2:-} || $1 == 3 && -z ${4:-} ]]; then
  echo "give part 1, 2 or 3, a folder for the results, and for part 3 the books and the book" >&2
  exit 2
fi
part=$1 out=$2 python=${PYTHON:-python3} quick=${QUICK:-} runs=${RUNS:-runs/gpu}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH=$root
mkdir -p "$out" || exit 2
trap 'exit 130' INT  # Ctrl-C ends all of it, not only the command that just runs

# seconds, name, command: run it, keep what it prints
limited() {
  local seconds=$1 name=$2
  shift 2
  echo "== $name"
  timeout --foreground --signal=INT --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || echo "== $name ended with status $status"
}

bench() {
  local seconds=$1 name=$2
  shift 2
  local command=("$python" -m experiments.bench --only "$name" --json "$out/$name.json")
  limited "$seconds" "$name" "${command[@]}" $quick "$@"
}

case $part in
1)
  limited 180 parity "$python" -m experiments.parity --json "$out/parity.json" $quick
  bench 380 step ${3:+--nanogpt "$3"}
  ;;
2)
  bench 190 long --rounds 3
  bench 90 blend
  bench 130 generate ${3:+--nanogpt "$3"}
  bench 120 attention --rounds 5
  ;;
3)
  if [ -e "$runs" ]; then
    echo "$runs is there already; move it away, or name another folder: RUNS=..." >&2
    exit 2
  fi
  base=("$python" "$root/train.py" "$root/configs/pretrain_gpu.toml" --source "$3")
  limited 320 base "${base[@]}" --out "$runs/base"
  # a run that is finished needs its last.pt no more, 1.5 GB
  while sleep 3; do
    for f in "$runs"/sweep/*/results.json; do rm -f "${f%results.json}last.pt"; done
  done &
  trap 'kill $!' EXIT
  tune=("$python" "$root/sweep.py" "$root/configs/sweep_gpt2.toml" --source "$4")
  tune+=(--init_from "$runs/base" --out "$runs/sweep")
  limited 210 sweep "${tune[@]}" --jobs 7
  timeout 20 "${tune[@]}" --report >"$out/report.txt"  # also where not all were done in time
  cp "$runs"/base/{config.toml,metrics.jsonl} "$runs"/sweep/table.* "$runs"/sweep/*.png "$out"
  ;;
esac
