"""A command killed with -9 at any moment goes on where it was; a killed process is told by its unit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def start(test_folder, out, *more):
    methods = [
        "--method",
        "bicubic",
        "--method",
        "lanczos",
        "--method",
        "net=basicvsr,weights=random,interval=3",
    ]
    command = [sys.executable, "-m", "eval", *methods, "--data", str(test_folder), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--metrics", "psnr,ssim,tdiff", *more],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def scores(out):
    stored = json.loads((out / "eval.json").read_text())["scores"]
    return {(s["method"], s["clip"]): (s["values"], s["per_frame"]) for s in stored}


def children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@pytest.mark.parametrize("more", [(), ("--workers", "2")])
def test_killed_again_and_again_it_ends_with_the_same_numbers(test_folder, tmp_path, more):
    """Each time after a few more files have appeared, finished or not."""
    whole, out = start(test_folder, tmp_path / "whole"), tmp_path / "out"
    assert whole.wait() == 0
    rng, kills = random.Random(0), 0
    while True:
        process, before = start(test_folder, out, *more), set((out / "cache").rglob("*"))
        wanted = rng.randint(1, 8)
        while process.poll() is None and len(set((out / "cache").rglob("*")) - before) < wanted:
            time.sleep(0.001)
        if process.poll() is not None:
            break
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.wait()
        kills += 1
    assert process.returncode == 0, process.stderr.read()
    assert kills >= 3 and scores(out) == scores(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds child processes in /proc")
def test_a_killed_process_ends_the_command_with_a_sentence_and_no_orphans(test_folder, tmp_path):
    process = start(test_folder, tmp_path / "out", "--workers", "2")
    wait_for(lambda: (tmp_path / "out" / "cache").exists() and len(children(process.pid)) >= 2)
    workers = children(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    assert process.wait(120) == 2
    error = process.stderr.read()
    assert "was ended from outside, perhaps for want of memory" in error and "Traceback" not in error
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds child processes in /proc")
def test_when_the_command_is_killed_its_processes_end(test_folder, tmp_path):
    process = start(test_folder, tmp_path / "out", "--workers", "2")
    wait_for(lambda: len(children(process.pid)) >= 2)
    workers = children(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
