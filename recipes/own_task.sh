#!/usr/bin/env bash
# Your own task, tool and reward, from files of your own (docs/extending.md has one of 38 lines), on any machine.
#   TASK=cities.py:task REWARD=cities.py:reward recipes/own_task.sh [FLAGS OF TRAIN]
# MODEL is a Gemma's folder or name; JUDGE says which steps are good enough to train on, FILTER=none takes all.
set -euo pipefail
: "${TASK:?file.py:task}" "${REWARD:?file.py:reward}" "${JUDGE:=$REWARD}" "${FILTER:=process}" "${OUT:=own}"
: "${MODEL:=google/gemma-2-2b-it}" "${SWIRL:=python -m swirl}" "${SAMPLES:=5}" "${TOKENS:=512}" "${UPDATES:=60}"

mkdir -p "$OUT"
$SWIRL generate --task "$TASK" --policy "$MODEL" --samples "$SAMPLES" --max-new-tokens "$TOKENS" \
    --out "$OUT/trajectories.jsonl"
$SWIRL filter --data "$OUT/trajectories.jsonl" --mode "$FILTER" --judge "$JUDGE" --kept "$OUT/kept.jsonl" \
    --dropped "$OUT/dropped.jsonl"
$SWIRL train --packed --model "$MODEL" --task "$TASK" --evaluate-on "$TASK" --data "$OUT/kept.jsonl" \
    --reward "$REWARD" --max-new-tokens "$TOKENS" --updates "$UPDATES" --out "$OUT/run" --resume auto "$@"
