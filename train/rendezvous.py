"""Where the processes of a run meet: what Slurm says about a task, and the store that the launchers share."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore

from flashvsr.base.cli import UserError

# All nodes of a job start within this time, or one of them is broken.
JOIN_SECONDS = 600.0

# A launcher looks this often whether a rank on another node has failed.
WATCH_SECONDS = 0.5

# The launcher that holds the store waits this long for the others to have read the last word in it.
LEAVE_SECONDS = 30.0

# Below the ports that Linux hands out to clients (32768 and up).
_FIRST_PORT, _PORTS = 12000, 20000

_NAME = r"(?:[^\s,\[\]]+|\[[\d,-]+\])+"


@dataclass(frozen=True)
class Task:
    """One task of a job step, as srun started it."""

    rank: int
    count: int  # of tasks
    local_rank: int
    node: int
    hosts: tuple[str, ...]
    job: int
    step: int

    @property
    def is_node(self) -> bool:
        """Whether srun started one task per node, which starts the node's ranks; else a task is a rank."""
        return self.count == len(self.hosts)

    @property
    def address(self) -> str:
        """Where the first node is found: MASTER_ADDR if it is set; one node needs no name service."""
        return os.environ.get("MASTER_ADDR", self.hosts[0] if len(self.hosts) > 1 else "127.0.0.1")

    def port(self, index: int = 0) -> int:
        """MASTER_PORT if it is set, else one that every node derives alike and that differs between jobs.

        `index` counts the groups of one step: each has a port of its own.
        """
        derived = _FIRST_PORT + (self.job * 64 + self.step * 8) % _PORTS
        return int(os.environ.get("MASTER_PORT", derived)) + index

    def place(self) -> dict[str, str]:
        """Environment of this task as a rank, under the names that torch reads."""
        return {
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port()),
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.count),
            "LOCAL_RANK": str(self.local_rank),
        }


def slurm_task(env: Mapping[str, str] = os.environ) -> Task | None:
    """This process as a task of srun; None outside a job step (a batch script itself is not in one).

    Raises:
        UserError: srun's variables are incomplete or do not make sense.
    """
    if "SLURM_STEP_ID" not in env:
        return None
    names = ("PROCID", "STEP_NUM_TASKS", "LOCALID", "NODEID", "JOB_ID", "STEP_ID")
    values = []
    for name in names:
        text = env.get(f"SLURM_{name}", "")
        if not text.isdecimal():
            raise UserError(
                f"SLURM_{name}={text!r} is no number: start this with srun, or unset SLURM_STEP_ID"
            )
        values.append(int(text))
    rank, count, local_rank, node, job, step = values
    hosts = hostnames(env.get("SLURM_STEP_NODELIST", ""))
    if node >= len(hosts):
        raise UserError(
            f"SLURM_NODEID={node}, but SLURM_STEP_NODELIST={env.get('SLURM_STEP_NODELIST')!r} has "
            f"{len(hosts)} nodes: start this with srun"
        )
    return Task(rank, count, local_rank, node, tuple(hosts), job, step)


def hostnames(nodelist: str) -> list[str]:
    """Slurm's node list as names in order: `a[01-03,07],b` -> a01 a02 a03 a07 b.

    Raises:
        UserError: it is none.
    """
    if not re.fullmatch(f"{_NAME}(?:,{_NAME})*", nodelist):
        raise UserError(f"{nodelist!r} is no list of nodes like node[01-03,07]")
    names = []
    for item in re.findall(_NAME, nodelist):
        parts = re.split(r"\[([\d,-]+)\]", item)  # every second one stood in brackets
        choices = [_range(part, nodelist) if i % 2 else [part] for i, part in enumerate(parts)]
        names += ["".join(chosen) for chosen in itertools.product(*choices)]
    return names


def _range(text: str, nodelist: str) -> list[str]:
    """`01-03,07` -> 01 02 03 07."""
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"{nodelist!r} is no list of nodes like node[01-03,07]: {part!r} is no range")
        first, last = match[1], match[2] or match[1]
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return numbers


class Meeting:
    """The launchers of one stage, one per node: they count the ranks and hear of one that fails elsewhere.

    The first node's launcher holds the store through which the ranks find each other, so that it outlives
    any of them and its port is taken from the start. `first` is this node's first rank, `size` counts all.
    """

    def __init__(self, task: Task | None, ranks: int, index: int = 0) -> None:
        """`ranks` on this node; `index` tells the groups of one job step apart.

        Raises:
            UserError: the port is taken, or a node does not come.
        """
        self.node, self.hosts = (task.node, task.hosts) if task else (0, ("127.0.0.1",))
        self.address, port = "127.0.0.1", 0  # one node: any free port
        if len(self.hosts) > 1:
            self.address, port = task.address, task.port(index)
        try:
            self._store = TCPStore(
                self.address, port, is_master=self.node == 0, wait_for_workers=False,
                timeout=timedelta(seconds=JOIN_SECONDS),
            )  # fmt: skip
        except RuntimeError as error:
            raise UserError(
                f"no meeting at {self.address}:{port} on {self.hosts[self.node]}: {_line(error)}"
            ) from error
        self.port = self._store.port
        self._store.set(f"ranks/{self.node}", str(ranks))
        counts = [self._ranks(node) for node in range(len(self.hosts))]
        self.first, self.size = sum(counts[: self.node]), sum(counts)
        self._looked = time.monotonic()

    def _ranks(self, node: int) -> int:
        try:
            return int(self._store.get(f"ranks/{node}"))
        except RuntimeError as error:
            raise UserError(
                f"{self.hosts[node]} did not join within {JOIN_SECONDS:.0f} s: {_line(error)}"
            ) from error

    def fail(self, code: int, what: str) -> None:
        """Tells the other launchers that a rank of this node has ended with `code`."""
        self._store.set("failed", f"{code} {what}")

    def failure(self) -> tuple[int, str] | None:
        """Exit code and sentence of a rank that failed on another node, or None."""
        if len(self.hosts) == 1 or time.monotonic() - self._looked < WATCH_SECONDS:
            return None
        self._looked = time.monotonic()
        try:
            if not self._store.check(["failed"]):
                return None
            code, what = self._store.get("failed").decode().split(" ", 1)
        except RuntimeError:
            return 1, f"the launcher on {self.hosts[0]} is gone"
        return int(code), what

    def leave(self) -> None:
        """Ends the meeting; the first node waits until the others have left, at most `LEAVE_SECONDS`."""
        if len(self.hosts) == 1:
            return
        try:
            gone = self._store.add("left", 1)
            end = time.monotonic() + LEAVE_SECONDS
            while self.node == 0 and gone < len(self.hosts) and time.monotonic() < end:
                time.sleep(WATCH_SECONDS / 5)
                gone = self._store.add("left", 0)
        except RuntimeError:
            pass  # the first launcher has ended: nobody to tell


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
