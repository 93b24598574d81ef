# shellcheck shell=bash
# What every job here does, in its batch shell and in the project's root: one rank a task, and a requeue where a signal
# stopped the training before its end. $ENTRY trains the recipe $RECIPE; its overrides are the job's arguments.

# shellcheck disable=SC1091
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

logs=slurm/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID
attempt=$logs/attempt${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs" || exit

# Slurm signals this shell alone (B:USR1): before the time limit, and before preemption where the site set that up.
srun=
trap 'interrupted=yes; kill -USR1 "$srun"' USR1

# Each node writes its ranks' files: over srun's own connection the last words of a failing rank can be lost.
# --wait rather than --kill-on-bad-exit, which would kill and hide the rank that was about to say what is wrong.
# srun does not take --cpus-per-task from the job by itself.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=120 --output="$attempt-rank%t.log" \
    python -u "$ENTRY" "$RECIPE" "$@" &
srun=$!
echo "$(date '+%F %T') $SLURM_JOB_NUM_NODES nodes, $SLURM_NTASKS ranks: see $attempt-rank0.log"

interrupted=yes
while [ "$interrupted" ]; do # the trap ends a wait early
    interrupted=
    wait "$srun"
    code=$?
done

# A job that is cancelled, or that Slurm requeues itself, does not come here: this shell is killed with it.
# 138 is USR1 while Python was still starting.
if [ "$code" = 138 ] || { [ "$code" = 0 ] && grep -q 'stopped after step' "$attempt-rank0.log"; }; then
    echo "$(date '+%F %T') stopped by a signal, and requeued"
    scontrol requeue "$SLURM_JOB_ID" && exit
    echo "error: could not requeue: submit the same command again, it continues" >&2
    exit 1
fi
if [ "$code" != 0 ]; then
    echo "error: a rank ended with exit code $code; the last lines of each:" >&2
    tail -n 3 "$attempt"-rank*.log >&2
fi
exit "$code"
