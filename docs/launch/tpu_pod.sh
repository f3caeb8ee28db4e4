#!/bin/bash
# Trains on a TPU pod slice, v5e with 16 chips on 4 hosts, whose hosts share one disk. Run with
#   bash docs/launch/tpu_pod.sh
# on a machine with gcloud. A volume is split over 4 chips, and the parameters over 4.
set -eu

NAME=${NAME:-unetr}
ZONE=${ZONE:-us-west4-a}
DATA=${DATA:-/mnt/data/Task09_Spleen}
OUT=${OUT:-/mnt/data/runs/spleen}
REPOSITORY=${REPOSITORY:-https://github.com/YOUR_NAME/unetr}

gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" \
    --accelerator-type v5litepod-16 --version v2-alpha-tpuv5-lite

gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command \
    "git clone $REPOSITORY unetr && cd unetr && pip install -e '.[train]' -c constraints.txt 'jax[tpu]'"

# The same command starts on every host; JAX asks Google's metadata server who the others are.
gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command \
    "cd unetr && python -m train --data $DATA --out $OUT --resume auto --batch-size 4 \
    --dtype bfloat16 --roi-size 128 128 128 --patch-size 16 16 16 --fsdp 4 --depth-shards 4"
