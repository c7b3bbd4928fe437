#!/bin/bash
# train.py on two machines of eight GPUs, one process per GPU, started by Slurm:
#
#     sbatch launch/slurm.sh config/train_gpt2.py --mesh=data:2,fsdp:8
#
# JAX reads the address of process 0, the number of processes and each one's GPU from Slurm's variables; out_dir is on a
# disk that all machines see. Two minutes before the time limit Slurm sends SIGTERM: the processes save and stop. After
# a machine has failed Slurm starts the job again: it resumes from the last checkpoint, or starts over if there is none.
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
    set -- "$@" --resume
fi
srun --kill-on-bad-exit=1 python train.py "$@" --coordinator=auto
