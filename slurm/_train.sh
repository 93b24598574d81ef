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
previous=$logs/attempt$((${SLURM_RESTART_COUNT:-0} - 1))
# Ranks create $attempt-saved with a checkpoint, -stopped if a signal stopped the training, -hung if the watchdog did.
export LOMAR_ATTEMPT=$PWD/$attempt

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
why=
if [ "$code" = 138 ] || { [ "$code" = 0 ] && [ -e "$attempt-stopped" ]; }; then why="stopped by a signal"; fi
if [ -e "$attempt-hung" ]; then why="ended by the watchdog, which says in $attempt-rank*.log where it hung"; fi
if [ "$why" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ ! -e "$attempt-saved" ] && [ ! -e "$previous-saved" ]; then
    echo "error: $why; not requeued, as neither this attempt nor the one before it has saved a checkpoint" >&2
    why=
    [ "$code" != 0 ] || code=1
fi
if [ "$why" ]; then
    echo "$(date '+%F %T') $why, and requeued"
    scontrol requeue "$SLURM_JOB_ID" && exit
    echo "error: could not requeue: submit the same command again to continue" >&2
    exit 1
fi
if [ "$code" != 0 ]; then
    echo "error: a rank ended with exit code $code; the last lines of each:" >&2
    tail -n 3 "$attempt"-rank*.log >&2
fi
exit "$code"
