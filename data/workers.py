"""Work on files that may be damaged, in processes that may hang or die.

A `Pool` runs jobs in other processes and takes back JSON. What a damaged file does to a decoder (an error, a
crash, no end) costs that file alone and becomes a reason. The other end is `data.jobs`.
"""

import errno
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flashvsr.base.cli import UserError

Beat = Callable[[], None]  # a job calls it often: a sign of life
JOBS_PER_PROCESS = 1000  # then a new one takes over: what decoders leak does not add up


def count(wanted: int | None) -> int:
    """How many processes to use: `wanted`, or as many as this process may use cores."""
    return wanted if wanted else len(os.sched_getaffinity(0))


class Pool:
    """Processes that do `jobs`, each a (name, job) with job = {"do": …, and its arguments}.

    A job that shows no progress for `silence` seconds is ended with its process, and fails. Use as a context
    manager.
    """

    def __init__(self, workers: int, silence: float) -> None:
        self.workers, self.silence = workers, silence
        self._selector = selectors.DefaultSelector()
        self._idle: list[_Worker] = []
        self._all: list[_Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.end()
        self._selector.close()

    def run(self, jobs: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, {"result": …} or {"failed": reason}) of each job, as they end.

        Raises UserError when a job could not write because the disk is full.
        """
        waiting = iter(jobs)
        busy = 0
        for job in waiting:
            busy += self._start(job)
            if busy == self.workers:
                break
        while busy:
            for name, answer in self._answers():
                if "full" in answer:
                    raise UserError(answer["full"]) from OSError(errno.ENOSPC, "no space left")
                busy -= 1
                following = next(waiting, None)
                if following is not None:
                    busy += self._start(following)
                yield name, answer

    def _start(self, job: tuple[str, dict[str, Any]]) -> int:
        if self._idle and self._idle[-1].jobs >= JOBS_PER_PROCESS:
            self._dismiss(self._idle.pop())
        if not self._idle:
            worker = _Worker()
            self._all.append(worker)
            self._idle.append(worker)
            self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        self._idle.pop().give(*job)
        return 1

    def _dismiss(self, worker: "_Worker") -> None:
        self._selector.unregister(worker.process.stdout)
        self._all.remove(worker)
        worker.end()

    def _answers(self) -> Iterator[tuple[str, dict[str, Any]]]:
        ready = {key.data for key, _ in self._selector.select(timeout=min(1.0, self.silence / 4))}
        for worker in [w for w in self._all if w.name is not None]:
            answers = worker.read() if worker in ready else []
            if not answers and worker.dead:
                answers.append({"failed": worker.epitaph()})
            elif not answers and worker.awake and time.monotonic() - worker.heard > self.silence:
                answers.append({"failed": f"gave no frame for {self.silence:g} seconds"})
                worker.dead = True
            if not answers:
                continue
            name, worker.name = worker.name, None
            if worker.dead:
                self._dismiss(worker)
            else:
                self._idle.append(worker)
            yield name, answers[0]


class _Worker:
    """One process and what is known of its job."""

    def __init__(self) -> None:
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data.jobs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, "PYTHONPATH": path},
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self.name: str | None = None  # of its job
        self.jobs = 0
        self.awake = False  # whether it has said anything: importing may take long on a busy machine
        self.heard = time.monotonic()
        self.dead = False
        self._rest = b""

    def give(self, name: str, job: dict[str, Any]) -> None:
        self.name, self.heard, self.jobs = name, time.monotonic(), self.jobs + 1
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died between two jobs: read() finds the end of its output and says so

    def read(self) -> list[dict[str, Any]]:
        """Results that came (at most one); beats only count as a sign of life."""
        answers = []
        while chunk := self._chunk():
            self.heard, self.awake = time.monotonic(), True
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            answers += [answer for line in lines if (answer := json.loads(line))]
        return answers

    def _chunk(self) -> bytes | None:
        try:
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        self.dead = self.dead or chunk == b""
        return chunk

    def epitaph(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"made its reader crash ({how}{': ' + said[-1] if said else ''})"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            pipe.close()


def full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one it came from, says that there is no room on the disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
