"""A real Slurm on this machine: three chained stages, stopped in every way, end as an uninterrupted run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import flashvsr
from data import build
from tests.train.test_run import SMALL

ROOT = Path(__file__).parents[2]
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [tool for tool in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(tool, path=PATH)]
STAGES = ("stage1", "stage2", "stage3")
STEPS = 5

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: apt-get install -y slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmctld and slurmd are started as root"),
]


class Cluster:
    """The cluster's commands, and a transcript of what was done and seen."""

    def __init__(self, folder: Path):
        self.folder, self.lines, self.begun = folder, [], time.monotonic()
        # The rest of the settings are the shell's: a rank's place in another group is not for these jobs.
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_", "SBATCH_"))}
        own = {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        self.env = {**keep, "PATH": PATH, **own}

    def run(self, *command: object) -> str:
        done = subprocess.run(
            [str(c) for c in command], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def say(self, text: str) -> None:
        self.lines.append(f"{time.monotonic() - self.begun:6.1f} s  {text}")

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def until(self, what, seconds: float = 600.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "\n".join([*self.lines, self.run("squeue", "-a")])
            time.sleep(0.05)

    def again(self, job: str, restarts: int) -> None:
        """Waits until the job is requeued; it starts at once, not after the minutes Slurm gives a node."""

        def pending():
            state = self.job(job)
            return int(state["Restarts"]) >= restarts and state["JobState"] in ("PENDING", "RUNNING")

        self.until(pending)
        state = self.job(job)
        self.say(f"job {job}: {state['JobState']} ({state['Reason']}), restarts {state['Restarts']}")
        if state["JobState"] == "PENDING":
            time.sleep(5)  # the end of the old attempt must not be taken for that of the new one
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        self.until(lambda: self.job(job)["JobState"] != "PENDING")

    def ranks(self, job: str) -> list[int]:
        """Process ids of the job's ranks."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                env = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SLURM_JOB_ID={job}".encode() in env and any(e.startswith(b"RANK=") for e in env):
                found.append(int(path.parent.name))
        return found


def told(pid: int) -> bool:
    """Whether a process held still has SIGUSR1 waiting, runs again (Slurm sends SIGCONT first) or ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    waiting = int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)
    return "State:\tT" not in status or bool(waiting >> (signal.SIGUSR1 - 1) & 1)


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    script = ROOT / "tests/slurm/cluster.sh"
    subprocess.run(["bash", script, "up", folder], check=True, timeout=60)
    cluster = Cluster(folder)
    try:
        yield cluster
        cluster.run("scancel", "--user=root")
        cluster.until(lambda: not cluster.run("squeue", "-h"), seconds=60)
    finally:
        subprocess.run(["bash", script, "down", folder], check=True, timeout=60)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Shards, and two runs that hold the same VAE."""
    folder = tmp_path_factory.mktemp("runs")
    build.build([], folder / "data", synthetic_clips=3, quiet=True)
    assert train(folder, "plain", "vae", "steps=1", "parallel.processes=1").wait() == 0
    shutil.copytree(folder / "plain", folder / "broken")
    return folder


def overrides(folder: Path, run: str) -> list[str]:
    return [
        f"runs_dir={folder}", f"run={run}", f"data.shards={folder}/data", *SMALL, "device=cpu",
        f"steps={STEPS}", "data.val_pictures=0", "parallel.processes=2", "micro_batch_size=1",
        "global_batch_size=2",
    ]  # fmt: skip


def train(folder: Path, run: str, stage: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "train", f"stage={stage}", *overrides(folder, run), *more]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def stopped_at(cluster: Cluster, runs: Path, stage: str, job: str, step: int) -> list[int]:
    """Holds the ranks of a running job still once they have done `step` steps."""
    cluster.until(lambda: steps_done(runs / "broken" / stage) >= step)
    ranks = cluster.ranks(job)
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    return ranks


def go_on(cluster: Cluster, ranks: list[int]) -> None:
    """Lets held ranks run once all of them have been told to stop."""
    cluster.until(lambda: all(told(pid) for pid in ranks), seconds=200)
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_a_chain_interrupted_in_every_way_ends_with_the_bits_of_one_that_was_not(cluster, runs, capsys):
    plain = train(runs, "plain", "1..3")
    options = ["--gpus-per-node=2", "--cpus-per-task=1", "--time=30", "--signal=USR1@90"]
    said = cluster.run("slurm/chain.sh", *options, *overrides(runs, "broken"))
    jobs = dict(re.findall(r"(\w+): job (\d+)", said))
    assert tuple(jobs) == STAGES
    cluster.say(f"slurm/chain.sh: {said}".replace("\n", ", "))

    ranks = stopped_at(cluster, runs, "stage1", jobs["stage1"], 2)
    assert cluster.job(jobs["stage2"])["Reason"] == "Dependency"
    hours, minutes, _ = cluster.job(jobs["stage1"])["RunTime"].split(":")
    limit = 60 * int(hours) + int(minutes) + 2  # over in one to two minutes: Slurm tells at its next look
    cluster.run("scontrol", "update", f"JobId={jobs['stage1']}", f"TimeLimit={limit}")
    cluster.say("stage1: the time limit comes near after step 2")
    go_on(cluster, ranks)
    cluster.run("scontrol", "update", f"JobId={jobs['stage1']}", "TimeLimit=30")
    cluster.again(jobs["stage1"], 1)

    ranks = stopped_at(cluster, runs, "stage2", jobs["stage2"], 2)
    cluster.run("scancel", "--signal=USR1", jobs["stage2"])
    cluster.say("stage2: scancel --signal=USR1 after step 2")
    go_on(cluster, ranks)
    cluster.again(jobs["stage2"], 1)

    stopped_at(cluster, runs, "stage3", jobs["stage3"], 2)
    cluster.run("scontrol", "requeue", jobs["stage3"])
    cluster.say("stage3: scontrol requeue after step 2")
    cluster.again(jobs["stage3"], 1)

    cluster.until(lambda: not cluster.run("squeue", "-h"))
    assert plain.wait() == 0
    for stage, job in jobs.items():
        state = cluster.job(job)
        cluster.say(f"{stage}: {state['JobState']} {state['ExitCode']}, restarts {state['Restarts']}")
        cluster.lines += [
            path.read_text().rstrip() for path in runs.glob(f"broken/logs/{stage}-{job}.attempts")
        ]
        log = (runs / f"broken/logs/{stage}-{job}.log").read_text()
        assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    same = [name for stage in STAGES for name in equal_files(runs, stage)]
    a, b = (flashvsr.load(runs / run / "stage3/export") for run in ("plain", "broken"))
    assert all(torch.equal(t, b.dit.state_dict()[name]) for name, t in a.dit.state_dict().items())
    cluster.say(f"equal to the uninterrupted run's, byte for byte: {', '.join(same)}")
    with capsys.disabled():
        print("", *cluster.lines, sep="\n")


def equal_files(runs: Path, stage: str) -> list[str]:
    """The tensor files of the last checkpoint, which are the same bytes in both runs."""
    last = f"{stage}/checkpoints/step-{STEPS:06d}"
    names = sorted(path.name for path in (runs / "plain" / last).glob("*.safetensors"))
    assert len(names) >= 2
    for name in names:
        assert (runs / "plain" / last / name).read_bytes() == (runs / "broken" / last / name).read_bytes(), (
            name
        )
    return [f"{stage}/{name}" for name in names]
