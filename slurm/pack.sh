#!/bin/bash
# Packs an image folder or a list of files into shards, from the project's root:
#   sbatch slurm/pack.sh /data/imagenet/train /data/shards
# sbatch's options go before the script, those of `python -m data.pack` after it. Finished shards are kept, and the next
# job continues after them: a job that reaches its time limit is requeued.
#SBATCH --job-name=pack
#SBATCH --nodes=1
#SBATCH --time=12:00:00
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit
[ -f slurm/_environment.sh ] || { echo "error: $PWD is not the project's root: cd there and submit again" >&2; exit 1; }
. slurm/_environment.sh

stopped=
srun=
trap 'interrupted=yes; stopped=yes; kill -TERM "$srun"' USR1
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" "${SRUN_OPTIONS[@]}" \
    "${PYTHON[@]}" -u -m data.pack --num-workers "$SLURM_CPUS_PER_TASK" "$@" &
srun=$!
wait_for_srun
if [ "$stopped" ] && [ "$code" != 0 ]; then
    echo "$(date '+%F %T') stopped before the time limit: requeued, to continue after the shards already written"
    scontrol requeue "$SLURM_JOB_ID" && exit
    echo "error: could not requeue: submit the same command again to continue" >&2
    exit 1
fi
exit "$code"
