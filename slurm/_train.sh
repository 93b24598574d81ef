# shellcheck shell=bash
# Every training job sources this, in its batch shell and in the project's root. It starts the ranks, and requeues the
# job if a signal stopped the training before its end, if it hung, or if a node is bad. $ENTRY trains the recipe
# $RECIPE; the job's arguments are overrides.
. slurm/_environment.sh
. slurm/_nodes.sh

# A job array, --array=1-8%1, is a chain: each of its jobs continues the run, until one of them has finished it.
id=$SLURM_JOB_ID
if [ "${SLURM_ARRAY_JOB_ID-}" ]; then id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
logs=slurm/logs/$SLURM_JOB_NAME-$id
finished=slurm/logs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID-$id}-finished
if [ "${SLURM_ARRAY_JOB_ID-}" ] && [ -e "$finished" ]; then
    echo "$(date '+%F %T') the run is finished: nothing left to do"
    exit 0
fi
attempt=$logs/attempt${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs" || exit
previous=$logs/attempt$((${SLURM_RESTART_COUNT:-0} - 1))
# Ranks create $attempt-saved after a checkpoint, -stopped if a signal stopped the training, -hung if the watchdog did,
# and -bad-NODE if something is wrong with a node. slurm/_node.sh creates -killed-NODE if a rank was killed.
export LOMAR_ATTEMPT=$PWD/$attempt

# With one task per GPU, each task is a rank. With one task per node, it starts a rank for each of its GPUs, or
# RANKS_PER_NODE ranks. If the number of nodes was changed while the job was pending, SLURM_NTASKS may be outdated.
tasks=${SLURM_NTASKS_PER_NODE:+$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))}
tasks=${tasks:-$SLURM_NTASKS}
ranks=1
if [ "$tasks" = "$SLURM_JOB_NUM_NODES" ]; then ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}; fi
[ "$ranks" -gt 0 ] || ranks=1
start=("${PYTHON[@]}" -u "$ENTRY" "$RECIPE" "$@")
output=$attempt-rank%t.log
if [ "$ranks" -gt 1 ]; then
    start=(bash slurm/_node.sh "$ranks" "$attempt" "${start[@]}")
    output=$attempt-node%t.log
fi
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / ranks > 0 ? SLURM_CPUS_PER_TASK / ranks : 1))
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # here: a container may have no scontrol
export MASTER_ADDR

# Slurm signals only this shell (B:USR1): before the time limit, and before preemption if the site is set up for that.
srun=
trap 'interrupted=yes; kill -USR1 "$srun"' USR1

# Each node writes its ranks' files: over srun's own connection the last lines of a failing rank can be lost.
# --wait rather than --kill-on-bad-exit, which would kill the rank that was about to report the error.
# srun does not inherit --cpus-per-task from the job. Its own messages are kept: they tell where a rank was killed.
exec 3> >(exec tee "$attempt-srun.log" >&2)
tee=$!
srun --ntasks="$tasks" --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=120 --output="$output" \
    "${SRUN_OPTIONS[@]}" "${start[@]}" 2>&3 3>&- &
srun=$!
echo "$(date '+%F %T') $SLURM_JOB_NUM_NODES nodes, $((tasks * ranks)) ranks: see $attempt-rank0.log"

wait_for_srun
exec 3>&-
wait "$tee"

# A job that is cancelled, or requeued by Slurm, does not get here: this shell is killed with it.
# 138: USR1 came while Python was still starting.
why=
chained=
if [ "$code" = 138 ] || { [ "$code" = 0 ] && [ -e "$attempt-stopped" ]; }; then
    why="stopped by a signal"
    [ "${SLURM_ARRAY_TASK_ID-}" = "${SLURM_ARRAY_TASK_MAX-}" ] || chained=yes
fi
if [ -e "$attempt-hung" ]; then why="ended by the watchdog ($attempt-rank*.log shows where it hung)"; fi
excluded=
if [ "$code" != 0 ]; then choose_excluded "$logs" "$attempt"; fi
if [ "$excluded" ]; then why=${why:-a node is bad}; fi

if [ "$chained" ]; then
    echo "$(date '+%F %T') $why: the next job of the array continues"
    exit 0
fi
if [ "$why" ] && [ ! "$excluded" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ ! -e "$attempt-saved" ] \
    && [ ! -e "$previous-saved" ]; then
    echo "error: $why; not requeued, because neither this attempt nor the one before it has saved a checkpoint" >&2
    why=
    [ "$code" != 0 ] || code=1
fi
if [ "$why" ]; then
    echo "$(date '+%F %T') $why: requeued"
    requeue
fi
if [ "$code" != 0 ]; then
    echo "error: a rank ended with exit code $code; the last lines of each rank:" >&2
    tail -n 3 "$attempt"-rank*.log >&2
else
    touch "$finished"
fi
exit "$code"
