"""`python -m flashvsr upscale IN OUT --model DIR`: a video, a folder of frames or an image."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from flashvsr.base.cli import Progress, UserError
from flashvsr.base.files import atomic
from flashvsr.base.stills import is_image
from flashvsr.base.video_io import VideoWriter, probe, read_frames
from flashvsr.streaming import pipeline

DTYPES = ("float32", "bfloat16", "float16")


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = f"{kind.__name__} or none"
    return convert


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m flashvsr upscale",
        description="Upscale a video, a folder of frames or an image with a model folder.",
    )
    p.add_argument("source", metavar="IN", help="video file, folder of frames, or image")
    p.add_argument("out", metavar="OUT", help=".mp4, .mkv or .mov, an image for an image, else a PNG folder")
    p.add_argument("--model", required=True, metavar="DIR", help="model folder: an export or a release")
    p.add_argument("--scale", type=int, help="how many times larger (default: 4)")
    p.add_argument("--decoder", choices=("auto", "tc", "vae"), help="default: tc where the model has one")
    p.add_argument("--color-fix", choices=("adain", "wavelet", "none"), help="default: adain")
    p.add_argument("--seed", type=int, help="seed of the noise (default: 0)")
    p.add_argument("--attention", help="attention backend (default: auto)")
    p.add_argument(
        "--sparse-ratio", type=_or_none(float), help="share of blocks attended to, none for all (default: "
        "as trained)",
    )  # fmt: skip
    p.add_argument("--kv-chunks", type=int, help="one-step models: past chunks remembered (default: 3)")
    p.add_argument(
        "--local-range", type=_or_none(int), help="one-step models: block rows and columns a block sees, "
        "none for all (default: 11)",
    )  # fmt: skip
    p.add_argument("--steps", type=int, help="teachers and sparse students: sampler steps (default: theirs)")
    p.add_argument(
        "--lr-projector", default="auto", choices=("auto", "v1", "v1.1"), help="of a release folder whose "
        "name does not say it",
    )  # fmt: skip
    p.add_argument(
        "--compile", action="store_const", const=True, help="one-step models: compile the blocks; faster "
        "after a slow start",
    )  # fmt: skip
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights (default: bfloat16 on cuda, else float32)")
    p.add_argument(
        "--crf", type=float, default=15, help="quality of the video, lower is better (%(default)s)"
    )
    p.add_argument("--force", action="store_true", help="replace OUT if it exists")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return p


SETTINGS = (
    "scale", "decoder", "color_fix", "seed", "attention", "sparse_ratio", "kv_chunks", "local_range", "steps",
    "compile",
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Parses, upscales, writes. Only settings that were given reach the method: others are its own."""
    given = parser().parse_args(argv, argparse.Namespace(sparse_ratio=..., local_range=...))
    _check_paths(Path(given.source), given.out, given.force)
    settings = {name: getattr(given, name) for name in SETTINGS if getattr(given, name) not in (None, ...)}
    for name in ("sparse_ratio", "local_range"):  # there, None means: all
        if getattr(given, name) is None:
            settings[name] = None
    info = probe(given.source)
    with ExitStack() as stack:
        method = _open_method(given, settings, stack)
        height, width = info.height * method.output.scale, info.width * method.output.scale
        if not given.quiet:
            print(f"{given.model}: " + ", ".join(f"{k} {v}" for k, v in method.in_use.items()))
            print(f"{given.source}: {info.width}x{info.height} -> {given.out}: {width}x{height}")
            if info.has_audio:
                print(f"{given.source}: its sound is not copied")
        sink = stack.enter_context(_sink(given.out, info.fps, height, width, given.crf))
        progress = stack.enter_context(Progress(info.frames, "upscale", "frame", given.quiet))
        times = pipeline.run(method, read_frames(given.source), sink.write, on_frames=progress.update)
    if not given.quiet:
        each = times.total / max(times.frames, 1)
        print(f"{given.out}: {times.frames} frames in {times.total:.1f} s, {each:.3f} s per frame")


def _open_method(given: argparse.Namespace, settings: dict[str, Any], stack: ExitStack) -> Any:
    import torch

    import flashvsr
    from flashvsr.weights.folder import say

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = given.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {given.device}: {str(error).splitlines()[0]}") from None
    model = flashvsr.load(
        given.model,
        dtype=getattr(torch, dtype),
        device=device,
        lr_projector=given.lr_projector,
        note=(lambda sentence: None) if given.quiet else say,
    )
    if model.info.kind in ("teacher", "sparse"):
        settings = settings | {"on_step": _sampling_bar(stack, given.quiet)}
    return flashvsr.method(model, **settings)


def _sampling_bar(stack: ExitStack, quiet: bool) -> Callable[[int, int], None]:
    """A bar of its own for whole-clip methods, whose frames come all at once at the end."""
    bars: list[Progress] = []

    def on_step(done: int, total: int) -> None:
        if not bars:
            bars.append(stack.enter_context(Progress(total, "sample and decode", "step", quiet)))
        bars[0].update()

    return on_step


def _check_paths(source: Path, out: str, force: bool) -> None:
    path = Path(out)
    if not source.exists():
        raise UserError(f"{source} does not exist; check the path")
    if path.exists() and path.resolve() == source.resolve():
        raise UserError(f"{out} is the input itself; choose another output")
    if is_image(path) and not is_image(source):
        raise UserError(f"{out} is one image, {source} is not; give a video or a folder as OUT")
    full = any(path.iterdir()) if path.is_dir() else path.exists()
    if full and not force:
        raise UserError(f"{out} already exists; --force replaces it")


class _Image:
    """Writes the one frame of an image."""

    def __init__(self, path: str):
        self.path = Path(path)

    def __enter__(self) -> _Image:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, frames: np.ndarray) -> None:
        from PIL import Image

        with atomic(self.path) as part:
            Image.fromarray(frames[0]).save(part)


def _sink(out: str, fps: Any, height: int, width: int, crf: float) -> VideoWriter | _Image:
    return _Image(out) if is_image(out) else VideoWriter(out, fps, height, width, crf=crf)
