#!/usr/bin/env bash
# Submits stages of one run to Slurm, each to begin when the one before it has succeeded.
#   slurm/chain.sh [--dry-run] [STAGE ...] [--SBATCH-OPTION=VALUE ...] [key=value ...]
#   slurm/chain.sh --nodes=4 --time=24:00:00 run=first scale=wan1.3b data.shards=/data/shards
# STAGE: vae, stage1, stage2, stage3, decoder (default: stage1 stage2 stage3). Options go to sbatch, over those in
# slurm/STAGE.sbatch; key=value goes to python -m train, init= to the first stage alone: later ones go on from it.
# --dry-run prints the commands and submits nothing.
# A second chain of the same run waits for the first one's jobs (singleton). Logs: runs/NAME/logs/.
set -euo pipefail
cd "$(dirname "$0")/.."

dry=no run=default runs=runs
stages=() options=() overrides=() init=()
for arg in "$@"; do
    case $arg in
        --dry-run) dry=yes ;;
        --*=* | --exclusive | --no-requeue) options+=("$arg") ;;
        stage=*)
            echo "error: $arg: name stages without stage=: vae, stage1, stage2, stage3, decoder" >&2
            exit 2
            ;;
        init=*) init=("$arg") ;;
        *=*)
            overrides+=("$arg")
            case $arg in
                run=*) run=${arg#*=} ;;
                runs_dir=*) runs=${arg#*=} ;;
            esac
            ;;
        vae | stage1 | stage2 | stage3 | decoder) stages+=("$arg") ;;
        -h | --help | '')
            sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' slurm/chain.sh
            exit 0
            ;;
        *)
            echo "error: $arg is neither a stage, nor --option=value of sbatch, nor key=value of a run" >&2
            exit 2
            ;;
    esac
done
[ ${#stages[@]} -gt 0 ] || stages=(stage1 stage2 stage3)

if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
elif [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python3
fi

# A mistake in the settings ends here, not after hours in the queue.
"$python" - "${stages[@]}" -- ${init[@]+"${init[@]}"} ${overrides[@]+"${overrides[@]}"} <<'PY'
from flashvsr.base import cli
from train.config import compose, rewrite


def main(argv):
    middle = argv.index("--")
    for stage in argv[:middle]:
        (name,), overrides = rewrite([f"stage={stage.removeprefix('stage')}", *argv[middle + 1 :]])
        compose(name, overrides)


cli.run(main)
PY

if [ $dry = no ]; then
    command -v sbatch > /dev/null || { echo "error: there is no sbatch here: log in where Slurm is" >&2; exit 2; }
    mkdir -p "$runs/$run/logs"
fi
previous=
for stage in "${stages[@]}"; do
    command=(
        sbatch --parsable "--job-name=flashvsr-$run-$stage" "--output=$runs/$run/logs/$stage-%j.log"
        "--dependency=singleton${previous:+,afterok:$previous}" --kill-on-invalid-dep=yes
        ${options[@]+"${options[@]}"} "slurm/$stage.sbatch" ${init[@]+"${init[@]}"} ${overrides[@]+"${overrides[@]}"}
    )
    init=()
    if [ $dry = yes ]; then
        previous="JOB_OF_$stage"
        printf '%q ' "${command[@]}"
        echo
    else
        previous=$("${command[@]}")
        previous=${previous%%;*}
        echo "$stage: job $previous"
    fi
done
