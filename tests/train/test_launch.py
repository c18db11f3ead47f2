"""Processes of a run: collectives, a rank that dies, signals agreed by all ranks, nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data import build
from flashvsr.base.cli import UserError
from tests.train.test_run import SMALL
from train import launch
from train.checkpoint import latest, load
from train.launch import REQUEUE, World, init_group, processes, spawn
from train.lock import run_lock
from train.preemption import StopSignal

ROOT = Path(__file__).parents[2]

# Steps until told to stop; every rank writes where it stopped and why.
STEPS = """
import pathlib, sys, time
from train.launch import REQUEUE, init_group, teardown
from train.preemption import StopSignal
out = pathlib.Path(sys.argv[1])
world = init_group("cpu")
with StopSignal() as stop:
    for step in range(10**6):
        time.sleep(0.01)
        if step == 3:
            (out / f"running{world.rank}").write_text(str(__import__("os").getpid()))
        if stop.requested(world):
            break
(out / f"stopped{world.rank}").write_text(f"{step} {stop.name}")
teardown()
sys.exit(REQUEUE)
"""

COLLECTIVES = """
import pathlib, sys, torch
from train.launch import init_group, teardown
world = init_group("cpu")
value = torch.tensor([1.0 + world.rank, -world.rank])
total, top = world.all_reduce_sum(value.clone()), world.all_reduce_max(value.clone())
world.barrier()
(pathlib.Path(sys.argv[1]) / f"rank{world.rank}").write_text(f"{world.size} {total.tolist()} {top.tolist()}")
teardown()
"""

DYING = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""

WAITING = """
import os, pathlib, sys, time
(pathlib.Path(sys.argv[1]) / f"running{os.environ['RANK']}").write_text(str(os.getpid()))
time.sleep(60)
"""

LAUNCHER = "import sys\nfrom train.launch import spawn\nsys.exit(spawn(sys.argv[2:], 2, module=sys.argv[1]))"

# The launcher of one node with one rank, under srun with a task per node.
NODE = """
import sys
from train.launch import spawn
from train.rendezvous import slurm_task
sys.exit(spawn(sys.argv[2:], 1, module=sys.argv[1], task=slurm_task()))
"""

# Rank 1 is late; rank 0 waits as long as it may.
LATE = """
import pathlib, sys, time, torch
from train.launch import init_group, teardown
world = init_group("cpu")
world.barrier()
world.set_timeout(0.5 / 60)
begun = time.monotonic()
if world.rank == 1:
    time.sleep(6)
else:
    try:
        world.all_reduce_sum(torch.ones(1))
    except RuntimeError:
        (pathlib.Path(sys.argv[1]) / "waited").write_text(str(time.monotonic() - begun))
teardown()
"""

# Checkpoint 1, then a second one whose hashes take for ever.
SAVING = """
import pathlib, sys, time, torch
from train import checkpoint
from train.preemption import StopSignal
out = pathlib.Path(sys.argv[1])
part = [("student", {"w": torch.ones(4)})]
with StopSignal():
    checkpoint.save(out, 1, part, {"stage": "s"}, 1)
    def forever(path):
        (out / "saving").write_text("yes")
        while True:
            time.sleep(0.01)
    checkpoint.sha256 = forever
    checkpoint.save(out, 2, part, {"stage": "s"}, 1)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a worker's module where child processes find it, and gives its name."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def write(code):
        (tmp_path / "worker.py").write_text(textwrap.dedent(code))
        return "worker"

    return write


def wait_for(*paths, seconds=300.0):
    end = time.monotonic() + seconds
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < end, f"{[p.name for p in paths]} never appeared"
        time.sleep(0.01)


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_how_many_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert (processes(None), processes(3)) == (1, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert (processes(None), processes(3), processes(None, "cpu"), processes(9, "cpu")) == (8, 3, 1, 9)
    with pytest.raises(UserError, match="9 processes.*8 GPUs"):
        processes(9)
    with pytest.raises(UserError, match="0 processes"):
        processes(0)


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = init_group("cpu")
    assert (world.rank, world.size, world.is_main, world.device) == (0, 1, True, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert world.all_reduce_sum(torch.tensor(2.0)) == 2.0
    world.barrier()


def test_two_ranks_reduce_and_end_cleanly(module, tmp_path, capfd):
    assert spawn([str(tmp_path)], 2, module=module(COLLECTIVES)) == 0
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == "2 [3.0, -1.0] [2.0, 0.0]"
    assert capfd.readouterr().err == ""


def test_a_dying_rank_is_named_and_ends_the_others(module, monkeypatch, capfd):
    assert launch.GRACE_SECONDS < 9  # the others are gone within 10 s
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.3)
    begun = time.monotonic()
    assert spawn([], 2, module=module(DYING)) == 3
    assert time.monotonic() - begun < 10
    assert f"rank 1 of 2 on {socket.gethostname()} ended with exit code 3" in capfd.readouterr().err


def test_a_killed_rank_is_named_and_the_others_end_soon(module, tmp_path, capfd):
    running, _ = places(tmp_path)

    def kill():
        wait_for(*running)
        os.kill(int(running[1].read_text()), signal.SIGKILL)
        return time.monotonic()

    with ThreadPoolExecutor(1) as killer:
        killed = killer.submit(kill)
        assert spawn([str(tmp_path)], 2, module=module(STEPS)) == 128 + signal.SIGKILL
        assert time.monotonic() - killed.result() < launch.GRACE_SECONDS + 24
    assert f"rank 1 of 2 on {socket.gethostname()} ended with signal SIGKILL" in capfd.readouterr().err
    assert all(gone(int(path.read_text())) for path in running)


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_runs_in_a_row_end_cleanly(module, tmp_path, capfd, times):
    """Without `teardown` ranks were seen to abort at the interpreter's exit, once in ten runs."""
    name = module(COLLECTIVES)
    assert [spawn([str(tmp_path)], 2, module=name) for _ in range(times)] == [0] * times
    assert capfd.readouterr().err == ""


def test_a_collective_waits_as_long_as_was_set_last(module, tmp_path):
    spawn([str(tmp_path)], 2, module=module(LATE))
    assert 0.4 < float((tmp_path / "waited").read_text()) < 5


def test_a_signal_before_a_rank_can_note_it_is_a_stop_too(module, tmp_path):
    module(WAITING)
    running = [tmp_path / f"running{rank}" for rank in (0, 1)]
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, "worker", tmp_path]) as process:
        wait_for(*running)
        process.send_signal(signal.SIGUSR1)
    assert process.returncode == REQUEUE


def test_a_second_signal_during_a_save_leaves_the_last_checkpoint(module, tmp_path):
    module(SAVING)
    with subprocess.Popen([sys.executable, "-m", "worker", tmp_path], stderr=subprocess.PIPE) as process:
        wait_for(tmp_path / "saving")
        process.send_signal(signal.SIGTERM)
        time.sleep(launch.ECHO_SECONDS + 0.2)
        assert process.poll() is None  # the first one waits for the step's end
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    restored = load(latest(tmp_path))
    assert restored.step == 1 and restored.take("student")["w"].tolist() == [1.0] * 4


def nodes(tmp_path):
    """Launchers of two nodes, here both on this machine."""
    env = {"SLURM_STEP_NODELIST": "127.0.0.1,127.0.0.2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    env |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", NODE, "worker", tmp_path],
            env={**os.environ, **env, "SLURM_PROCID": str(node), "SLURM_NODEID": str(node)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]


def test_two_nodes_form_one_group(module, tmp_path):
    module(COLLECTIVES)
    for process in nodes(tmp_path):
        assert process.communicate(timeout=300)[1] == "" and process.returncode == 0
    assert [(tmp_path / f"rank{rank}").read_text()[0] for rank in (0, 1)] == ["2", "2"]


def test_a_rank_that_dies_on_another_node_is_named_here(module, tmp_path):
    module(WAITING)
    first, second = nodes(tmp_path)
    running = [tmp_path / f"running{rank}" for rank in (0, 1)]
    wait_for(*running)
    os.kill(int(running[1].read_text()), signal.SIGKILL)
    begun = time.monotonic()
    for process in (first, second):
        assert "rank 1 of 2 on" in (said := process.communicate(timeout=300)[1]) and "SIGKILL" in said
        assert process.returncode == 128 + signal.SIGKILL
    assert time.monotonic() - begun < launch.GRACE_SECONDS + 24
    assert all(gone(int(path.read_text())) for path in running)


def test_torchrun_starts_ranks_too(module, tmp_path):
    name = module(COLLECTIVES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run([*command, "-m", name, tmp_path], check=True, timeout=300, capture_output=True)
    assert [(tmp_path / f"rank{rank}").read_text()[0] for rank in (0, 1)] == ["2", "2"]


def test_the_flight_recorder_writes_into_the_run_folder(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("TORCH_FR_", "TORCH_NCCL_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    launch._record_flight(tmp_path / "run" / "logs" / "nccl-stage1")
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/run/logs/nccl-stage1_rank_"
    assert int(os.environ["TORCH_FR_BUFFER_SIZE"]) > 0 and (tmp_path / "run/logs").is_dir()
    os.environ |= {"TORCH_FR_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    launch._record_flight(tmp_path / "other" / "nccl")
    assert (os.environ["TORCH_FR_BUFFER_SIZE"], os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"]) == ("7", "0")


def test_a_rank_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="local rank 2 on .* has no GPU, 2 are visible"):
        init_group("cuda")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="1 are visible"):
        init_group("auto")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert launch._gpu(2) == 0  # srun may show each task only its own


def places(folder):
    """The files in which the ranks of STEPS say that they run, and where they stopped."""
    return ([folder / f"{what}{rank}" for rank in (0, 1)] for what in ("running", "stopped"))


def test_a_signal_to_one_rank_stops_all_at_one_step(module, tmp_path):
    running, stopped = places(tmp_path)

    def send():
        wait_for(*running)
        os.kill(int(running[1].read_text()), signal.SIGUSR1)

    with ThreadPoolExecutor(1) as sender:
        sent = sender.submit(send)
        assert spawn([str(tmp_path)], 2, module=module(STEPS)) == REQUEUE
        sent.result()
    steps = [path.read_text() for path in stopped]
    assert steps[0] == steps[1] and steps[0].endswith("SIGUSR1")


def test_a_signal_to_the_launcher_reaches_all(module, tmp_path):
    module(STEPS)
    running, stopped = places(tmp_path)
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, "worker", tmp_path]) as process:
        wait_for(*running)
        process.terminate()
    assert process.returncode == REQUEUE
    steps = [path.read_text() for path in stopped]
    assert steps[0] == steps[1] and steps[0].endswith("SIGTERM")


def test_a_killed_launcher_takes_its_ranks_along(module, tmp_path):
    module(WAITING)
    running = [tmp_path / f"running{rank}" for rank in (0, 1)]
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, "worker", tmp_path]) as process:
        wait_for(*running)
        process.kill()
    end = time.monotonic() + 5
    while not all(gone(int(path.read_text())) for path in running):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_same_signal_later_exits_at_once(monkeypatch):
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    clock = iter([0.0, 0.2, 0.4, 2.5, 2.6])
    monkeypatch.setattr("train.preemption.time", SimpleNamespace(monotonic=lambda: next(clock)))
    world = World(0, 1, 0, torch.device("cpu"))
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop.requested(world) and stop.name is None
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # an echo of the same request
        signal.raise_signal(signal.SIGTERM)  # another signal asks for the same
        assert stop.requested(world) and stop.name == "SIGINT" and exits == []
        signal.raise_signal(signal.SIGINT)
        assert exits == [130]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_what_two_ranks_find_wrong_is_said_once(tmp_path):
    """A directory in use, one that cannot be written, a batch that does not divide: one sentence, code 2."""
    build.build([], tmp_path / "data", synthetic_clips=3, quiet=True)
    (tmp_path / "file").write_text("")
    common = ["stage=vae", *SMALL, f"data.shards={tmp_path}/data", "device=cpu", "parallel.processes=2"]
    alone = World(0, 1, 0, torch.device("cpu"))
    wrong = {
        f"{tmp_path}/a/vae is in use by process {os.getpid()} on": [f"runs_dir={tmp_path}", "run=a"],
        f"cannot write into the run directory {tmp_path}/file": [f"runs_dir={tmp_path}/file", "run=b"],
        "is not a multiple of micro_batch_size=2 x 2 processes": [
            f"runs_dir={tmp_path}",
            "micro_batch_size=2",
        ],
        "did you mean 'data.slots'": ["data.slot=1"],
    }
    with run_lock(tmp_path / "a" / "vae", alone):
        for sentence, more in wrong.items():
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "train", *common, "micro_batch_size=1", *more],
                capture_output=True, text=True, timeout=600, cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            )  # fmt: skip
            said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            assert done.returncode == 2 and len(said) == 1 and sentence in said[0], done.stderr
            assert "Traceback" not in done.stderr
