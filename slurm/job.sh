#!/usr/bin/env bash
# One attempt of one stage inside a Slurm job; the .sbatch files call it.
#   slurm/job.sh vae|stage1|stage2|stage3|decoder [key=value ...]
# One task per node, which starts one process per GPU. Exit code 75 means: told to stop, state saved. The job is
# then requeued, at most ATTEMPTS times (default 100), and not when two attempts in a row got no step further.
set -euo pipefail
stage=$1
shift

run=default runs=runs
for arg in "$@"; do
    case $arg in
        run=*) run=${arg#*=} ;;
        runs_dir=*) runs=${arg#*=} ;;
    esac
done
logs=$runs/$run/logs
mkdir -p "$logs"
record=$logs/$stage-$SLURM_JOB_ID.attempts

if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
elif [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python3
fi

newest() {
    { ls "$runs/$run/$stage/checkpoints" 2>/dev/null || true; } | { grep '^step-' || true; } | sort -V | tail -n 1
}

attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
before=$(newest)
echo "== $stage of run $run, attempt $attempt, job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, from ${before:-the start}"

# Slurm signals the tasks itself (--signal without B:), on all nodes; this shell has nothing to forward and only
# waits for srun's end. --wait: when a node's task has ended, the others must within a minute.
trap : TERM USR1
code=0
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=60 \
    "$python" -m train "stage=${stage#stage}" "$@" || code=$?

after=$(newest)
echo "$(date +%Y-%m-%dT%H:%M:%S) attempt $attempt: ${before:-none} -> ${after:-none}, exit code $code" >> "$record"
tail -n 1 "$record"
[ "$code" -eq 75 ] || exit "$code"

if [ "$(tail -n 2 "$record" | grep -c ": ${after:-none} -> ${after:-none}, exit code 75")" -eq 2 ]; then
    echo "error: two attempts got no step further than ${after:-the start}: give a longer --time or an earlier --signal" >&2
    exit 1
fi
if [ "$attempt" -ge "${ATTEMPTS:-100}" ]; then
    echo "error: stopped $attempt times, that is enough: submit again, or raise ATTEMPTS" >&2
    exit 1
fi
trap - TERM
scontrol requeue "$SLURM_JOB_ID"
# Slurm ends this script now; should it not, the job has failed.
sleep 60
exit 75
