# shellcheck shell=bash
# What every job does, in its batch shell and in the project's root: it starts a rank for each task, and requeues the job
# if a signal stopped the training before its end. $ENTRY trains the recipe $RECIPE; the job's arguments are overrides.

# slurm/site.sh, if there, prepares the environment or chooses a container: see slurm/site.sh.example.
PYTHON=(python)
SRUN_OPTIONS=()
# shellcheck disable=SC1091
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
# shellcheck disable=SC1091
if [ -f slurm/site.sh ]; then . slurm/site.sh || { echo "error: slurm/site.sh failed" >&2; exit 1; }; fi
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

logs=slurm/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID
attempt=$logs/attempt${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs" || exit
export LOMAR_STOPPED_FILE=$PWD/$attempt-stopped # rank 0 creates it if a signal stopped the training

# Slurm signals only this shell (B:USR1): before the time limit, and before preemption if the site is set up for that.
srun=
trap 'interrupted=yes; kill -USR1 "$srun"' USR1

# Each node writes its ranks' files: over srun's own connection the last lines of a failing rank can be lost.
# --wait rather than --kill-on-bad-exit, which would kill the rank that was about to report the error.
# srun does not inherit --cpus-per-task from the job.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=120 --output="$attempt-rank%t.log" \
    "${SRUN_OPTIONS[@]}" "${PYTHON[@]}" -u "$ENTRY" "$RECIPE" "$@" &
srun=$!
echo "$(date '+%F %T') $SLURM_JOB_NUM_NODES nodes, $SLURM_NTASKS ranks: see $attempt-rank0.log"

interrupted=yes
while [ "$interrupted" ]; do # the trap interrupts wait
    interrupted=
    wait "$srun"
    code=$?
done

# A job that is cancelled, or requeued by Slurm, does not get here: this shell is killed with it.
# 138 is USR1 while Python was still starting.
if [ "$code" = 138 ] || { [ "$code" = 0 ] && [ -e "$LOMAR_STOPPED_FILE" ]; }; then
    echo "$(date '+%F %T') stopped by a signal, and requeued"
    scontrol requeue "$SLURM_JOB_ID" && exit
    echo "error: could not requeue: submit the same command again to continue" >&2
    exit 1
fi
if [ "$code" != 0 ]; then
    echo "error: a rank ended with exit code $code; the last lines of each:" >&2
    tail -n 3 "$attempt"-rank*.log >&2
fi
exit "$code"
