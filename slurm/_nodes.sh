# shellcheck shell=bash
# Which nodes a requeued job excludes.

# Prints the bad nodes: those that ranks name (a rank that fell silent, a GPU that failed, a fault found before the
# training), or else the one on which a rank was killed first, and nodes that Slurm reports as failed. Ranks that srun
# kills after that are not to blame, nor is a node on which a rank exceeded its memory limit.
bad_nodes() { # ATTEMPT
    local names=("$1"-bad-*) killed=("$1"-killed-*)
    if [ -e "${names[0]}" ]; then
        printf '%s\n' "${names[@]#"$1-bad-"}"
        return
    fi
    # With one task per node, slurm/_node.sh sees a rank die, but not why. If a process of a task exceeded the memory
    # limit, srun says so whatever the task's exit code, but only of the first such task: the node may be another one.
    if [ -e "${killed[0]}" ] && ! grep -q '^srun: error: .*: Out Of Memory' "$1-srun.log"; then
        printf '%s\n' "${killed[@]#"$1-killed-"}"
        return
    fi
    sed -E '/^srun: (First task exited|Job step aborted|Force Terminated)/q' "$1-srun.log" |
        sed -nE 's/^srun: error: ([^ :]+): tasks? [0-9,-]+: (Killed|Segmentation fault|Bus error|Illegal instruction).*/\1/p' | head -n 1
    sed -nE 's/^srun: error: .*[nN]ode failure on ([^ ]+).*/\1/p' "$1-srun.log"
}

# Counts the working nodes of the job's partition, without the excluded ones.
nodes_left() { # NODES, separated by commas
    comm -23 <(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %T' |
        grep -Ev 'down|drain|fail|maint|unknown|\*' | cut -d ' ' -f 1 | sort -u) \
        <(scontrol show hostnames "${1:-none}" | sort -u) | wc -l
}

# Sets $excluded to the job's new list if there are bad nodes that can be spared; at most MAX_EXCLUDED_NODES in all.
choose_excluded() { # LOGS ATTEMPT
    local node list count
    list=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -nE 's/.* ExcNodeList=([^ ]+).*/\1/p')
    [ "$list" != "(null)" ] || list=
    for node in $(bad_nodes "$2"); do
        count=$(cat "$1/excluded" 2> /dev/null | wc -l)
        if [ "$count" -ge "${MAX_EXCLUDED_NODES:-2}" ]; then
            echo "$node seems to be bad but is not excluded: $count nodes already are, the limit of MAX_EXCLUDED_NODES" >&2
        elif [ "$(nodes_left "${list:+$list,}$node")" -lt "$SLURM_JOB_NUM_NODES" ]; then
            echo "$node seems to be bad but is not excluded: partition $SLURM_JOB_PARTITION has no node to spare; submit the same command again to continue" >&2
        else
            list=${list:+$list,}$node
            excluded=$list
            echo "$node" >> "$1/excluded"
            echo "$(date '+%F %T') $node seems to be bad and is excluded from this job"
        fi
    done
}

# Ends this shell. Slurm accepts a list of excluded nodes only for a job that is not running: after the requeue, which
# ends this shell by SIGTERM and, a while later, by SIGKILL.
requeue() {
    trap '' TERM
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        echo "error: could not requeue: submit the same command again to continue" >&2
        exit 1
    fi
    if [ "$excluded" ] && ! scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded"; then
        echo "error: Slurm did not exclude $excluded, see above" >&2
    fi
    exit 0
}
