#!/usr/bin/env bash
# One machine with 8 GPUs (GPUS=4 for another number). The same command resumes.
#
#   recipes/launch/8_gpus.sh recipes/wrn28_10_gen1m.yaml [key=value ...]
#
# SIGTERM, SIGHUP (a lost ssh session) and SIGUSR1 reach the training processes: they finish the step, save, and exit. torchrun
# kills them after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds; its own default of 30 is too short for a large model.
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
export PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # torchrun forwards these

exec torchrun --standalone --nproc_per_node "${GPUS:-8}" -m nrat_scale.train "$@"
