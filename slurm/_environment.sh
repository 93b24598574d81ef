# shellcheck shell=bash
# Every job sources this first, in its batch shell and in the project's root, to find Python and what the cluster needs.

# slurm/site.sh, if it exists, prepares the environment or chooses a container: see slurm/site.sh.example.
PYTHON=(python)
SRUN_OPTIONS=()
# shellcheck disable=SC1091
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
# shellcheck disable=SC1091
if [ -f slurm/site.sh ]; then . slurm/site.sh || { echo "error: slurm/site.sh failed" >&2; exit 1; }; fi

wait_for_srun() { # sets code to the exit code of $srun; every signal trap must set interrupted
    interrupted=yes
    while [ "$interrupted" ]; do # a trap interrupts wait
        interrupted=
        wait "$srun"
        code=$?
    done
}
