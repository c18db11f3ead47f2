"""Finding the clips that a user names: files, folders, patterns, lists."""

import glob
from collections.abc import Sequence
from pathlib import Path

from flashvsr.base.cli import UserError
from flashvsr.base.stills import is_image, natural
from flashvsr.base.video_io import is_video, list_clips

Skipped = list[tuple[str, str]]  # (name, reason)


def find(sources: Sequence[str | Path]) -> tuple[list[Path], Skipped]:
    """The clips of `sources` in their order, each path once, and what of them cannot be read.

    A source is a video, an image, a folder of such or of numbered frames, a pattern (`*`, `?`, `[`, `**`), or
    a text file with one of these per line. Raises UserError for a source that is none or gives no clip; a
    line of a list that does so is skipped.
    """
    clips: dict[Path, None] = {}
    skipped: Skipped = []
    for source in sources:
        path = Path(source)
        found = _listed(path, skipped) if path.suffix.lower() == ".txt" else _named(str(source), skipped)
        clips.update(dict.fromkeys(found))
    return list(clips), skipped


def _named(source: str, skipped: Skipped) -> list[Path]:
    path = Path(source)
    if not path.exists() and glob.has_magic(source):
        paths = sorted((Path(p) for p in glob.glob(source, recursive=True)), key=lambda p: natural(p))
        if not paths:
            raise UserError(f"no file fits the pattern '{source}': check it, with quotes around it")
        clips = [clip for p in paths for clip in list_clips(p, skipped)]
    else:
        if path.is_file() and not (is_video(path) or is_image(path)):
            raise UserError(f"'{source}' is neither a video nor an image nor a list (.txt): leave it out")
        clips = list_clips(path, skipped)
    if not clips and not skipped:
        raise UserError(
            f"no video or image in '{source}': give a folder with videos, images or frame folders"
        )
    return clips


def _listed(file: Path, skipped: Skipped) -> list[Path]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"'{file}' is not a text file with one path per line") from None
    clips: list[Path] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            clips += _named(str(file.parent / line.strip()), skipped)
        except UserError as error:
            skipped.append((line.strip(), f"line {number} of {file.name}: {error}"))
    if not clips:
        raise UserError(f"'{file}' names no clip that is there: one path per line, relative to the list")
    return clips
