#!/usr/bin/env bash
# One job over two machines of eight GPUs of 80 GB: the same command on each, with the name of one of them as HEAD. OUT,
# DATA and MODEL must be where both can read them, and HEAD's port on a private network: torch's store knows no password.
#   HEAD=node1 recipes/two_nodes.sh [FLAGS OF TRAIN]
# Not measured: it was run as two jobs on one machine.
set -euo pipefail
: "${HEAD:?the name of one of the machines}" "${PORT:=29500}" "${NODES:=2}" "${GPUS:=8}" "${ID:=swirl}"
: "${MODEL:=google/gemma-2-9b-it}" "${DATA:=kept.jsonl}" "${REWARD:=recorded}" "${UPDATES:=500}" "${OUT:=run}"
: "${TORCHRUN:=torchrun --nnodes $NODES --nproc-per-node $GPUS --rdzv-backend c10d --rdzv-id $ID --rdzv-endpoint $HEAD:$PORT}"

# With a store shared over rounds torchrun 2.13 never tells a machine that comes back where the store is.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

exec $TORCHRUN -m swirl.train --packed --model "$MODEL" --data "$DATA" --reward "$REWARD" --updates "$UPDATES" \
    --out "$OUT" --resume auto "$@"
