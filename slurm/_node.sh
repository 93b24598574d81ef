#!/bin/bash
# The single task of a node: starts its ranks, each with its own log, and passes signals on to them.
#   srun --ntasks-per-node=1 bash slurm/_node.sh RANKS ATTEMPT COMMAND...
# Exits with the highest exit code of its ranks, as srun does with that of its tasks.
ranks=$1
attempt=$2
shift 2
export WORLD_SIZE=$((SLURM_STEP_NUM_TASKS * ranks)) LOCAL_WORLD_SIZE=$ranks
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) # one for each job, below those that the kernel assigns
started=()
interrupted=
forward() {
    interrupted=yes
    kill -"$1" "${started[@]}" 2> /dev/null
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM
for ((local = 0; local < ranks; local++)); do
    rank=$((SLURM_PROCID * ranks + local))
    RANK=$rank LOCAL_RANK=$local "$@" > "$attempt-rank$rank.log" 2>&1 &
    started+=($!)
done
highest=0
for pid in "${started[@]}"; do
    interrupted=yes
    while [ "$interrupted" ]; do # a trap interrupts wait
        interrupted=
        wait "$pid"
        code=$?
    done
    [ "$code" -le "$highest" ] || highest=$code
    mark=
    case $((code - 128)) in
        4 | 7 | 11) mark=bad ;; # illegal instruction, bus error, segmentation fault: as in slurm/_nodes.sh
        9) mark=killed ;;       # perhaps for exceeding the memory limit, which srun reports after this script has ended
    esac
    if [ "$mark" ]; then
        echo "a rank on $SLURMD_NODENAME was killed by signal $((code - 128))"
        compgen -G "$attempt-bad-*" > /dev/null || compgen -G "$attempt-killed-*" > /dev/null ||
            touch "$attempt-$mark-$SLURMD_NODENAME"
    fi
done
exit "$highest"
