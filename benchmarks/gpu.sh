#!/usr/bin/env bash
# On a CUDA machine with torch, triton, numba, safetensors and pytest: the GPU tests, then every kernel benchmark, part by
# part, each within its own minutes. Rows go to $OUT (default: benchmarks/results), and from there into the READMEs.
#
#   benchmarks/gpu.sh                       tests, kernels, update: some 10 minutes
#   benchmarks/gpu.sh tests|kernels|update|sampling|tune ...      those parts alone; tune takes $MINUTES (default: 5)
#   benchmarks/gpu.sh --dry-run [PART ...]  the same parts as far as a CPU goes, into a folder of its own
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0
dry=
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi
out=${OUT:-$([[ $dry ]] && mktemp -d || echo benchmarks/results)}
mkdir -p "$out"

# run SECONDS NAME COMMAND...: within its own limit; what fails is told, and the next goes on
run() {
  local limit=$1 name=$2
  shift 2
  echo "gpu.sh: $name" >&2
  timeout "$limit" "$@" || { echo "gpu.sh: $name failed ($?)" >&2; failed=1; }
}

# bench SECONDS NAME [FLAG ...]: one benchmark, its rows to $out; tiny on a CPU in a dry run
bench() {
  local limit=$1 name=$2
  shift 2
  local where=(--seconds 0.1)
  [[ $dry ]] && where=(--tiny --device cpu)
  run "$limit" "$name $*" "$python" -m "benchmarks.$name" "$@" "${where[@]}" --out "$out/$name.jsonl"
}

tests() {
  local files=(tests/kernels/test_gpu*.py) workers=()
  if [[ $dry ]]; then
    run 60 "GPU tests are collected" "$python" -m pytest -q --collect-only "${files[@]}"
    return
  fi
  # most of the tests' time is compiling, on the CPU: many at a time, where pytest-xdist is there
  mapfile -t workers < <("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()), sep="\n")' 2>/dev/null)
  run 240 "GPU tests" "$python" -m pytest -q "${workers[@]}" "${files[@]}"
  if command -v compute-sanitizer >/dev/null; then
    run 60 "memory checker, small shapes" compute-sanitizer --error-exitcode 1 \
      "$python" -m pytest -q -x "${files[@]}" -k small
  else
    echo "gpu.sh: no compute-sanitizer here, memory is not checked" >&2
  fi
}

kernels() {
  # Compiling takes a CPU longer than the timing takes a GPU: all benchmarks at a time fill the cache that each then reads
  local name names=(linear_log_prob pointwise decode head_draw attention)
  for name in "${names[@]}"; do
    bench 120 "$name" --compile &
  done
  bench 120 attention --crossover --compile &
  wait
  bench 40 linear_log_prob
  bench 40 pointwise
  bench 30 decode
  bench 40 head_draw
  run 40 crossover "$python" -m benchmarks.attention --crossover $([[ $dry ]] && echo --tiny --device cpu || echo --seconds 0.1) \
    --out "$out/crossover.jsonl"
  bench 200 attention # FlexAttention's max-autotune last: its minutes are what may run out
}

update() {
  if [[ $dry ]]; then # 2b shapes would take 5 GB and minutes of a CPU even with one layer
    run 120 "packed update" "$python" -m benchmarks.train_step --tiny --out "$out/train_step.jsonl"
    run 60 memory "$python" -m benchmarks.memory --model almanac --device cpu --dtype float32 --tokens 1500 \
      --out "$out/memory.jsonl"
    return
  fi
  # Gemma-2 2b's shapes in bfloat16, the comb of 8,100 packed tokens: below some 3,000 launches take longer than what they
  # launch. The update beside separate passes and merged rows, then what a whole update holds
  run 280 "update, 2b shapes" "$python" -m benchmarks.train_step --model gemma-2-2b --device cuda --trees 6 --repeats 3 \
    --workload comb chain --out "$out/train_step.jsonl"
  local mode
  for mode in none cheap layers; do
    run 60 "memory, 2b shapes, activation checkpointing $mode" "$python" -m benchmarks.memory --model gemma-2-2b --device cuda \
      --tokens 8192 --activation-checkpointing "$mode" --out "$out/memory.jsonl"
  done
  run 120 "update, the model that ships" "$python" -m benchmarks.train_step --device cuda --out "$out/train_step.jsonl"
}

sampling() {
  if [[ $dry ]]; then
    run 120 "sampling, tiny" "$python" -m benchmarks.sampling --tiny --shapes base --no-growth --out "$out/sampling.jsonl"
    return
  fi
  local shape
  for shape in gemma-2-2b 80m base; do # most of the time is starting each provider's process, vLLM's above all
    run 240 "sampling, $shape" "$python" -m benchmarks.sampling --shapes "$shape" --no-growth --device cuda --seconds 5 \
      --out "$out/sampling.jsonl"
  done
}

tune() {
  if [[ $dry ]]; then
    run 100 "tune, interpreted" env TRITON_INTERPRET=1 \
      "$python" -m benchmarks.tune --tiny --device cpu --dtype float16 --out "$out/tune.jsonl"
    return
  fi
  run 150 "forward in Gluon, on Hopper" \
    "$python" -m benchmarks.experiments.hopper_forward --seconds 0.1 --out "$out/hopper_forward.jsonl"
  run $((60 * ${MINUTES:-5} + 60)) tune \
    "$python" -m benchmarks.tune --seconds 0.1 --minutes "${MINUTES:-5}" --out "$out/tune.jsonl"
}

if [[ ! $dry ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: torch sees no CUDA GPU here (--dry-run runs what a CPU can)" >&2
  exit 1
fi
[[ $# -gt 0 ]] || set -- tests kernels update
for part in "$@"; do
  case $part in
    tests | kernels | update | sampling | tune) "$part" ;;
    *)
      echo "gpu.sh: no part '$part': expected tests, kernels, update, sampling or tune" >&2
      exit 2
      ;;
  esac
done
if [[ ! $dry && $out == benchmarks/results ]]; then
  run 20 "picture and tables" bash -c '"$0" -m benchmarks.plot && "$0" -m benchmarks.tables --prune --write' "$python"
fi
exit $failed
