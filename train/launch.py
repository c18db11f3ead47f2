"""Processes of a run: how many, starting them, the group they form, and ending it all in bounded time.

Whoever starts a rank tells it its place by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT:
torchrun and accelerate do, `spawn` does, and of srun's own variables the same are made (`train.rendezvous`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from flashvsr.base.cli import UserError
from train.rendezvous import Meeting, Task

# Exit code of a run that was told to stop and has saved its state: EX_TEMPFAIL, "try again later".
REQUEUE = 75

# A rank that is told to end gets this long before it is killed, so that all are gone within 10 s.
GRACE_SECONDS = 6.0
POLL_SECONDS = 0.05

# The same signal again within this time is one request that came by two ways: a scheduler signals every
# process of a job, and the launcher, which got it too, forwards it.
ECHO_SECONDS = 2.0

# Of a group whose maker names no other limit, in minutes.
GROUP_TIMEOUT = 30.0

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

    def set_timeout(self, minutes: float) -> None:
        """How long a collective may take from now on, in every group.

        Those under way keep theirs, so call it where all ranks have just met. Each backend takes the limit
        of a collective from its options when the collective begins.
        """
        if self.size > 1:
            for group in list(distributed_c10d._world.pg_map):
                distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


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


def spawn(
    argv: Sequence[str], n: int, *, module: str = "train", task: Task | None = None, index: int = 0
) -> int:
    """Runs `python -m MODULE ARGV` as n ranks of one group, waits for all of them and returns the exit code.

    With the `task` of a step with one task per node, every node's `spawn` starts its ranks of one common
    group; `index` tells the groups of a step apart. SIGINT, SIGTERM and SIGUSR1 are forwarded to every rank;
    the same one again ends the run at once. The first rank that ends with another code than 0 or `REQUEUE`
    is named, on every node, the others are told to end and are killed after `GRACE_SECONDS`.
    """
    workers: list[subprocess.Popen] = []
    told: dict[int, float] = {}

    def forward(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - told.setdefault(number, now) > ECHO_SECONDS:
            raise SystemExit(128 + number)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in STOPPING}
    try:
        meeting = Meeting(task, n, index)
        for local_rank in range(n):
            # A group of its own, so that Ctrl-C in a terminal reaches a rank once: through `forward`.
            worker = subprocess.Popen(
                [sys.executable, "-m", module, *argv],
                env=_place(meeting, local_rank, n),
                process_group=0,
                preexec_fn=_die_with_parent,
            )
            workers.append(worker)
            for number in list(told):  # it came before this rank was there
                worker.send_signal(number)
        code = _wait(workers, meeting, told)
        _end(workers)
        meeting.leave()
        return code
    finally:
        _end(workers)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _place(meeting: Meeting, local_rank: int, n: int) -> dict[str, str]:
    """Environment of a rank, as torchrun makes it: the ranks meet in the launcher's store."""
    return {
        **os.environ,
        "MASTER_ADDR": meeting.address,
        "MASTER_PORT": str(meeting.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(meeting.size),
        "RANK": str(meeting.first + local_rank),
        "LOCAL_RANK": str(local_rank),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, _cpus() // n))),
    }


def _cpus() -> int:
    """How many cores this process may use: a scheduler gives a job its share of them."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _wait(workers: Sequence[subprocess.Popen], meeting: Meeting, told: Mapping[int, float]) -> int:
    """Waits until all have ended well or one has not; returns the exit code of the run."""
    while True:
        codes = [worker.poll() for worker in workers]
        bad = [(code, i) for i, code in enumerate(codes) if code not in (None, 0, REQUEUE)]
        if bad:
            # Killed ones first, then a user's error: the others may have ended because these did.
            code, i = min(bad, key=lambda one: (one[0] > 0, one[0] != 2))
            if -code in told and -code != signal.SIGINT:
                return REQUEUE  # told to stop before it could note it: nothing was begun
            cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            what = f"rank {meeting.first + i} of {meeting.size} on {socket.gethostname()} ended with {cause}"
            code = 128 - code if code < 0 else code
            # Who ended with 2 has said why in a sentence; so has a single rank, unless it was killed.
            if code != 2 and (meeting.size > 1 or code > 128):
                print(what, file=sys.stderr)
            meeting.fail(code, what)
            return code
        if None not in codes:
            return max(codes)
        if (failure := meeting.failure()) is not None:
            code, what = failure
            print(what, file=sys.stderr)
            return code
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


def init_group(device: str, minutes: float = GROUP_TIMEOUT, traces: Path | None = None) -> World:
    """This process's place in the run, read from RANK, WORLD_SIZE and LOCAL_RANK as every launcher sets them.

    `device` is "cpu", "cuda" or "auto" (cuda when visible); a rank takes the GPU of its local rank. A process
    group (gloo on CPU, NCCL for CUDA tensors) exists only when there is more than one rank; its collectives
    may take `minutes`. When one of NCCL's takes longer, its last operations go to `traces`_rank_N.

    Raises:
        UserError: CUDA is asked for and not there, or this rank has no GPU left to take.
    """
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in _PLACE.items())
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda was asked for, but torch sees no GPU: use device=cpu or device=auto")
    where = torch.device(device, _gpu(local_rank)) if device == "cuda" else torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        if where.type == "cuda" and traces is not None:
            _record_flight(traces)
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(minutes=minutes))
    return World(rank, size, local_rank, where)


_PLACE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def _gpu(local_rank: int) -> int:
    """The index of this rank's GPU among those it sees; srun may show each task its own only."""
    count = torch.cuda.device_count()
    if count == 1 and "SLURM_STEP_ID" in os.environ:
        return 0
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} on {socket.gethostname()} has no GPU, {count} are visible there: "
            f"start at most {count} processes per node"
        )
    return local_rank


def _record_flight(traces: Path) -> None:
    """NCCL's flight recorder: the last operations of every rank, written when one runs out of time.

    Read at the creation of the group; what the user has set stays.
    """
    traces.parent.mkdir(parents=True, exist_ok=True)
    if not {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"} & os.environ.keys():
        os.environ["TORCH_FR_BUFFER_SIZE"] = "2000"
    if not {"TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"} & os.environ.keys():
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = f"{traces}_rank_"
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def teardown() -> None:
    """Ends the process group if there is one; without it, ranks sometimes abort at interpreter exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
