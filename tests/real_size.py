"""`python -m tests.real_size`: what the paper's model costs on this machine, with random weights.

Builds the wan1.3b preset in bfloat16, writes it as a release folder (3.7 GB), then loads it, runs it for 25
LR frames at 128x128 output, exports and converts it. Every step is a process of its own, so that its peak of
memory is its own; a table is printed. Steps can be named; --dir keeps the files between calls.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import flashvsr
from flashvsr.base.cli import run
from flashvsr.base.measure import machine, peak_rss_bytes, time_median
from flashvsr.config import PRESETS
from flashvsr.models.prompt import random_prompt
from flashvsr.streaming.stream import Stream, StreamSettings, seeded_noise
from flashvsr.weights.convert import convert
from flashvsr.weights.export import export
from flashvsr.weights.folder import ModelInfo
from flashvsr.weights.load import MODULES
from flashvsr.weights.names import INFO_FILE

CONFIG = PRESETS["wan1.3b"]
RELEASE = "FlashVSR-v1.1"
HEIGHT = WIDTH = 128


def seconds(fn: Callable[[], Any]) -> float:
    """Of one call, without warming up."""
    return time_median(fn, repeats=1, warmup=0)


def anonymous_bytes() -> int:
    """Resident memory that is no page of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


@torch.no_grad()
def random_part(part: str) -> nn.Module:
    """A module of the paper's widths in bfloat16; variances stay near 1 on the way through."""
    with torch.device("meta"):
        module = MODULES[part](getattr(CONFIG, part))
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    for name, p in module.named_parameters():
        if p.ndim > 1 and p[0].numel() > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    if part == "vae":
        module.set_statistics(torch.tensor(CONFIG.vae.mean), torch.tensor(CONFIG.vae.std))
    return module


def step_save(place: Path) -> dict[str, float]:
    parts = {part: random_part(part) for part in MODULES}
    prompt = random_prompt(CONFIG.dit, 0).bfloat16()
    info = ModelInfo("one-step")
    where = place / RELEASE
    spent = seconds(lambda: flashvsr.save_model(where, config=CONFIG, info=info, prompt=prompt, **parts))
    (where / INFO_FILE).unlink()  # as the release is: known by names and shapes alone
    return {"seconds": spent}


def step_load(place: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    kept = []
    before = anonymous_bytes()
    spent = seconds(lambda: kept.append(flashvsr.load(place / RELEASE, dtype=dtype)))
    return {"seconds": spent, "resident": anonymous_bytes() - before}


def step_load_float32(place: Path) -> dict[str, float]:
    return step_load(place, torch.float32)


def step_upscale(place: Path) -> dict[str, float]:
    model = flashvsr.load(place / RELEASE, dtype=torch.bfloat16)
    stream = Stream(model.denoiser(), model.tc_decoder, StreamSettings(), seeded_noise(0))
    lr = torch.rand(1, 3, 33, HEIGHT, WIDTH) * 2 - 1
    out = []
    first = seconds(lambda: out.append(stream.step(lr[:, :, :25])))
    later = seconds(lambda: out.append(stream.step(lr[:, :, 25:])))
    assert [o.shape[2] for o in out] == [21, 8] and all(o.isfinite().all() for o in out)
    return {"seconds": first, "seconds_later": later}


def step_export(place: Path) -> dict[str, float]:
    model = flashvsr.load(place / RELEASE, dtype=None)
    stages = {"stage3": ("dit", "lr_projector", "prompt", "vae"), "decoder": ("tc_decoder",)}
    for stage, parts in stages.items():
        given = {part: getattr(model, part) for part in parts}
        flashvsr.save_model(place / "run" / stage / "export", config=model.config, info=model.info, **given)
    return {"seconds": seconds(lambda: export(place / "run", place / "exported"))}


def step_to_single(place: Path) -> dict[str, float]:
    return {"seconds": seconds(lambda: convert(place / RELEASE, place / "one.safetensors", "single"))}


def step_load_single(place: Path) -> dict[str, float]:
    before, kept = anonymous_bytes(), []
    spent = seconds(lambda: kept.append(flashvsr.load(place / "one.safetensors", dtype=torch.bfloat16)))
    return {"seconds": spent, "resident": anonymous_bytes() - before}


def step_to_diffusers(place: Path) -> dict[str, float]:
    return {"seconds": seconds(lambda: convert(place / "one.safetensors", place / "diffusers", "diffusers"))}


def step_to_release(place: Path) -> dict[str, float]:
    spent = seconds(lambda: convert(place / "diffusers", place / "back", "release"))
    first, last = (flashvsr.load(place / name, dtype=None) for name in (RELEASE, "back"))
    for part in MODULES:
        a, b = getattr(first, part).state_dict(), getattr(last, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a), part
    return {"seconds": spent}


STEPS: dict[str, tuple[Callable[[Path], dict[str, float]], str]] = {
    "save": (step_save, "save as a release folder, bfloat16"),
    "load": (step_load, "load the release folder, bfloat16"),
    "load-float32": (step_load_float32, "load the release folder as float32"),
    "upscale": (step_upscale, f"25 LR frames -> 21 at {WIDTH}x{HEIGHT}, bfloat16"),
    "export": (step_export, "export a run and compare outputs in float32"),
    "single": (step_to_single, "convert release -> single file, compared"),
    "load-single": (step_load_single, "load the single file"),
    "diffusers": (step_to_diffusers, "convert single file -> diffusers, compared"),
    "release": (step_to_release, "convert diffusers -> release, equal to the first"),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m tests.real_size", description=__doc__)
    p.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} (default: all, in order)")
    p.add_argument("--dir", type=Path, help="keep the files there (default: a temporary folder, removed)")
    p.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return p


def main(argv: list[str]) -> None:
    """Runs the steps, each in a process, and prints the table."""
    given = parser().parse_args(argv)
    names = given.steps or list(STEPS)
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise flashvsr.UserError(f"unknown step {unknown[0]!r}; there are {', '.join(STEPS)}")
    if given.inside:
        measured = STEPS[names[0]][0](given.dir)
        print(json.dumps(measured | {"peak": peak_rss_bytes()}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = given.dir or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        m = machine()
        print(f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, {m['date'][:10]}\n")
        print(
            f"| {'step':48s} | seconds | peak GB | loaded GB |\n|{'-' * 50}|--------:|--------:|----------:|"
        )
        for name in names:
            command = [sys.executable, "-m", "tests.real_size", name, "--dir", str(place), "--inside"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row(STEPS[name][1], json.loads(done.stdout.splitlines()[-1]))


def row(what: str, measured: dict[str, float]) -> None:
    """One line of the table; a second one for the later calls of a stream."""
    resident = f"{measured['resident'] / 1e9:9.2f}" if "resident" in measured else " " * 9
    peak = measured["peak"] / 1e9
    print(f"| {what:48s} | {measured['seconds']:7.2f} | {peak:7.2f} | {resident} |", flush=True)
    if "seconds_later" in measured:
        print(f"| {'  and each next 8 -> 8':48s} | {measured['seconds_later']:7.2f} | {'':7s} | {'':9s} |")


if __name__ == "__main__":
    run(main)
