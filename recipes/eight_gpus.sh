#!/usr/bin/env bash
# HotPotQA on one machine of eight GPUs of 80 GB: Gemma 2 9b, or 27b by adapters. The whole way in one job; a server
# elsewhere judges and rewards, and its URL is JUDGE.
#   JUDGE=http://judge:8000/v1#model recipes/eight_gpus.sh 9b [FLAGS OF TRAIN]
# Not measured: no GPU has run this.
set -euo pipefail
case ${1:?9b or 27b} in
    9b) : "${MODEL:=google/gemma-2-9b-it}" "${ADAPTERS=}" ;;
    27b) : "${MODEL:=google/gemma-2-27b-it}" "${ADAPTERS=--lora 16 --learning-rate 2e-4}" ;;
esac
: "${JUDGE:?the URL of a server of the model that judges}" "${REWARD:=$JUDGE}" "${OUT:=hotpotqa-$1}" "${GPUS:=8}"
: "${TRAIN:=hotpot_train_v1.1.json}" "${TEST:=hotpot_dev_distractor_v1.json}" "${EASY=--without-easy}"
: "${QUESTIONS:=10000}" "${SAMPLES:=5}" "${TOKENS:=512}" "${UPDATES:=500}" "${TEST_QUESTIONS:=500}"
: "${CACHE:=32768}"  # tokens whose keys and values the sampler holds: its default would not fit
: "${TORCHRUN:=torchrun --standalone --nproc-per-node $GPUS}"

$TORCHRUN -m swirl.train --packed --model "$MODEL" $ADAPTERS --task hotpotqa --questions "$TRAIN" $EASY \
    --num-questions "$QUESTIONS" --samples "$SAMPLES" --filter process --judge "$JUDGE" --mode sampled \
    --reward "$REWARD" --max-new-tokens "$TOKENS" --updates "$UPDATES" --evaluate-questions "$TEST" \
    --evaluate-num-questions "$TEST_QUESTIONS" --activation-checkpointing layers --max-cache-tokens "$CACHE" --out "$OUT" \
    --resume auto "${@:2}"
