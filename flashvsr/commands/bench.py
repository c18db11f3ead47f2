"""`python -m flashvsr bench WHAT`: how fast this machine is, beside what it could be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from flashvsr.base.cli import UserError
from flashvsr.base.files import atomic

if TYPE_CHECKING:
    import torch

    from flashvsr.bench.models import Subject
    from flashvsr.bench.report import Report
    from flashvsr.weights.folder import FlashVSR

DTYPES = ("float32", "bfloat16", "float16")
WHAT = {
    "attention": "every usable backend beside dense attention, forward and backward",
    "dit": "one streaming step of the transformer, and a block's parts",
    "projector": "LR Proj-In on eight frames, and its convolutions in every way",
    "decoder": "TC decoder and VAE decoder on two latents",
    "pipeline": "a whole stream: frames per second and time per part",
    "tiling": "the same clip untiled and in tiles: how far apart, time, memory",
    "overlap": "a file into a file: what reading, decoding and writing beside the model save",
    "memory": "memory over time while a file is upscaled, and how much it grows after 100 frames",
    "gpu": "all of it, and the pipeline's switches one at a time: one call for a lent GPU",
}
REPEATS = {"attention": 5, "decoder": 2, "gpu": 5, "tiling": 1, "overlap": 3}
GPU_SIZES = ((768, 1408), (1152, 1920), (1536, 2560))  # the second is 1080p, padded


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m flashvsr bench",
        description="Measure speed, useful work and memory, with random weights, on this machine.",
    )
    commands = p.add_subparsers(dest="what", required=True, metavar="WHAT")
    made = {name: commands.add_parser(name, help=text, description=text) for name, text in WHAT.items()}
    for name, sub in made.items():
        sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
        sub.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")
        sub.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here as well")
        few = REPEATS.get(name, 3)
        if name != "memory":
            sub.add_argument("--repeats", type=int, default=few, help="median of so many runs (%(default)s)")
        if name != "attention":
            sub.add_argument("--scale", help="tiny, small or wan1.3b (default: small; wan1.3b on cuda)")
    a = made["attention"]
    a.add_argument("--tokens", type=int, default=4096, help="queries and keys (%(default)s)")
    a.add_argument("--density", type=float, default=0.2, help="share of pairs selected (%(default)s)")
    a.add_argument("--block", type=int, default=128, help="tokens in a block (%(default)s)")
    a.add_argument("--heads", type=int, default=4, help="%(default)s")
    a.add_argument("--head-dim", type=int, default=64, help="%(default)s")
    a.add_argument("--backends", metavar="A,B", help="only these (default: all usable but reference)")
    a.add_argument("--forward-only", action="store_true", help="no backward")
    for name in ("dit", "projector", "decoder", "pipeline"):
        made[name].add_argument("--size", metavar="HxW", help="of the output (default: by scale)")
    for name in ("dit", "pipeline"):
        made[name].add_argument("--attention", default="auto", help="backend (%(default)s)")
        made[name].add_argument("--profile", action="store_true", help="also: share of time by operation")
    t = made["tiling"]
    t.add_argument("--tiles", metavar="N,N", help="LR pixels (default: by scale; 192,160,128 of wan1.3b)")
    t.add_argument("--overlap", type=int, metavar="N", help="LR pixels (default: by scale; 24 of wan1.3b)")
    for name, frames in (("tiling", 33), ("overlap", 109), ("memory", None)):
        t = made[name]
        t.add_argument("--model", metavar="DIR", help="a model folder (default: random weights of --scale)")
        t.add_argument("--clip", metavar="FILE", help="video of LR frames (default: a moving picture)")
        t.add_argument("--size", metavar="HxW", help="of the moving picture's LR frames (default: by scale)")
        t.add_argument("--frames", type=int, default=frames, help="of the clip, at most (%(default)s)")
    for name in ("overlap", "memory"):
        made[name].add_argument("--times", type=float, default=4, help="how many times larger (%(default)s)")
    made["memory"].add_argument("--page", type=Path, metavar="FILE", help="write the curve here, as HTML")
    g = made["gpu"]
    g.add_argument("--size", metavar="HxW", action="append", help="of the output, may be given several times "
                   "(default: 768x1408, 1152x1920, 1536x2560)")  # fmt: skip
    g.add_argument("--minutes", type=float, default=9.0, help="start nothing new after this (%(default)s)")
    g.add_argument("--no-compile", action="store_true", help="leave out switches that compile")
    return p


def main(argv: list[str]) -> int:
    """Prints tables; exit code 1 when something usable did not run."""
    given = parser().parse_args(argv)
    for name in ("repeats", "tokens", "block", "heads", "head_dim", "minutes", "frames"):
        value = getattr(given, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
    if given.what == "gpu":
        return _campaign(given)
    report = _measure(given)
    print(report.table())
    if "shares" in report.extra:
        from flashvsr.bench.report import shares_text

        print(f"\nshare of one step's time\n{shares_text(report.extra['shares'], report.extra['others'])}")
    for name, reason in report.extra.get("not_usable", {}).items():
        print(f"not usable here: {name} ({reason})")
    failed = report.extra.get("failed", {})
    for name, error in failed.items():
        print(f"FAILED: {name} ({error})")
    _write(given.json, report.as_dict())
    return 1 if failed else 0


def _measure(given: argparse.Namespace) -> Report:
    if given.what == "attention":
        from flashvsr.bench import attention

        shape = attention.of_density(given.tokens, given.density, given.block, given.heads, given.head_dim)
        asked = given.backends.split(",") if given.backends else None
        device, dtype = _where(given)
        return attention.bench(
            shape, device, dtype, asked=asked, backward=not given.forward_only, repeats=given.repeats
        )
    if given.what == "tiling":
        return _tiling(given)
    if given.what in ("overlap", "memory"):
        return _files(given)
    subject = _subject(given, _size(given.size) if given.size else None)
    if given.what == "pipeline":
        from flashvsr.bench.pipeline import bench_pipeline

        return bench_pipeline(
            subject, attention=given.attention, repeats=given.repeats, profile=given.profile
        )
    from flashvsr.bench import modules

    if given.what == "dit":
        return modules.bench_dit(
            subject, attention=given.attention, repeats=given.repeats, profile=given.profile
        )
    bench = {"projector": modules.bench_projector, "decoder": modules.bench_decoder}[given.what]
    return bench(subject, repeats=given.repeats)


def _tiling(given: argparse.Namespace) -> Report:
    from itertools import islice

    import numpy as np

    from flashvsr.base.video_io import read_frames
    from flashvsr.bench.tiling import DEFAULTS, bench_tiling, moving_picture

    subject = _subject(given, None)
    size, tiles, overlap = DEFAULTS[subject.scale]
    model = _model(given, subject)
    if given.clip:
        frames = np.stack(list(islice(read_frames(given.clip), given.frames)))
    else:
        frames = moving_picture(given.frames, *(_size(given.size) if given.size else size))
    try:
        tiles = [int(tile) for tile in given.tiles.split(",")] if given.tiles else tiles
    except ValueError:
        raise UserError(f"--tiles {given.tiles} must be whole numbers of LR pixels, like 192,160") from None
    overlap = overlap if given.overlap is None else given.overlap
    facts = {"model": given.model or f"random {subject.scale}", "clip": given.clip or "moving picture"}
    return bench_tiling(model, frames, tiles, overlap=overlap, repeats=given.repeats, facts=facts)


def _model(given: argparse.Namespace, subject: Subject) -> FlashVSR:
    import flashvsr

    if given.model:
        return flashvsr.load(given.model, dtype=subject.dtype, device=subject.device)
    return subject.model("dit", "lr_projector", "tc_decoder")


def _files(given: argparse.Namespace) -> Report:
    import tempfile

    from flashvsr.base.cli import Progress
    from flashvsr.bench import files
    from flashvsr.bench.tiling import DEFAULTS, moving_picture

    subject = _subject(given, None)
    model, times = _model(given, subject), given.times if given.times % 1 else int(given.times)
    facts = {"model": given.model or f"random {subject.scale}", "times": times}
    with tempfile.TemporaryDirectory() as folder:
        clip = given.clip
        if clip is None:
            size = _size(given.size) if given.size else DEFAULTS[subject.scale][0]
            frames = moving_picture(given.frames or 3 * files.FIRST, *size)
            clip = files.write_clip(Path(folder) / "moving-picture.mp4", frames)
        if given.what == "overlap":
            return files.bench_overlap(
                model, clip, frames=given.frames, repeats=given.repeats, facts=facts, scale=times
            )
        with Progress(given.frames, "upscale", "frame") as progress:
            return files.bench_memory(
                model, clip, frames=given.frames, page=given.page, tell=progress.update, facts=facts,
                scale=times,
            )  # fmt: skip


def _campaign(given: argparse.Namespace) -> int:
    from flashvsr.bench import gpu

    sizes = [_size(text) for text in given.size] if given.size else list(GPU_SIZES)
    done = gpu.run(
        _subject(given, sizes[0]),
        sizes,
        minutes=given.minutes,
        repeats=given.repeats,
        compiling=not given.no_compile,
    )
    print("\n" + done.text())
    _write(given.json, done.as_dict())
    return 1 if done.missing else 0


def _where(given: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    import torch

    name = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device {name} cannot be used here: {reason}") from None
    return device, getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def _subject(given: argparse.Namespace, size: tuple[int, int] | None) -> Subject:
    from flashvsr.bench.models import SIZES, Subject

    device, dtype = _where(given)
    scale = given.scale or ("wan1.3b" if device.type == "cuda" else "small")
    return Subject(scale, size or SIZES.get(scale, (0, 0)), device, dtype)


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise UserError(f"--size {text!r} must be a height and a width, like 768x1408")
    return int(height), int(width)


def _write(path: Path | None, content: dict) -> None:
    if path is not None:
        with atomic(path) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")
