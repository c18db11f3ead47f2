"""Kills trainings at random moments and resumes them: does the run end as if nobody had killed it?

    python -m tests.train.kill --stages vae 1 2 3 decoder --kills 20 --processes 1 2 1+2 --out table.json

Per stage one run is left alone; others are killed with SIGKILL again and again, resumed, and compared with
it. On 1 or 2 processes every file of their checkpoints and of the model they leave must be equal, and
metrics.jsonl line by line but for its timings. `1+2` changes the number of processes at every resume and with
it the order of sums: losses and norms are then compared to 1e-5. Any key=value goes to the trainings.

The models are microscopic. Ranks are forked from this process, which has imported everything: a start takes a
second instead of several, and what a killed process leaves behind is the same. The moments are drawn from
--seed, in turn: inside a save (its unfinished folder is there), inside a step, anywhere from start to end.
The table comes last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import train.stages.decoder
import train.stages.one_step
import train.stages.sparse_causal
import train.stages.teacher
import train.stages.vae  # noqa: F401  (stages are imported when used; here once, before the forks)
from data import build
from flashvsr.base import cli
from flashvsr.base.files import read_json, sha256, write_json
from flashvsr.config import PRESETS, DiTConfig, ModelConfig, ProjectorConfig, TCDecoderConfig, VAEConfig
from train import checkpoint, loop
from train.config import NUMBERS, STAGES, TrainConfig, compose
from train.launch import init_group, teardown
from train.telemetry import METRICS

SIZES = ModelConfig(
    dit=DiTConfig(dim=24, ffn=48, layers=2, heads=2, freq_dim=16, text_dim=8, text_len=2, block=(2, 2, 2)),
    lr_projector=ProjectorConfig(hidden1=8, hidden2=8, out_dim=24),
    vae=VAEConfig(dim=4),
    tc_decoder=TCDecoderConfig(channels=(16, 16, 8, 8)),
)
MICRO = [
    "run=micro", "scale.preset=micro", "data.height=32", "data.width=32", "data.latents_per_clip=4",
    "data.slots=4", "data.val_slots=1", "data.short_side=48", "data.workers=0", "scale.train.vae.crop=32",
    "scale.train.vae.latents=2", "scale.train.one_step.student_every=2", "global_batch_size=2",
    "micro_batch_size=1", "save_every=2", "validate_every=8", "optim.warmup=2", "optim.ema=0.9",
    "log.quiet=true", "device=cpu",
]  # fmt: skip
MOMENTS = ("save", "step", "any")
KILLS_PER_SAVE = 5  # at least one of so many must hit a save: where too few did, the next are aimed at one
COMPARED = ("loss/", "grad_norm/", "term_grad/", "val/", "bicubic/")  # and step, stage, kind, counter, lr
CLOSE = 1e-5  # of numbers whose sums were made in another order
START_SECONDS, SAVE_SECONDS = 1.0, 0.03  # about as long as the microscopic models take
LIMIT = 300.0  # seconds, after which an attempt is taken to hang


@dataclass
class Row:
    """What came of one stage on so many processes."""

    stage: str
    processes: str
    kills: int = 0
    inside_saves: int = 0
    resumes: int = 0
    runs: int = 0  # killed and brought to their end
    equal: bool = True
    seconds: float = 0.0
    difference: str = ""  # the first one


class Ranks:
    """The processes of one training, forked here; what they print goes to `log`."""

    def __init__(self, config: TrainConfig, processes: int, log: Path):
        port = _free_port()
        self.log, self.codes, self.give_up = log, {}, time.monotonic() + LIMIT
        self.pids = [_fork(lambda r=r: _rank(config, r, processes, port), log) for r in range(processes)]

    def running(self) -> bool:
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > self.give_up:
            self.kill(random.Random(0))
            raise RuntimeError(f"still running after {LIMIT:.0f} s; see {self.log}")
        return len(self.codes) < len(self.pids)

    def wait(self, until: Callable[[], bool] = lambda: False, seconds: float = math.inf) -> None:
        """Until something is so, or so long, or all have ended."""
        end = time.monotonic() + seconds
        while self.running() and not until() and time.monotonic() < end:
            time.sleep(0.001)

    def kill(self, rng: random.Random) -> bool:
        """One after the other, soon; whether any was still there."""
        left = [pid for pid in self.pids if pid not in self.codes]
        rng.shuffle(left)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            time.sleep(rng.choice((0.0, 0.05)) * rng.random())
        return -signal.SIGKILL in self.codes.values()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(config: TrainConfig, rank: int, processes: int, port: int) -> int:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")
    world = init_group("cpu")
    try:
        return loop.run(config, world)
    finally:
        teardown()


def _fork(work: Callable[[], int], log: Path) -> int:
    """The id of a new process that does `work` and exits with what it returns, 1 after an error."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = work()
    except BaseException:  # whatever it is, this copy of the caller ends here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Campaign:
    """All trainings of one call: shards once, the runs that are left alone once per number of processes."""

    def __init__(self, folder: Path, steps: int, overrides: Sequence[str], seed: int):
        PRESETS["micro"] = SIZES
        self.folder, self.steps, self.seed = folder, steps, seed
        given = [*MICRO, f"steps={steps}", f"data.shards={folder}/data", *overrides]
        self.configs = {name: compose(name, given) for name in STAGES}
        self.alone: dict[tuple[str, int], float] = {}  # seconds of a step of the run that was left alone

    def build(self) -> None:
        log = self.folder / "build.log"
        pid = _fork(lambda: build.build([], self.folder / "data", synthetic_clips=3, quiet=True) and 0, log)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(f"no shards; see {log}")

    def config(self, stage: str, runs: Path) -> TrainConfig:
        return replace(self.configs[stage], runs_dir=str(runs))

    def leave_alone(self, stage: str, processes: int) -> Path:
        """A run of this stage, and of those before it, that nobody kills; where it lies."""
        runs = self.folder / f"alone-{processes}"
        runs.mkdir(exist_ok=True)
        for name in list(STAGES)[: list(STAGES).index(stage) + 1]:
            if (name, processes) not in self.alone:
                config = self.config(name, runs)
                self.finish(Ranks(config, processes, runs / f"{name}.log"))
                seconds = [line["seconds"] for line in _lines(config.stage_dir) if line["kind"] == "train"]
                self.alone[name, processes] = sum(seconds) / len(seconds)
        return runs / "micro"

    def finish(self, ranks: Ranks) -> None:
        ranks.wait()
        if any(ranks.codes.values()):
            tail = ranks.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"exit codes {list(ranks.codes.values())}; {ranks.log} ends with\n{tail}")

    def run(self, stage: str, processes: str, kills: int, progress: cli.Progress) -> Row:
        """Kills `kills` times, in as many runs as that takes, and compares each with the one left alone."""
        begin, row = time.monotonic(), Row(STAGES[stage], processes)
        sizes = [int(n) for n in processes.split("+")]
        rng = random.Random(f"{self.seed} {stage} {processes}")
        tries = rng.randrange(len(MOMENTS))  # a moment that was missed is not tried twice
        alone = self.leave_alone(stage, sizes[0])
        if len(sizes) > 1:
            kills = max(kills, 2)  # there and back
        while row.kills < kills:
            runs = self.folder / f"killed-{stage}-{processes}-{row.runs}"
            (runs / "micro").mkdir(parents=True)
            for path in alone.iterdir():
                if path.name != STAGES[stage]:
                    (runs / "micro" / path.name).symlink_to(path)
            config, attempts = self.config(stage, runs), 0
            while True:
                size = sizes[attempts % len(sizes)]
                done = _last_saved(config.stage_dir)
                row.resumes += done > 0
                attempts += 1
                left = _unfinished(config.stage_dir)
                ranks = Ranks(config, size, runs / "log")
                missed = row.inside_saves < row.kills // KILLS_PER_SAVE
                if row.kills == kills or (missed and done == self.steps):  # there is no save left in this run
                    self.finish(ranks)
                    break
                if len(sizes) > 1:  # what these processes saved the others are to go on from
                    ranks.wait(lambda f=config.stage_dir, d=done: _last_saved(f) > d)
                else:
                    self.await_moment(ranks, config, done, "save" if missed else MOMENTS[tries % 3], rng)
                tries += 1
                if not ranks.kill(rng):
                    self.finish(ranks)
                    break
                row.kills += 1
                row.inside_saves += bool(_unfinished(config.stage_dir) - left)
                progress.update()
            row.runs += 1
            found = differences(alone / STAGES[stage], config.stage_dir, exact=len(sizes) == 1)
            if found:
                row.equal, row.difference = False, row.difference or found[0]
            else:
                shutil.rmtree(runs)
        row.seconds = round(time.monotonic() - begin, 1)
        return row

    def await_moment(
        self, ranks: Ranks, config: TrainConfig, done: int, moment: str, rng: random.Random
    ) -> None:
        """Waits for the moment to kill at; `done` steps are restored. Returns early if the ranks end."""
        step_seconds = self.alone[config.stage.name, len(ranks.pids)]
        if moment == "any" or done == self.steps:  # killed while it exported
            ranks.wait(seconds=rng.random() * (START_SECONDS + (self.steps - done) * step_seconds))
            return
        target = rng.randint(max(done, 1), self.steps - 1)
        ranks.wait(lambda: _last_step(config.stage_dir) <= done)  # what came after is cut on resume
        ranks.wait(lambda: _last_step(config.stage_dir) >= target)
        if moment == "save":
            left = _unfinished(config.stage_dir)  # by kills before this one; the next save removes it
            ranks.wait(lambda: bool(_unfinished(config.stage_dir) - left))
            ranks.wait(seconds=rng.random() ** 3 * SAVE_SECONDS)
        else:
            ranks.wait(seconds=rng.random() * step_seconds)


def _lines(folder: Path) -> list[dict]:
    path = folder / METRICS
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _unfinished(folder: Path) -> set[str]:
    """Checkpoints being written or removed."""
    return {path.name for path in folder.glob("checkpoints/.step-*.part")}


def _last_saved(folder: Path) -> int:
    names = [path.name for path in folder.glob("checkpoints/step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def _last_step(folder: Path) -> int:
    return max((line["step"] for line in _lines(folder)), default=0)


def differences(alone: Path, killed: Path, exact: bool) -> list[str]:
    """What is not as in the run that was left alone: files of checkpoints, model and pictures, numbers."""
    a, b = ({path.name for path in (run / "checkpoints").iterdir()} for run in (alone, killed))
    found = [f"checkpoints/{name} is in one run only" for name in sorted(a ^ b)]  # unfinished ones too
    for name in sorted(a & b):
        one, other = (read_json(run / "checkpoints" / name / checkpoint.STATE) for run in (alone, killed))
        found += [f"{key} of {name}" for key in ("step", "counter", "corpus") if one[key] != other[key]]
    for folder in ("checkpoints", "export", "samples") if exact else ():
        a, b = (_hashes(run / folder) for run in (alone, killed))
        found += [f"{folder}/{name} is in one run only" for name in sorted(a.keys() ^ b.keys())]
        found += [f"{folder}/{name} differs" for name in sorted(a.keys() & b.keys()) if a[name] != b[name]]
    first, second = _lines(alone), _lines(killed)
    if len(first) != len(second):
        found.append(f"{len(second)} lines of metrics instead of {len(first)}")
    for one, other in zip(first, second, strict=False):
        a, b = _numbers(one), _numbers(other)
        for key in sorted(a.keys() | b.keys()):
            if not _same(a.get(key), b.get(key), exact):
                found.append(f"{key} at step {one['step']}: {b.get(key)} instead of {a.get(key)}")
    return found


def _hashes(folder: Path) -> dict[str, str]:
    """Of all files but those that say where the run lies, and hidden ones that a kill left unfinished."""
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in (checkpoint.STATE, checkpoint.MANIFEST)
        and ".part" not in str(path.relative_to(folder))
    }


def _numbers(line: Mapping) -> dict:
    exact = ("step", "stage", "kind", "counter", "lr")
    return {key: value for key, value in line.items() if key in exact or key.startswith(COMPARED)}


def _same(a: object, b: object, exact: bool) -> bool:
    if exact or not (isinstance(a, float) and isinstance(b, float)):
        return a == b
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=1e-9)


def table(rows: Sequence[Row]) -> str:
    head = ("stage", "processes", "kills", "inside a save", "resumes", "runs", "equal", "seconds")
    body = [
        (
            r.stage,
            r.processes,
            r.kills,
            r.inside_saves,
            r.resumes,
            r.runs,
            "yes" if r.equal else "NO",
            r.seconds,
        )
        for r in rows
    ]
    cells = [head, *[tuple(map(str, line)) for line in body]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.train.kill", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stages", nargs="+", default=["all"], choices=["all", "vae", "1", "2", "3", "decoder"]
    )
    parser.add_argument("--kills", type=int, default=20, help="per stage (default: 20)")
    parser.add_argument("--processes", nargs="+", default=["1"], choices=["1", "2", "1+2"])
    parser.add_argument("--steps", type=int, default=8, help="of every training (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", type=Path, help="the table as JSON")
    parser.add_argument("overrides", nargs="*", help="key=value of the trainings")
    args = parser.parse_intermixed_args(argv)
    torch.set_num_threads(1)
    names = list(STAGES) if "all" in args.stages else [NUMBERS.get(s, s) for s in args.stages]
    rows: list[Row] = []
    total = args.kills * len(names) * len(args.processes)
    with (
        tempfile.TemporaryDirectory(prefix="kill-") as folder,
        cli.Progress(total, "kills", "kill") as progress,
    ):
        campaign = Campaign(Path(folder), args.steps, args.overrides, args.seed)
        campaign.build()
        for processes in args.processes:
            for name in names:
                rows.append(campaign.run(name, processes, args.kills, progress))
                if args.out:
                    write_json(args.out, [asdict(row) for row in rows])
    print(table(rows))
    for row in rows:
        if row.difference:
            print(f"{row.stage} on {row.processes}: {row.difference}", file=sys.stderr)
    return 0 if all(row.equal for row in rows) else 1


if __name__ == "__main__":
    cli.run(main)
