#!/bin/bash
# Trains on 2 nodes with 4 GPUs each: one process per GPU. Submit with
#   sbatch docs/launch/slurm.sh
# Slurm sends SIGTERM two minutes before the time is up; the run saves, and the job is queued again
# until training has reached its end.
#SBATCH --job-name=unetr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

DATA=${DATA:-$HOME/data/Task09_Spleen}
OUT=${OUT:-$HOME/runs/spleen}

# JAX reads from Slurm's variables how many processes there are and where the first one is.
srun --kill-on-bad-exit=1 \
    python -m train --data "$DATA" --out "$OUT" --resume auto --batch-size 8 --dtype bfloat16
status=$?
# 143 is the status of a run that SIGTERM has stopped.
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
