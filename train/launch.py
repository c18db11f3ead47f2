"""Processes of a run: how many, starting them, the group they form, and ending it all in bounded time."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from flashvsr.base.cli import UserError

# Exit code of a run that was told to stop and has saved its state: EX_TEMPFAIL, "try again later".
REQUEUE = 75

# A rank that is told to end gets this long before it is killed, so that all are gone within 10 s.
GRACE_SECONDS = 6.0
POLL_SECONDS = 0.05

# The same signal again within this time is one request that came by two ways: a scheduler signals every
# process of a job, and the launcher, which got it too, forwards it.
ECHO_SECONDS = 1.0

# The first step may compile kernels for minutes on one rank while the others wait in a collective.
GROUP_TIMEOUT = timedelta(minutes=30)

# Signals that ask a run to stop: schedulers send the first two, Ctrl-C the third.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# prctl(PR_SET_PDEATHSIG, signal), looked up here: between fork and exec a child may not load libraries.
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class World:
    """The ranks of this run as one of them sees it; the collectives are no-ops for a single process."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over all ranks in place and returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Maximum of `tensor` over all ranks, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            dist.barrier()


def processes(requested: int | None, device: str = "auto") -> int:
    """How many processes to start on this machine: as asked, else one per GPU that `device` uses, else one.

    Raises:
        UserError: fewer than one, or more than there are visible GPUs when there are any.
    """
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if requested is None:
        return max(gpus, 1)
    if requested < 1:
        raise UserError(f"{requested} processes were asked for: give at least 1")
    if gpus and requested > gpus:
        raise UserError(
            f"{requested} processes were asked for, but {gpus} GPUs are visible: give at most {gpus}"
        )
    return requested


def free_port() -> int:
    """A TCP port on this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(argv: Sequence[str], n: int, *, module: str = "train") -> int:
    """Runs `python -m MODULE ARGV` as n ranks of one group, waits for all of them and returns the exit code.

    SIGINT, SIGTERM and SIGUSR1 are forwarded to every rank; the same one again ends the run at once. The
    first rank that ends with another code than 0 or `REQUEUE` is reported with its code, the others are told
    to end and are killed after `GRACE_SECONDS`.
    """
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(n),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or n) // n))),
    }
    workers: list[subprocess.Popen] = []
    first: dict[int, float] = {}

    def forward(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - first.setdefault(number, now) > ECHO_SECONDS:
            raise SystemExit(128 + number)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in STOPPING}
    try:
        for rank in range(n):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A group of its own, so that Ctrl-C in a terminal reaches a rank once: through `forward`.
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *argv],
                    env=env,
                    process_group=0,
                    preexec_fn=_die_with_parent,
                )
            )
        return _wait(workers)
    finally:
        _end(workers)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(workers: Sequence[subprocess.Popen]) -> int:
    """Waits until all have ended well or one has not; returns the exit code of the run."""
    while True:
        codes = [worker.poll() for worker in workers]
        for rank, code in enumerate(codes):
            if code not in (None, 0, REQUEUE):
                cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                # A single rank has said itself what is wrong, unless a signal ended it.
                if len(codes) > 1 or code < 0:
                    print(f"rank {rank} of {len(codes)} ended with {cause}", file=sys.stderr)
                return 128 - code if code < 0 else code
        if None not in codes:
            return max(codes)
        time.sleep(POLL_SECONDS)


def _end(workers: Sequence[subprocess.Popen]) -> None:
    """Tells what still runs to end, and kills it with its own children when it does not."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
        time.sleep(POLL_SECONDS)
    for worker in workers:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def _die_with_parent() -> None:
    """In a new worker: a launcher that is killed outright takes its ranks along (Linux only)."""
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def init_group(device: str) -> World:
    """This process's place in the run, read from RANK, WORLD_SIZE and LOCAL_RANK as every launcher sets them.

    `device` is "cpu", "cuda" or "auto" (cuda when visible); a rank takes the GPU of its local rank. A process
    group (gloo on CPU, NCCL for CUDA tensors) exists only when there is more than one rank.

    Raises:
        UserError: CUDA is asked for and not there.
    """
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in _PLACE.items())
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda was asked for, but torch sees no GPU: use device=cpu or device=auto")
    where = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=GROUP_TIMEOUT)
    return World(rank, size, local_rank, where)


_PLACE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def teardown() -> None:
    """Ends the process group if there is one; without it, ranks sometimes abort at interpreter exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
