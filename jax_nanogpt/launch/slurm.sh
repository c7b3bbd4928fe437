#!/bin/bash
# train.py on two machines of eight GPUs, a process for each GPU, as Slurm starts them:
#
#     sbatch launch/slurm.sh config/train_gpt2.py --mesh=data:2,fsdp:8
#
# JAX reads from Slurm's variables where process 0 is, how many there are, and which GPU is whose; out_dir is on a disk
# that all machines see. Two minutes before the time is up Slurm sends SIGTERM: the processes save, and say how to go
# on. After a machine has failed Slurm starts the job again, and it goes on from the last checkpoint.
#SBATCH --job-name=jax_nanogpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -eu
cd "$SLURM_SUBMIT_DIR"
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    set -- "$@" --init_from=resume
fi
srun --kill-on-bad-exit=1 python train.py "$@" --coordinator=auto
