"""`python -m flashvsr upscale IN... OUT --model DIR`: videos, folders of frames, images, a pipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from typing import Any

from flashvsr.base.cli import Progress, UserError
from flashvsr.base.footage import Footage, Moment
from flashvsr.commands import paths
from flashvsr.streaming.job import Done, Target, upscale

DTYPES = ("float32", "bfloat16", "float16")
PARTLY = 1  # the exit code when something could not be read to its end, or some of several inputs not at all


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = f"{kind.__name__} or none"
    return convert


def _auto_or(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return "auto" if text.lower() == "auto" else kind(text)

    convert.__name__ = f"auto or {kind.__name__}"
    return convert


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m flashvsr upscale",
        description="Upscale videos, folders of frames or images with a model folder.",
    )
    p.add_argument(
        "source", metavar="IN", nargs="+", help="video, folder of frames, image, 'pattern*', or - for a pipe "
        "(y4m, or raw RGB with --size); several go into the folder OUT",
    )  # fmt: skip
    p.add_argument(
        "out", metavar="OUT", help=".mp4, .mkv or .mov, an image for an image, - for raw RGB, else a folder"
    )
    p.add_argument("--model", required=True, metavar="DIR", help="model folder: an export or a release")
    _model_options(p.add_argument_group("how it is upscaled"))
    _file_options(p.add_argument_group("what is read and written"))
    p.add_argument(
        "--estimate", action="store_true", help="one-step models: print what memory and time it takes, from "
        "two calls of the model, and end",
    )  # fmt: skip
    p.add_argument("--benchmark", action="store_true", help="print where the time went")
    p.add_argument("--json", metavar="FILE", help="with --benchmark: write it there, too")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return p


def _model_options(p: Any) -> None:
    p.add_argument("--scale", type=_number, help="how many times larger, from 1 on (default: 4)")
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
    p.add_argument(
        "--local-boundary", choices=("truncated", "preserved"), help="at the border that window is cut, or "
        "shifted inside (default: truncated)",
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
    p.add_argument(
        "--tile", type=_auto_or(int), help="one-step models: cut the picture into tiles of as many LR "
        "pixels, or auto: as the memory allows",
    )  # fmt: skip
    p.add_argument("--overlap", type=int, help="LR pixels that tiles share at least (default: 24)")
    p.add_argument(
        "--memory",
        type=_auto_or(float),
        help="GiB of the device to take at most, or auto: "
        "0.9 of what is free (default: auto on cuda, else not looked at)",
    )
    p.add_argument(
        "--offload", action="store_const", const=True, help="keep on the device only the part at work"
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights (default: bfloat16 on cuda, else float32)")


def _file_options(p: Any) -> None:
    p.add_argument(
        "--start", type=_moment, metavar="T", help="begin there: 12.5 or 0:12.5 (seconds), or 300f"
    )
    p.add_argument("--end", type=_moment, metavar="T", help="end before there")
    p.add_argument(
        "--resume", action="store_true", help="one-step models: keep the state in OUT.resume/ and go on "
        "from there after a kill; the file is the same",
    )  # fmt: skip
    p.add_argument(
        "--codec",
        default="libx264",
        help="FFmpeg's encoder: libx264, libx265, ffv1 ... (default: %(default)s)",
    )
    p.add_argument("--crf", type=float, help="quality of the video, lower is better (default: 15)")
    p.add_argument("--10bit", dest="ten_bit", action="store_true", help="10 bits per colour")
    p.add_argument("--pix-fmt", help="FFmpeg's pixel format (default: yuv420p, yuv444p when a side is odd)")
    p.add_argument("--no-audio", dest="audio", action="store_false", help="do not copy the sound")
    p.add_argument("--size", type=_size, metavar="WxH", help="of the raw RGB frames that a pipe brings")
    p.add_argument("--fps", type=_rate, help="of images, folders and raw frames (default: 25)")
    p.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _moment(text: str) -> Moment:
    try:
        return Moment.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 640x360")
    return int(height), int(width)


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no frame rate; write 25 or 30000/1001")
    return rate


SETTINGS = (
    "scale", "decoder", "color_fix", "seed", "attention", "sparse_ratio", "kv_chunks", "local_range", "steps",
    "compile", "local_boundary", "tile", "overlap", "memory", "offload",
)  # fmt: skip


def parse(argv: list[str], p: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The command's arguments. In sparse_ratio and local_range None means all, `...` means not given."""
    return (p or parser()).parse_args(argv, argparse.Namespace(sparse_ratio=..., local_range=...))


def main(argv: list[str]) -> int | None:
    """Parses, upscales, writes.

    Returns 1 when an input could be read only partly, or one of several not at all.
    """
    given = parse(argv)
    jobs = paths.plan(given.source, given.out, given.force)
    for job in jobs:
        if job.reason:
            _say(given, job.reason)
    jobs = [job for job in jobs if not job.reason]
    if not jobs:
        return None
    _check(given, jobs)
    first = open_footage(given, jobs[0].source) if len(jobs) == 1 else None  # before the model: soon read
    with ExitStack() as stack:
        from flashvsr.weights.folder import say  # brings torch

        note = (lambda sentence: None) if given.quiet or given.out == "-" else say
        method = open_method(given, note, _sampling_bar(stack, given.quiet))
        _say(given, f"{given.model}: " + ", ".join(f"{k} {v}" for k, v in method.in_use.items()))
        if given.estimate:
            from flashvsr.bench.forecast import forecast

            print(forecast(method, first))
            return None
        if first is not None:
            return PARTLY if _one(given, method, first, jobs[0].out).missing else None
        return _several(given, method, jobs)


def _several(given: argparse.Namespace, method: Any, jobs: list[paths.Job]) -> int | None:
    """One after another; one that fails is named and the others are done all the same."""
    failed = 0
    for number, job in enumerate(jobs, 1):
        _say(given, f"{number} of {len(jobs)}")
        try:
            failed += bool(_one(given, method, open_footage(given, job.source), job.out).missing)
        except UserError as error:
            method.flush()  # what an input that failed has left in it
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    if failed:
        print(f"{failed} of {len(jobs)} inputs failed or are incomplete", file=sys.stderr)
    return PARTLY if failed else None


def _check(given: argparse.Namespace, jobs: list[paths.Job]) -> None:
    """Options that have no effect here are mistakes."""
    if given.size and jobs[0].source != "-":
        raise UserError("--size says what raw RGB from a pipe is; IN is not -")
    videos = [job for job in jobs if job.source != "-" and paths.is_video_file(job.source)]
    if given.fps and videos:
        raise UserError(f"--fps has no effect on {videos[0].source}, which has its own times")
    if given.json and not given.benchmark:
        raise UserError("--json says where --benchmark writes; give both")
    for name in ("benchmark", "estimate"):
        if getattr(given, name) and len(jobs) > 1:
            raise UserError(f"--{name} is of one input, not of {len(jobs)}")
    if given.benchmark and given.estimate:
        raise UserError("--estimate upscales nothing that --benchmark could measure; give one of them")
    for job in jobs:
        target_of(given, job.out)


def target_of(given: argparse.Namespace, out: str) -> Target:
    """Where and how `given` writes."""
    return Target(
        sys.stdout.buffer if out == "-" else out,
        codec=given.codec,
        crf=given.crf,
        ten_bit=given.ten_bit,
        pix_fmt=given.pix_fmt,
        audio=given.audio,
    )


def open_footage(given: argparse.Namespace, source: str) -> Footage:
    """What `given` cuts from an input."""
    return Footage(
        paths.Stdin() if source == "-" else source, given.start, given.end, fps=given.fps, raw=given.size
    )


def _one(given: argparse.Namespace, method: Any, footage: Footage, out: str) -> Done:
    target = target_of(given, out)
    height, width = method.output.size(footage.height, footage.width)
    how = f", {target.codec} {target.format_of(height, width)}" if target.is_video else ""
    name = "stdin" if hasattr(footage.source, "read") else footage.name
    _say(given, f"{name}: {footage.width}x{footage.height} -> {target.name}: {width}x{height}{how}")
    if target.is_pipe:
        _say(
            given,
            f"stdout: rgb24, for ffmpeg -f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {footage.fps}",
        )
    with Progress(footage.frames, "upscale", "frame", given.quiet) as progress:
        work = _resumable() if given.resume else upscale
        work = _benchmarked(given, method, work) if given.benchmark else work
        done = work(footage, method, (height, width), target, on_frames=progress.update)
    for what in done.dropped:
        _say(given, f"{name}: not copied: {what}")
    for what in done.missing:
        print(f"warning: {what}; what could be read is in {target.name}", file=sys.stderr)
    each = done.times.total / max(done.times.frames, 1)
    _say(
        given,
        f"{target.name}: {done.times.frames} frames in {done.times.total:.1f} s, {each:.3f} s per frame",
    )
    return done


def _benchmarked(given: argparse.Namespace, method: Any, work: Callable[..., Done]) -> Callable[..., Done]:
    """The same work, with its report printed (also with --quiet: it was asked for) and written."""
    from flashvsr.base.files import write_json
    from flashvsr.bench.latency import latency, table, watched

    def run(*args: Any, **more: Any) -> Done:
        with watched(method) as watch:
            done = work(*args, **more)
        report = latency(done.times, watch) | {"in_use": {k: str(v) for k, v in method.in_use.items()}}
        print(table(report), file=sys.stderr if given.out == "-" else sys.stdout)
        if given.json:
            write_json(given.json, report)
        return done

    return run


def _resumable() -> Callable[..., Done]:
    from flashvsr.streaming.resume import upscale_resumable  # brings torch

    return upscale_resumable


def _say(given: argparse.Namespace, sentence: str) -> None:
    if not given.quiet:
        print(sentence, file=sys.stderr if given.out == "-" else sys.stdout, flush=True)


def open_method(
    given: argparse.Namespace,
    note: Callable[[str], None],
    on_step: Callable[[int, int], None] | None = None,
) -> Any:
    """Loads the model and makes its method with the settings that were given; others are the method's own.

    on_step: of whole-clip methods, called with (done, total). Raises UserError.
    """
    import torch

    import flashvsr
    from flashvsr.streaming.beside import worthwhile

    settings = {name: getattr(given, name) for name in SETTINGS if getattr(given, name) not in (None, ...)}
    for name in ("sparse_ratio", "local_range"):  # there, None means: all
        if getattr(given, name) is None:
            settings[name] = None
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
        note=note,
    )
    settings = settings | {"note": note}
    if model.info.kind in ("teacher", "sparse"):
        settings |= {"on_step": on_step}
    else:
        settings |= {"pipelined": worthwhile(device) and not (given.benchmark or given.estimate)}
        if device.type == "cuda":  # what does not fit is refused before the first frame
            settings = {"memory": "auto"} | settings
    return flashvsr.method(model, **settings)


def _sampling_bar(stack: ExitStack, quiet: bool) -> Callable[[int, int], None]:
    """A bar of its own for whole-clip methods, whose frames come all at once at the end."""
    bars: list[Progress] = []

    def on_step(done: int, total: int) -> None:
        if not bars or bars[-1].done == bars[-1].total:
            bars.append(stack.enter_context(Progress(total, "sample and decode", "step", quiet)))
        bars[-1].update()

    return on_step
