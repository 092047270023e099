#!/usr/bin/env bash
# Measure what only a GPU can show, in three parts of less than ten minutes each.
#
#   experiments/gpu.sh 1 OUT [NANOGPT]      parity with a CPU; a training step
#   experiments/gpu.sh 2 OUT [NANOGPT]      long contexts, the blend, generation, attention
#   experiments/gpu.sh 3 OUT BOOKS BOOK     train a base of GPT-2's shape on BOOKS, and fine-tune it on
#                                           BOOK with five schedules and five seeds
#
# OUT is a folder for the results, as text and JSON. NANOGPT is a checkout of nanoGPT. BOOKS and BOOK
# are text files, or anything else that the key `source` takes. A command that takes too long is
# stopped, and the next one runs. Every row is written as soon as it is known.
#
# PYTHON names the interpreter. QUICK=--quick tries parts 1 and 2 with small shapes. Without a network,
# TIKTOKEN_CACHE_DIR names the folder of the tokenizer's files. RUNS names a new folder for the runs of
# part 3 (default: runs/gpu). It needs 36 GB of disk: 2 GB for the base, 0.5 GB for each of the 25 runs,
# and 3 GB for each of the seven that train at a time.
set -u
if [[ ${1:-} != [123] || -z ${2:-} || $1 == 3 && -z ${4:-} ]]; then
  echo "give part 1, 2 or 3, a folder for the results, and for part 3 the books and the book" >&2
  exit 2
fi
part=$1 out=$2 python=${PYTHON:-python3} quick=${QUICK:-} runs=${RUNS:-runs/gpu}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH=$root
mkdir -p "$out" || exit 2
trap 'exit 130' INT  # Ctrl-C ends the script, and not only the command that is running

# limited SECONDS NAME COMMAND...: run a command and keep what it prints
limited() {
  local seconds=$1 name=$2
  shift 2
  echo "== $name"
  timeout --foreground --signal=INT --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || echo "== $name ended with status $status"
}

# bench SECONDS SECTION OPTION...
bench() {
  limited "$1" "$2" "$python" -m experiments.bench --only "$2" --json "$out/$2.json" $quick "${@:3}"
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
    echo "$runs exists; move it away, or name another folder with RUNS=..." >&2
    exit 2
  fi
  base=("$python" "$root/train.py" "$root/configs/pretrain_gpu.toml" --source "$3")
  limited 320 base "${base[@]}" --out "$runs/base"
  tune=("$python" "$root/sweep.py" "$root/configs/sweep_gpt2.toml" --source "$4")
  tune+=(--init_from "$runs/base" --out "$runs/sweep")
  limited 210 sweep "${tune[@]}" --jobs 7
  timeout 20 "${tune[@]}" --report >"$out/report.txt"  # even if time was short for some runs
  cp "$runs"/base/{config.toml,metrics.jsonl} "$runs"/sweep/table.* "$runs"/sweep/*.png "$out"
  ;;
esac
