"""`python -m eval.study`: what each stage, loss and number of steps is worth, from videos to one table.

Trains a VAE, a teacher, a sparse student, one-step students by one loss, the other and both, and two TC
decoders; upscales held-out clips of fixed degradation with each; writes `results.md` and
`eval/report.html`. A training is a plain `python -m train` command (`--dry-run` prints them all): one that
is complete is not repeated, one that was stopped goes on. A run that differs from `base` in a late stage has
links to the earlier ones.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from eval.results import protocol_lines, read_evaluation, table
from eval.training_log import STAGES, read_run
from flashvsr.base.cli import UserError, run
from flashvsr.base.files import atomic

FOLDERS = {folder.removeprefix("stage"): folder for folder in STAGES}  # by stage, in the order of training
LOSSES = {
    "pixels": ("stage.loss.dmd=0",),
    "dmd": ("stage.loss.dmd=1", "stage.loss.mse=0", "stage.loss.lpips=0"),
    "both": (),
}
SEEDS = (0, 1)
RATIOS = ("1.0", "1.5", "2.0", "none")
# In the place of the demo's few steps; all together some two hours of one CPU core. No LPIPS: its backbone
# would be random. The TC decoder is not asked to follow a VAE that is far worse than what it can be.
TINY = {
    "vae": ("data.slots=160", "stage.lpips=0", "steps=5000", "optim.lr=1.2e-3", "optim.warmup=30"),
    "1": ("data.slots=160", "steps=1500", "validate_every=500"),
    "2": ("data.slots=160", "steps=400", "validate_every=200"),
    "3": ("data.slots=160", "stage.loss.lpips=0", "steps=240", "validate_every=60"),
    "decoder": (
        "data.slots=160", "stage.lpips=0", "stage.vae_mse=0", "stage.vae_lpips=0", "steps=600",
        "validate_every=200", "optim.lr=1e-4",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """One stage of a run. It starts when all of `after` (RUN/STAGE) are done; stages that it does not train
    itself are theirs. `{out}` in a setting is the folder of all runs."""

    run: str
    stage: str
    after: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.run}/{self.stage}"

    def command(self, scale: str, data: Path, out: Path) -> list[str]:
        settings = (TINY[self.stage] if scale == "tiny" else ()) + self.settings
        return [
            sys.executable, "-m", "train", f"stage={self.stage}", f"scale={scale}", f"run={self.run}",
            f"runs_dir={out}", f"data.shards={data}", f"seed={self.seed}",
            *(setting.format(out=out) for setting in settings),
        ]  # fmt: skip


TRAININGS = (
    Training("base", "vae"),
    Training("base", "1", ("base/vae",)),
    Training("base", "decoder", ("base/vae",)),
    Training("base", "2", ("base/1",)),
    *(
        Training(f"{loss}-{seed}", "3", ("base/2", "base/decoder"), settings, seed)
        for seed in SEEDS
        for loss, settings in LOSSES.items()
    ),
    Training(
        "both-0-own-latents", "decoder", ("both-0/3",),
        ("stage.latents=student", "init={out}/base/decoder/export", "steps=1200"),
    ),
    # At the scale's weight DMD's gradient is far below the pixels': here about as large.
    Training("balanced-0", "3", ("base/2", "base/decoder"), ("stage.loss.dmd=0.4",)),
    # Made sick on purpose, for docs/reading-a-dmd-run.md.
    Training("frozen-fake-0", "3", ("base/2",), (*LOSSES["dmd"], "stage.fake_lr=0")),
    Training("fast-0", "3", ("base/2",), ("optim.lr=2e-3",)),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A method of the table: the run whose stages lie behind it, up to `stage`, and its setting."""

    name: str
    run: str | None
    stage: str
    setting: str

    def spec(self, out: Path) -> str:
        if self.run is None:
            return f"{self.name}={self.setting}"
        folder = out / self.run / ("export" if self.stage == "decoder" else f"{FOLDERS[self.stage]}/export")
        return f"{self.name}={folder},{self.setting}"


ROWS = (
    Row("bicubic", None, "", "bicubic"),
    *(Row(f"teacher-{n}", "base", "1", f"steps={n}") for n in (1, 4, 20)),
    Row("sparse-20", "base", "2", "steps=20"),
    *(Row(f"{loss}-{seed}", f"{loss}-{seed}", "3", "decoder=vae") for seed in SEEDS for loss in LOSSES),
    Row("balanced-0", "balanced-0", "3", "decoder=vae"),
    *(Row(f"both-0-ratio-{r}", "both-0", "3", f"decoder=vae,sparse_ratio={r}") for r in RATIOS),
    Row("both-0-TC", "both-0", "decoder", "decoder=tc"),
    Row("both-0-TC-own-latents", "both-0-own-latents", "decoder", "decoder=tc"),
)


def main(argv: list[str]) -> None:
    """Train what is missing, evaluate everything that is there, write the table."""
    parser = argparse.ArgumentParser(prog="python -m eval.study", description=main.__doc__)
    add = parser.add_argument
    add("--videos", required=True, help="high-resolution videos to train on")
    add("--val", required=True, help="held-out ones: never trained on, all rows are judged on them")
    add("--out", required=True, help="folder of the runs; the same command goes on in it")
    add("--scale", default="tiny", help="tiny (two CPU cores, hours), small (a GPU) (default: %(default)s)")
    add("--size", default="192x192", help="of the held-out clips (default: %(default)s)")
    add("--workers", type=int, default=1, help="trainings and evaluations at a time (default: %(default)s)")
    add("--only", help="these trainings, RUN/STAGE,...; rows without theirs stay empty")
    add("--dry-run", action="store_true", help="print the trainings' commands")
    a = parser.parse_args(argv)
    out, data = Path(a.out), Path(a.out) / "data"
    known = [t.name for t in TRAININGS]
    only = known if a.only is None else a.only.split(",")
    if unknown := sorted(set(only) - set(known)):
        raise UserError(f"--only {unknown[0]!r}: there are {', '.join(known)}")
    if a.workers < 1:
        raise UserError(f"--workers must be at least 1, got {a.workers}")
    chosen = [t for t in TRAININGS if t.name in only]
    if a.dry_run:
        for training in chosen:
            print(shlex.join(["python", *training.command(a.scale, data, out)[1:]]))
        return

    python, held_out = [sys.executable, "-m"], out / "eval-set"
    call([*python, "data", "build", a.videos, "--val", a.val, "--out", str(data)])
    set_of = ["--preset", "realbasicvsr", "--seed", "0", "--frames", "37", "--size", a.size]
    short_side = a.size.partition("x")[0]
    call([*python, "eval", "prepare", str(data), str(held_out), *set_of, "--short-side", short_side])
    train_all(chosen, a.scale, data, out, a.workers)
    rows = [row for row in ROWS if row.run is None or made(row, out)]
    for row in rows:
        if row.stage == "decoder":
            call([*python, "flashvsr", "export", str(out / row.run)])
    methods = [part for row in rows for part in ("--method", row.spec(out))]
    judged = ["--data", str(held_out), "--out", str(out / "eval"), "--workers", str(a.workers)]
    call([*python, "eval", *methods, *judged])
    write_table(out)
    print(out / "results.md")


def call(command: Sequence[str], log: Path | None = None) -> None:
    """Run a command, its output on the terminal or in `log`; UserError when it fails."""
    with nullcontext() if log is None else open(log, "a") as sink:
        code = subprocess.run(command, stdout=sink, stderr=sink).returncode
    if code:
        raise UserError(f"`{shlex.join(command)}` ended with code {code}" + (f"; see {log}" if log else ""))


def train_all(chosen: Sequence[Training], scale: str, data: Path, out: Path, workers: int) -> None:
    """In order; with several workers those side by side that do not wait for another."""
    done: dict[str, Future] = {}

    def one(training: Training, before: Sequence[Future]) -> None:
        for future in before:
            future.result()
        link(training, out)
        log = None if workers == 1 else out / f"{training.run}-{FOLDERS[training.stage]}.log"
        where = "" if log is None else f", output in {log}"
        print(f"== {training.run}: stage {training.stage}{where}", flush=True)
        call(training.command(scale, data, out), log)

    with ThreadPoolExecutor(workers) as pool:
        for training in chosen:
            before = [done[name] for name in training.after if name in done]
            done[training.name] = pool.submit(one, training, before)
        for future in done.values():
            future.result()


def link(training: Training, out: Path) -> None:
    """What a run has of those it comes after: their stages, where it trains none itself, and all cached
    clips."""
    run = out / training.run
    own = {FOLDERS[t.stage] for t in TRAININGS if t.run == training.run}
    before = {name.partition("/")[0] for name in training.after} - {training.run}
    if not before:
        return
    run.mkdir(parents=True, exist_ok=True)
    stages = [p for other in before for p in (out / other).iterdir() if p.name in set(FOLDERS.values()) - own]
    caches = [p for kind in ("clips", "latents") for p in sorted(out.glob(f"*/{kind}-*"))]
    for path in (*stages, *caches):
        if not (run / path.name).exists():
            (run / path.name).symlink_to(os.path.relpath(path.resolve(), run))


def made(row: Row, out: Path) -> bool:
    return (out / row.run / FOLDERS[row.stage] / "export" / "flashvsr.json").is_file()


def write_table(out: Path) -> None:
    """`results.md`: every row with the seed and steps of its last stage and the minutes of all behind it;
    rows whose training is missing are empty."""
    evaluation = read_evaluation(out / "eval" / "eval.json")
    heads, scored = table(evaluation, evaluation["datasets"][0]["name"])
    cells = {name: [text for text, _ in own] for name, own in scored}
    lines = ["| " + " | ".join(["method", "seed", "steps", "minutes", *heads]) + " |"]
    lines.append("|" + "---|" * (4 + len(heads)))
    for row in ROWS:
        road = ("", "", "") if row.name not in cells or row.run is None else behind(row, out)
        lines.append("| " + " | ".join([row.name, *road, *cells.get(row.name, [""] * len(heads))]) + " |")
    with atomic(out / "results.md") as part:
        part.write_text("\n".join([*lines, "", *protocol_lines(evaluation), ""]), encoding="utf-8")


def behind(row: Row, out: Path) -> tuple[str, str, str]:
    """Seed and steps of the last stage, minutes of that and the earlier ones of its run; what it was given by
    `init` is not among them."""
    titles = list(STAGES.values())[: list(FOLDERS).index(row.stage) + 1]
    logs = {log.title: log for log in read_run(out / row.run)[0] if log.title in titles}
    seed = next(t.seed for t in TRAININGS if t.run == row.run)
    minutes = sum(log.minutes or 0 for log in logs.values())
    return str(seed), str(logs[titles[-1]].steps), f"{minutes:.1f}"


if __name__ == "__main__":
    run(main)
