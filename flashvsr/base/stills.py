"""Files by their names; single images and folders of numbered images, read with Pillow."""

from __future__ import annotations

import io
import re
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flashvsr.base.cli import UserError

Source = str | Path | bytes | BinaryIO

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"))
VIDEO_SUFFIXES = frozenset(
    (
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".ts",
        ".mts",
        ".mpg",
        ".mpeg",
        ".flv",
        ".wmv",
        ".gif",
        ".y4m",
    )
)
FRAME_NAME = re.compile(r"frame-\d+\.png")  # what VideoWriter writes


def is_image(path: str | Path) -> bool:
    """Whether the name is that of an image file."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def is_video(path: str | Path) -> bool:
    """Whether the name is that of a video file."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def name_of(source: Source) -> str:
    """What to call a source in a message: its path, or what kind of thing it is."""
    if isinstance(source, bytes):
        return f"a clip of {len(source)} bytes"
    return str(source if isinstance(source, (str, Path)) else getattr(source, "name", "a file object"))


def is_picture(source: Source) -> bool:
    """An image by its name, or bytes that begin as PNG or JPEG do."""
    if isinstance(source, (str, Path)):
        return is_image(source)
    if isinstance(source, bytes):
        head = source[:8]
    else:
        head = source.read(8)
        source.seek(-len(head), io.SEEK_CUR)
    return head == b"\x89PNG\r\n\x1a\n" or head[:3] == b"\xff\xd8\xff"


def natural(path: Path) -> list[tuple[bool, int | str]]:
    """Sort key by which frame-2 comes before frame-10."""
    parts = re.split(r"(\d+)", path.name)
    return [(not part.isdecimal(), int(part) if part.isdecimal() else part.lower()) for part in parts]


def _frame_files(folder: Path) -> list[Path]:
    files = (p for p in folder.iterdir() if is_image(p) and p.is_file() and not p.name.startswith("."))
    return sorted(files, key=natural)


def frames_of(folder: Path) -> list[Path]:
    """The images of a folder in natural order; UserError when there is none."""
    files = _frame_files(folder)
    if not files:
        raise UserError(f"{folder} holds no images; expected frames such as frame-000000.png")
    return files


def is_frame_folder(folder: Path) -> bool:
    """Whether its images are the numbered frames of one clip: one size, names alike but for the number."""
    from PIL import Image

    files = _frame_files(folder)
    if not files or not all(re.search(r"\d$", p.stem) for p in files):
        return False
    if len({re.sub(r"\d+$", "", p.stem) for p in files}) > 1:
        return False
    if len(files) == 1:
        return bool(FRAME_NAME.fullmatch(files[0].name))
    sizes = set()
    for path in files[:: max(1, len(files) // 8)]:
        with suppress(OSError), Image.open(path) as image:  # an unreadable frame is named when it is read
            sizes.add(image.size)
    return len(sizes) == 1


def read_image(source: Source, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [H, W, 3] RGB, upright, resized to `size` = (h, w) if given; UserError naming the file."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey: convert() would clip instead of scaling
                image = Image.fromarray(
                    (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                )
            image = image.convert("RGB")
            if size is not None and size != image.size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BICUBIC)
            return np.array(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError for a broken PNG.
        raise UserError(
            f"{name_of(source)} cannot be read as an image ({error}); replace or leave it out"
        ) from error
