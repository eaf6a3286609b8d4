#!/usr/bin/env bash
# Every row that a CPU makes of the kernels, the update and packing, and what is drawn and written from the rows; some
# 7 minutes on two cores. A machine that does nothing else, please: each row holds the load it was measured under.
#
#   benchmarks/cpu.sh            appends to benchmarks/results/*.jsonl; of rows that measure the same the last one stays
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
# as in the Makefile
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1073741824} MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1073741824}
out=benchmarks/results
run() {
  echo "cpu.sh: $*" >&2
  "$python" -m "$@"
}

for dtype in float32 bfloat16; do
  run benchmarks.attention --device cpu --dtype $dtype --out $out/attention.jsonl
  run benchmarks.linear_log_prob --device cpu --dtype $dtype --out $out/linear_log_prob.jsonl
done
run benchmarks.attention --crossover --device cpu --out $out/crossover.jsonl
run benchmarks.train_step --peer --out $out/train_step.jsonl
run benchmarks.packing --out $out/packing.jsonl
run benchmarks.plot
run benchmarks.tables --prune --write
