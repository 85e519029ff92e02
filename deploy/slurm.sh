#!/usr/bin/env bash
# One process a host, all of its GPUs. JAX reads Slurm's variables to find the others.
#   sbatch --nodes 4 deploy/slurm.sh mdn_1_3b --mesh.fsdp 8 --data.files /shared/text --output-dir /shared/runs/a
# The same line again goes on from the last checkpoint. Before its time is over Slurm sends a signal, at which
# the run saves a checkpoint.
#SBATCH --job-name mdn
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --exclusive
#SBATCH --time 24:00:00
#SBATCH --signal TERM@300
#SBATCH --output mdn-%j.log
#SBATCH --requeue
set -euo pipefail
# the clone lies on storage that all hosts share, and so does --output-dir
srun --kill-on-bad-exit=1 deploy/run.sh "$@" --distributed
