#!/usr/bin/env bash
# On a CUDA machine: the GPU tests, then every kernel benchmark, in at most 8 minutes; rows go to
# benchmarks/results/*.jsonl, and from there into the picture and the READMEs.
# `benchmarks/gpu.sh --tune [minutes]` then tries the forward in Gluon (5 minutes at most), and searches launch configs,
# for 15 minutes more.
# Without a GPU, `benchmarks/gpu.sh --dry-run [folder]` runs all that a CPU can.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
benchmarks="attention linear_log_prob pointwise decode"
deadline=$((SECONDS + 470))
failed=0

# run SECONDS NAME COMMAND...: within its own limit and what is left of the 8 minutes
run() {
  local limit=$1 name=$2 left=$((deadline - SECONDS))
  shift 2
  if ((left < 5)); then
    echo "gpu.sh: $name: no time left" >&2
    failed=1
    return
  fi
  echo "gpu.sh: $name" >&2
  timeout "$((limit < left ? limit : left))" "$@" || { echo "gpu.sh: $name failed ($?)" >&2; failed=1; }
}

if [[ ${1:-} == --dry-run ]]; then
  out=${2:-$(mktemp -d)}
  run 60 "GPU tests are collected" "$python" -m pytest -q --collect-only tests/test_gpu*.py
  for name in $benchmarks; do
    run 100 "$name, tiny, on CPU" "$python" -m benchmarks."$name" --tiny --device cpu --out "$out/$name.jsonl"
  done
  run 60 "crossover, tiny, on CPU" \
    "$python" -m benchmarks.attention --crossover --tiny --device cpu --out "$out/crossover.jsonl"
  run 100 "tune, tiny, interpreted" env TRITON_INTERPRET=1 \
    "$python" -m benchmarks.tune --tiny --device cpu --dtype float16 --out "$out/tune.jsonl"
  exit $failed
fi

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: torch sees no CUDA GPU here (--dry-run runs what a CPU can)" >&2
  exit 1
fi
out=benchmarks/results
# most of the tests' time is compiling, on the CPU
side_by_side=$("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)
run 180 "GPU tests" "$python" -m pytest -q -x $side_by_side tests/test_gpu*.py
if command -v compute-sanitizer >/dev/null; then
  run 60 "memory checker, small shapes" compute-sanitizer --error-exitcode 1 \
    "$python" -m pytest -q -x tests/test_gpu*.py -k small
else
  echo "gpu.sh: no compute-sanitizer here, memory is not checked" >&2
fi
run 60 "linear_log_prob" "$python" -m benchmarks.linear_log_prob --seconds 0.2 --out "$out/linear_log_prob.jsonl"
run 200 "attention" "$python" -m benchmarks.attention --seconds 0.1 --out "$out/attention.jsonl"
run 60 "pointwise" "$python" -m benchmarks.pointwise --seconds 0.1 --out "$out/pointwise.jsonl"
run 40 "decode" "$python" -m benchmarks.decode --seconds 0.1 --out "$out/decode.jsonl"
run 30 "crossover" "$python" -m benchmarks.attention --crossover --seconds 0.1 --out "$out/crossover.jsonl"
run 20 "picture and tables" bash -c '"$0" -m benchmarks.plot && "$0" -m benchmarks.tables --prune --write' "$python"
if [[ ${1:-} == --tune ]]; then
  minutes=${2:-15}
  deadline=$((SECONDS + 310))
  run 310 "forward in Gluon, on Hopper" \
    "$python" -m benchmarks.hopper_forward --seconds 0.1 --out "$out/hopper_forward.jsonl"
  echo "gpu.sh: tune, $minutes minutes" >&2
  "$python" -m benchmarks.tune --seconds 0.1 --minutes "$minutes" --out "$out/tune.jsonl" || failed=1
fi
exit $failed
