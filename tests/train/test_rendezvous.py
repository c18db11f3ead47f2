"""Where ranks meet: Slurm's node lists and places, ports, and the launchers of several nodes."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from flashvsr.base.cli import UserError
from train import rendezvous
from train.rendezvous import Meeting, hostnames, slurm_task

LISTS = {
    "node1": "node1",
    "node[1-3]": "node1 node2 node3",
    "node[01-03,07],login": "node01 node02 node03 node07 login",
    "n[8-11]": "n8 n9 n10 n11",
    "r[1-2]c[8-9]-ib": "r1c8-ib r1c9-ib r2c8-ib r2c9-ib",
    "127.0.0.1,127.0.0.2": "127.0.0.1 127.0.0.2",
}


def step(rank=0, count=2, local=0, node=0, nodelist="127.0.0.1,127.0.0.2", job=7, number=0):
    """The environment of a task of srun."""
    values = {"PROCID": rank, "STEP_NUM_TASKS": count, "LOCALID": local, "NODEID": node}
    values |= {"STEP_NODELIST": nodelist, "JOB_ID": job, "STEP_ID": number}
    return {f"SLURM_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(("text", "names"), LISTS.items())
def test_node_lists_become_names(text, names):
    assert hostnames(text) == names.split()


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="scontrol is not installed")
@pytest.mark.parametrize("text", LISTS)
def test_node_lists_as_scontrol_reads_them(text):
    said = subprocess.run(["scontrol", "show", "hostnames", text], capture_output=True, text=True)
    if said.returncode:
        pytest.skip("scontrol finds no slurm.conf")
    assert hostnames(text) == said.stdout.split()


@pytest.mark.parametrize("text", ["", "n[1-", "n[3-1]", "a,,b", "a[x]", "n[]", "n[-]", "a b"])
def test_what_is_no_node_list_is_told(text):
    with pytest.raises(UserError, match=r"no list of nodes like node\[01-03,07\]"):
        hostnames(text)


def test_a_task_of_srun():
    assert slurm_task({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}) is None  # a batch script is no task
    per_node = slurm_task(step(rank=1, node=1, nodelist="a[1-2]"))
    assert per_node.is_node and per_node.address == "a1" and per_node.port() != per_node.port(1)
    per_gpu = slurm_task(step(rank=5, count=16, local=5, nodelist="a[1-2]"))
    assert not per_gpu.is_node
    port = str(per_gpu.port())
    assert per_gpu.place() == {
        "MASTER_ADDR": "a1", "MASTER_PORT": port, "RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "5",
    }  # fmt: skip
    with pytest.raises(UserError, match="SLURM_PROCID='x'"):
        slurm_task(step(rank="x"))
    with pytest.raises(UserError, match="SLURM_NODEID=2.*2 nodes"):
        slurm_task(step(node=2))


def test_jobs_and_steps_near_each_other_have_ports_of_their_own(monkeypatch):
    ports = [
        slurm_task(step(job=job, number=number)).port(index)
        for job in range(4_000_000, 4_000_100)
        for number in range(4)
        for index in range(2)
    ]
    assert len(set(ports)) == len(ports) and min(ports) >= 12000 and max(ports) < 32768
    monkeypatch.setenv("MASTER_PORT", "5000")
    assert slurm_task(step()).port(1) == 5001


def test_two_launchers_count_ranks_and_hear_of_a_failure(monkeypatch):
    monkeypatch.setattr(rendezvous, "WATCH_SECONDS", 0.0)
    tasks = [slurm_task(step(rank=i, node=i, job=os.getpid())) for i in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(Meeting, tasks, (2, 3))
        assert (first.first, first.size, second.first, second.size) == (0, 5, 2, 5)
        assert first.failure() is None and second.failure() is None
        second.fail(137, "rank 3 of 5 on b ended with signal SIGKILL")
        assert first.failure() == (137, "rank 3 of 5 on b ended with signal SIGKILL")
        list(pool.map(Meeting.leave, (first, second)))  # neither waits for ever
    del first
    assert second.failure() == (1, "the launcher on 127.0.0.1 is gone")


def test_a_node_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 0.2)
    with pytest.raises(UserError, match="127.0.0.2 did not join within 0 s"):
        Meeting(slurm_task(step(job=os.getpid() + 1)), 1)


def test_a_port_that_is_taken_is_told():
    held = Meeting(None, 1)
    task = slurm_task(step(job=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", str(held.port))
        with pytest.raises(UserError, match=f"no meeting at 127.0.0.1:{held.port}.*EADDRINUSE"):
            Meeting(task, 1)


def test_a_broken_node_list_is_one_sentence():
    env = {**os.environ, **step(nodelist="node[1-")}
    env = {k: v for k, v in env.items() if k not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run(
        [sys.executable, "-m", "train", "stage=vae"], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert done.stderr == "error: 'node[1-' is no list of nodes like node[01-03,07]\n"
