"""Which inputs become which outputs: patterns, folders of videos, one or several, what exists already."""

from __future__ import annotations

import glob
import sys
from dataclasses import dataclass
from pathlib import Path

from flashvsr.base.cli import UserError
from flashvsr.base.stills import is_image, is_video, natural
from flashvsr.base.video_io import list_clips

KEPT_SUFFIXES = (".mp4", ".mkv", ".mov")  # others become .mp4


@dataclass(frozen=True)
class Job:
    """One input and its output; `reason` says why it is not done."""

    source: str
    out: str
    reason: str | None = None


class Stdin:
    """Standard input for FFmpeg, which asks for a name and would like to go back to the start."""

    name = "stdin"

    def read(self, size: int = -1) -> bytes:
        return sys.stdin.buffer.read(size)

    def seekable(self) -> bool:
        return False

    def seek(self, position: int) -> None:
        pass


def is_video_file(source: str) -> bool:
    """Neither an image nor a folder."""
    return not is_image(source) and not Path(source).is_dir()


def plan(sources: list[str], out: str, force: bool) -> list[Job]:
    """The inputs named, with patterns and folders of videos spelled out, and where each goes.

    One input goes to OUT itself, several into the folder OUT under their own names; there, what exists is
    left as it is unless `force`. UserError for what does not exist, for OUT that exists (one input), is an
    input, or does not fit, and for inputs of one name.
    """
    found, several = _spelled_out(sources)
    if "-" in found and several:
        raise UserError("- is one input; give it alone")
    if not several:
        _check_one(found[0], out, force)
        return [Job(found[0], out)]
    folder = Path(out)
    if out == "-" or folder.suffix and not out.endswith("/") and not folder.is_dir():
        raise UserError(f"{out} is one output for {len(found)} inputs; give a folder")
    jobs: dict[str, str] = {}
    for source in found:
        target = str(folder / _name(Path(source)))
        if target in jobs:
            raise UserError(f"{jobs[target]} and {source} would both become {target}; upscale them apart")
        if _same(target, source):
            raise UserError(f"{source} would be replaced by its own output; give another folder as OUT")
        jobs[target] = source
    return [
        Job(source, target, None if force or not _full(Path(target)) else f"{target} exists and is kept")
        for target, source in jobs.items()
    ]


def _spelled_out(sources: list[str]) -> tuple[list[str], bool]:
    found: list[str] = []
    several = len(sources) > 1
    for source in sources:
        if source == "-" or Path(source).exists():
            path = Path(source)
            videos = source != "-" and path.is_dir() and any(map(is_video, path.iterdir()))
            found += [str(p) for p in list_clips(path)] if videos else [source]
            several = several or videos
        elif glob.has_magic(source):
            matches = sorted((Path(p) for p in glob.glob(source, recursive=True)), key=natural)
            if not matches:
                raise UserError(f"{source} matches no file; check the pattern")
            found += map(str, matches)
            several = True
        else:
            raise UserError(f"{source} does not exist; check the path")
    return found, several


def _name(source: Path) -> str:
    if source.is_dir():
        return source.name + "/"
    if is_image(source):
        return source.stem + ".png"
    return source.stem + (source.suffix.lower() if source.suffix.lower() in KEPT_SUFFIXES else ".mp4")


def _check_one(source: str, out: str, force: bool) -> None:
    if out == "-":
        return
    path = Path(out)
    if source != "-" and _same(out, source):
        raise UserError(f"{out} is the input itself; choose another output")
    if is_image(path) and not is_image(source):
        raise UserError(f"{out} is one image, {source} is not; give a video or a folder as OUT")
    if path.suffix and not out.endswith("/") and not is_image(path) and not is_video(path):
        raise UserError(f"{out}: unknown suffix {path.suffix!r}; use .mp4, .mkv or .mov, or a folder for PNG")
    if _full(path) and not force:
        raise UserError(f"{out} already exists; --force replaces it")


def _same(a: str, b: str) -> bool:
    return Path(a).exists() and Path(a).resolve() == Path(b).resolve()


def _full(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()
