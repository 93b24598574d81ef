#!/bin/bash
# Pretrains a ViT-B, from the project's root:
#   sbatch --nodes=4 slurm/pretrain_vitb.sh data.shards=/data/in1k name=myrun
# sbatch's options go before the script, the recipe's keys after it; RECIPE= in the environment chooses another recipe.
#SBATCH --job-name=pretrain_vitb
#SBATCH --nodes=1
#SBATCH --time=24:00:00
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

ENTRY=pretrain/run.py
RECIPE=${RECIPE:-lomar_vitb16_224_1600e}
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit
[ -f slurm/_train.sh ] || { echo "error: $PWD is not the project's root: cd there and submit again" >&2; exit 1; }
. slurm/_train.sh
