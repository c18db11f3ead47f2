"""Golden loss curves: 50 steps of every stage in miniature, compared with those kept in tests/data/curves.

    python -m tests.curves [--stages vae,teacher,...] [--refresh]

A change that was not meant to touch training leaves them as they are; one that was meant to refreshes them,
and the reviewer reads the difference. A stage starts from those before it, so a refresh covers every stage
after the first one named. Clips come from a formula and nothing is degraded, so that other
machines differ by rounding alone. Exit code 1 when a curve is off.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from flashvsr.base.cli import UserError, run
from flashvsr.base.resize import bicubic_8bit
from flashvsr.base.video_io import VideoWriter
from train import loop
from train.config import STAGES, compose
from train.launch import World

CURVES = Path(__file__).parent / "data" / "curves"
STEPS = 50
ORDER = ("vae", "teacher", "sparse_causal", "one_step", "decoder")
KEPT = ("loss/", "grad_norm/")
SETTINGS = [
    f"steps={STEPS}", "save_every=50", "validate_every=50", "data.height=64", "data.width=64",
    "data.latents_per_clip=8", "data.slots=4", "data.val_slots=1", "data.short_side=null", "data.workers=0",
    "data.images=0", "data.flip=false", "scale.train.vae.crop=32", "optim.warmup=5", "log.quiet=true",
    "device=cpu",
]  # fmt: skip

# Rounding grows along a curve: by how much another CPU may differ, of the value and of the curve's first.
RELATIVE, OF_FIRST = 0.02, 0.002


def clip(number: int, frames: int = 33, side: int = 64) -> np.ndarray:
    """A moving pattern of stripes and tiles by formula, uint8 `F H W 3`."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(side), np.arange(side), indexing="ij")
    angle = 0.7 * number
    u = x * np.cos(angle) + y * np.sin(angle) + (1 + 0.5 * number) * t
    v = y * np.cos(angle) - x * np.sin(angle) - 0.5 * t
    channels = [
        np.sin(u / (2.5 + number)) + np.sin(v / 5),
        np.sign(np.sin(u / 6) * np.sin(v / (6 + number))),
        np.sin(v / 3 + number) * np.cos(u / 9),
    ]
    return np.stack([np.rint(127.5 + 60 * c) for c in channels], -1).clip(0, 255).astype(np.uint8)


def write_pairs(folder: Path) -> None:
    """HR and bicubic LR frames: four clips to train on, one held out."""
    for number in range(5):
        hr = clip(number)
        lr = bicubic_8bit(torch.from_numpy(hr).permute(3, 0, 1, 2), (16, 16)).permute(1, 2, 3, 0).numpy()
        place = folder if number < 4 else folder / "val"
        for side, frames in (("HR", hr), ("LR", lr)):
            with VideoWriter(f"{place / side / f'clip-{number}'}/", 25, *frames.shape[1:3]) as writer:
                writer.write(frames)


def train(stage: str, folder: Path) -> list[dict[str, float]]:
    """The stage's 50 steps: loss terms and gradient norms of each."""
    config = compose(
        stage, [f"runs_dir={folder}", "run=curves", f"data.shards={folder / 'pairs'}", *SETTINGS]
    )
    loop.run(config, World(0, 1, 0, torch.device("cpu")))
    lines = (folder / "curves" / STAGES[stage] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [
        {key: value for key, value in record.items() if key.startswith(KEPT)}
        for record in records
        if record["kind"] == "train"
    ]


def to_text(stage: str, curve: list[dict[str, float]]) -> str:
    """One line a step; a dash where a term was not computed."""
    names = sorted({name for record in curve for name in record})
    lines = [f"# {stage}, {STEPS} steps, torch {torch.__version__}: python -m tests.curves --refresh"]
    lines.append(" ".join(["step", *names]))
    for step, record in enumerate(curve, 1):
        lines.append(" ".join([str(step), *(f"{record[n]:.7g}" if n in record else "-" for n in names)]))
    return "\n".join(lines) + "\n"


def from_text(text: str) -> list[dict[str, float]]:
    """The inverse of `to_text`."""
    head, *rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return [
        {name: float(cell) for name, cell in zip(head[1:], row[1:], strict=True) if cell != "-"}
        for row in rows
    ]


def deviation(kept: list[dict[str, float]], now: list[dict[str, float]]) -> tuple[float, str]:
    """The largest deviation in units of what is allowed, and where; infinite when other terms are there."""
    if [r.keys() for r in kept] != [r.keys() for r in now]:
        return float("inf"), "other terms or steps"
    first: dict[str, float] = {}
    worst, where = 0.0, "-"
    for step, (a, b) in enumerate(zip(kept, now, strict=True), 1):
        for name, value in a.items():
            scale = RELATIVE * abs(value) + OF_FIRST * first.setdefault(name, abs(value))
            off = abs(b[name] - value) / scale if scale else float(b[name] != value)
            if not off <= worst:  # also where a value is not a number
                worst, where = off, f"{name} at step {step}: {b[name]:.6g}, kept {value:.6g}"
    return worst, where


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.curves", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stages", default=",".join(ORDER), help="of %(default)s; each needs those before it"
    )
    parser.add_argument("--refresh", action="store_true", help="keep the curves of this code instead")
    given = parser.parse_args(argv)
    wanted = given.stages.split(",")
    if unknown := set(wanted) - set(ORDER):
        raise UserError(f"--stages: there is no stage {sorted(unknown)[0]!r}; there are {', '.join(ORDER)}")
    if given.refresh:
        wanted = list(ORDER[min(map(ORDER.index, wanted)) :])
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        write_pairs(Path(name) / "pairs")
        for stage in ORDER[: 1 + max(map(ORDER.index, wanted))]:
            curve, path = train(stage, Path(name)), CURVES / f"{stage}.txt"
            if stage not in wanted:
                continue
            if given.refresh:
                CURVES.mkdir(parents=True, exist_ok=True)
                path.write_text(to_text(stage, curve))
                print(f"{stage:14s} kept")
                continue
            if not path.is_file():
                raise UserError(f"{path} does not exist: python -m tests.curves --refresh makes it")
            worst, where = deviation(from_text(path.read_text()), curve)
            failed += worst > 1
            print(
                f"{stage:14s} {'ok  ' if worst <= 1 else 'FAIL'} {worst:8.4f} of the allowed; {where}",
                flush=True,
            )
    print("kept" if given.refresh else f"{len(wanted) - failed} of {len(wanted)} curves as they were")
    return int(failed > 0)


if __name__ == "__main__":
    run(main)
