"""The Slurm scripts without Slurm: what the chain would submit, and what follows an attempt."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def chain(*args):
    env = {**os.environ, "PYTHON": sys.executable}
    command = ["slurm/chain.sh", "--dry-run", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_the_chain_submits_a_job_per_stage_each_after_the_one_before():
    done = chain("vae", "stage1", "--nodes=4", "run=first", "scale=tiny")
    vae, stage1 = done.stdout.replace("\\", "").splitlines()
    assert "--dependency=singleton --kill" in vae and "--job-name=flashvsr-first-vae" in vae
    assert vae.split()[-4:] == ["--nodes=4", "slurm/vae.sbatch", "run=first", "scale=tiny"]
    assert "--dependency=singleton,afterok:JOB_OF_vae" in stage1
    assert "--output=runs/first/logs/stage1-%j.log" in stage1 and "slurm/stage1.sbatch" in stage1
    assert not (ROOT / "runs/first").exists()


def test_only_the_first_stage_of_a_chain_starts_from_init():
    done = chain("init=models/wan", "scale=tiny")
    assert [("init=models/wan" in line) for line in done.stdout.splitlines()] == [True, False, False]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["data.slot=1"], "error: unknown key 'data.slot'; did you mean 'data.slots'?"),
        (["stage=1"], "error: stage=1: name stages without stage="),
        (["stage4"], "error: stage4 is neither a stage"),
    ],
)
def test_a_mistake_ends_before_anything_is_submitted(args, sentence):
    done = chain(*args)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith(sentence)


@pytest.fixture
def attempt(tmp_path):
    """Runs slurm/job.sh where srun leaves a checkpoint of `step`, if any, and ends with `code`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    checkpoints = tmp_path / "runs/a/stage1/checkpoints"
    stubs = {
        "srun": f'echo "$@" >> {tmp_path}/srun; mkdir -p {checkpoints}/${{STEP:+step-$STEP}}; exit $CODE',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol',
        "sleep": ":",
    }
    for name, body in stubs.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)

    def run(number, code, step="", **more):
        env = {
            **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "python", "STEP": step,
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(number - 1),
            "CODE": str(code),
        }  # fmt: skip
        command = ["bash", "slurm/job.sh", "stage1", f"runs_dir={tmp_path}/runs", "run=a", "seed=5"]
        return subprocess.run(command, cwd=ROOT, env={**env, **more}, capture_output=True, text=True)

    return run


def requeued(tmp_path):
    path = tmp_path / "scontrol"
    return path.read_text().splitlines() if path.exists() else []


def test_a_stopped_attempt_is_requeued_and_a_finished_or_broken_one_is_not(attempt, tmp_path):
    attempt(1, 75, "000010")
    assert requeued(tmp_path) == ["requeue 7"]
    assert (attempt(2, 3, "000020").returncode, attempt(2, 0, "000030").returncode) == (3, 0)
    assert requeued(tmp_path) == ["requeue 7"]
    assert f"python -m train stage=1 runs_dir={tmp_path}/runs run=a seed=5" in (tmp_path / "srun").read_text()
    lines = (tmp_path / "runs/a/logs/stage1-7.attempts").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "attempt 1: none -> step-000010, exit code 75",
        "attempt 2: step-000010 -> step-000020, exit code 3",
        "attempt 2: step-000020 -> step-000030, exit code 0",
    ]


def test_two_attempts_without_progress_are_enough(attempt, tmp_path):
    attempt(1, 75, "000010")
    attempt(2, 75)
    assert len(requeued(tmp_path)) == 2
    attempt(3, 75, "000020")
    attempt(4, 75)
    assert len(requeued(tmp_path)) == 4
    last = attempt(5, 75)
    assert last.returncode == 1 and "two attempts got no step further than step-000020" in last.stderr
    assert len(requeued(tmp_path)) == 4


def test_attempts_are_counted(attempt, tmp_path):
    last = attempt(3, 75, "000010", ATTEMPTS="3")
    assert last.returncode == 1 and "stopped 3 times, that is enough" in last.stderr
    assert requeued(tmp_path) == []
