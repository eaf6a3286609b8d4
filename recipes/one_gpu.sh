#!/usr/bin/env bash
# HotPotQA or GSM8K with Gemma 2 2b on one GPU of 80 GB: a vLLM server plays, judges and rewards, beside the training.
#   recipes/one_gpu.sh hotpotqa [FLAGS OF TRAIN]
# Every variable can be set; the same command again goes on where it was stopped. A larger JUDGE is a better one: the
# paper's is Gemini 1.5 Pro. Not measured: no GPU has run this.
set -euo pipefail
: "${TASK:=${1:?hotpotqa or gsm8k}}" "${OUT:=$TASK}" "${MODEL:=google/gemma-2-2b-it}" "${SWIRL:=python -m swirl}"
case $TASK in
    hotpotqa) : "${TRAIN:=hotpot_train_v1.1.json}" "${TEST:=hotpot_dev_distractor_v1.json}" "${EASY=--without-easy}" ;;
    *) : "${TRAIN:=train.jsonl}" "${TEST:=test.jsonl}" "${EASY=}" ;;
esac
: "${QUESTIONS:=10000}" "${SAMPLES:=5}" "${TOKENS:=512}" "${UPDATES:=500}" "${TEST_QUESTIONS:=500}"
: "${CACHE:=16384}"  # tokens whose keys and values train's sampler holds: its default would not fit beside the server
mkdir -p "$OUT"
. "$(dirname "$0")/server.sh"
: "${JUDGE:=$SERVER}" "${REWARD:=$JUDGE}"

$SWIRL generate --task "$TASK" --questions "$TRAIN" $EASY --num-questions "$QUESTIONS" --samples "$SAMPLES" \
    --policy "$SERVER" --tokenizer "$MODEL" --max-new-tokens "$TOKENS" --out "$OUT/trajectories.jsonl"
$SWIRL filter --data "$OUT/trajectories.jsonl" --mode process --judge "$JUDGE" \
    --kept "$OUT/kept.jsonl" --dropped "$OUT/dropped.jsonl"
$SWIRL train --packed --model "$MODEL" --data "$OUT/kept.jsonl" --mode sampled --reward "$REWARD" \
    --max-new-tokens "$TOKENS" --updates "$UPDATES" --evaluate-on "$TASK" --evaluate-questions "$TEST" \
    --evaluate-num-questions "$TEST_QUESTIONS" --activation-checkpointing layers --max-cache-tokens "$CACHE" \
    --out "$OUT/run" --resume auto "${@:2}"
