#!/usr/bin/env bash
# sbatch launch/slurm.sh pha-125m.wikitext103 --data STORE --out runs/mine
#
# Two nodes with eight GPUs. Ninety seconds before the time is over, and when the job is preempted, every process is
# asked to stop: the run writes a checkpoint, the job goes back to the queue, and then goes on from there.
#SBATCH --job-name=pha
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@90
set -uo pipefail

stopped=false
trap 'stopped=true' TERM
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
  --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head:29500" -m pha train "$@" &
wait $!
code=$?
if $stopped; then
  wait  # for the checkpoint
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
