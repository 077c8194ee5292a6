#!/usr/bin/env bash
# Two machines with 8 GPUs each: run it on both, with NODE_RANK 0 and 1. The same commands resume.
#
#   NODE_RANK=0 MASTER_ADDR=10.0.0.1 recipes/launch/2x8_gpus.sh recipes/wrn28_10_gen1m.yaml [key=value ...]
#   NODE_RANK=1 MASTER_ADDR=10.0.0.1 recipes/launch/2x8_gpus.sh recipes/wrn28_10_gen1m.yaml [key=value ...]
#
# MASTER_ADDR is the address of the first machine. Both need the same data and the same run_dir (a shared file system).
set -euo pipefail

: "${NODE_RANK:?set NODE_RANK to 0 on the first machine and to 1 on the second}"
: "${MASTER_ADDR:?set MASTER_ADDR to the address of the first machine}"

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
export PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # torchrun forwards these

exec torchrun --nnodes "${NODES:-2}" --node_rank "$NODE_RANK" --nproc_per_node "${GPUS:-8}" \
  --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" -m nrat_scale.train "$@"
