"""Work on files that may be damaged, in processes that may hang or die.

A `Pool` runs jobs in other processes and takes back JSON. What a damaged file does to a decoder (an error, a
crash, no end) costs that file alone and becomes a reason. `python -m data.workers` is the other end: one job
per line on stdin, its beats and its result as lines on stdout.
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

Beat = Callable[[], None]
SECONDS_PER_BEAT = 0.5


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
            for worker, answer in self._answers():
                if "full" in answer:
                    raise UserError(answer["full"])
                busy -= 1
                name = worker.name
                following = next(waiting, None)
                if following is not None:
                    busy += self._start(following)
                yield name, answer

    def _start(self, job: tuple[str, dict[str, Any]]) -> int:
        if not self._idle:
            worker = _Worker()
            self._all.append(worker)
            self._idle.append(worker)
            self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        self._idle.pop().give(*job)
        return 1

    def _answers(self) -> Iterator[tuple["_Worker", dict[str, Any]]]:
        ready = {key.data for key, _ in self._selector.select(timeout=min(1.0, self.silence / 4))}
        for worker in [w for w in self._all if w.name is not None]:
            answers = worker.read() if worker in ready else []
            if worker.dead:
                answers.append({"failed": worker.epitaph()})
            elif not answers and time.monotonic() - worker.heard > self.silence:
                answers.append({"failed": f"gave no frame for {self.silence:g} seconds"})
                worker.dead = True
            for answer in answers:
                if worker.dead:
                    self._selector.unregister(worker.process.stdout)
                    self._all.remove(worker)
                    worker.end()
                else:
                    self._idle.append(worker)
                yield worker, answer


class _Worker:
    """One process and what is known of its job."""

    def __init__(self) -> None:
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, "PYTHONPATH": path},
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self.name: str | None = None
        self.heard = time.monotonic()
        self.dead = False
        self._rest = b""

    def give(self, name: str, job: dict[str, Any]) -> None:
        self.name, self.heard = name, time.monotonic()
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died between two jobs: read() finds the end of its output and says so

    def read(self) -> list[dict[str, Any]]:
        """Results that came (at most one); beats only count as a sign of life."""
        answers = []
        while chunk := self._chunk():
            self.heard = time.monotonic()
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


def _answer(job: dict[str, Any], beat: Beat) -> dict[str, Any]:
    from data.scan import scan, scan_member
    from data.scores import score

    work = {"scan": scan, "scan_member": scan_member, "score": score}[job.pop("do")]
    try:
        return {"result": work(**job, beat=beat)}
    # What libraries raise over damaged files; anything else is a bug of ours and ends the process.
    except (UserError, OSError, ValueError, OverflowError, MemoryError, EOFError) as error:
        text = str(error).strip() or type(error).__name__
        return {"full": text} if full_disk(error) else {"failed": text}


def main() -> None:
    # Whatever a library prints must not mix with the answers.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    last = 0.0

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_PER_BEAT:
            last = time.monotonic()
            print("null", file=out, flush=True)

    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), beat)), file=out, flush=True)


if __name__ == "__main__":
    main()
