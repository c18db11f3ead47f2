"""Makes a test set: HR clips cut to size (GT) and their degraded LR partners (LQ), both as PNG frames.

Everything follows from the sources and the settings: the same command gives the same bytes, and an existing
result of the same settings is kept. prepare.json says what they were, every drawn parameter, the hashes of
all pixels and the versions they came from; `check` compares a set with it on any machine.
"""

import hashlib
import itertools
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.cache import code_hash
from flashvsr.base.cli import Progress, UserError
from flashvsr.base.draws import numpy_rng
from flashvsr.base.files import atomic_dir, read_json, sha256, write_json
from flashvsr.base.resize import bicubic_8bit
from flashvsr.base.video_io import VideoWriter, is_image, list_clips, read_frames


@dataclass(frozen=True)
class PrepareConfig:
    """How a test set is made; None means: as in the source."""

    preset: str = "realbasicvsr"
    seed: int = 0
    scale: int = 4
    frames: int | None = None  # the first so many of each clip
    size: tuple[int, int] | None = None  # height, width of GT: the middle of the frame
    short_side: int | None = None  # frames are first reduced (never enlarged) to this short side
    clips: int | None = None  # the first so many by name

    def __post_init__(self):
        for name in ("frames", "short_side", "clips"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.scale < 1:
            raise UserError(f"scale must be at least 1, got {self.scale}")
        if self.size is not None and (min(self.size) < 1 or any(s % self.scale for s in self.size)):
            height, width = self.size
            raise UserError(f"size {height}x{width} must be positive multiples of the scale {self.scale}")


@dataclass(frozen=True)
class Source:
    """One HR clip; `read(count)` gives its first `count` RGB frames (None: all), uint8 `H W 3`."""

    name: str
    digest: Callable[[], str]  # SHA-256 of its content
    read: Callable[[int | None], Iterable[np.ndarray]]


def prepare(source: str | Path, out: str | Path, config: PrepareConfig, *, quiet: bool = False) -> bool:
    """Write `out`/GT, `out`/LQ and `out`/prepare.json; return False if they were already there.

    `source` is a folder of videos, images or frame folders, or a data folder with index.json (its val
    split). Raises UserError when there is no clip, a clip is smaller than the wanted size, or `out` holds
    something else.
    """
    out, sources = Path(out), find_sources(Path(source))[: config.clips]
    settings = {**asdict(config), "sources": [{"name": s.name, "sha256": s.digest()} for s in sources]}
    settings["size"] = None if config.size is None else list(config.size)
    if (out / "prepare.json").exists():
        _refuse_other(out, read_json(out / "prepare.json").get("settings", {}), settings)
        return False
    clips = []
    with atomic_dir(out) as folder, Progress(len(sources), "prepare", unit="clip", quiet=quiet) as progress:
        for clip in sources:
            clips.append(_write_clip(folder, clip, config))
            progress.update(clip=clip.name)
        record = {"format": 1, "settings": settings, "versions": versions(), "clips": clips}
        write_json(folder / "prepare.json", record)
    return True


def find_sources(folder: Path) -> list[Source]:
    """The clips of a folder in the order of their names; UserError when there are none."""
    if (folder / "index.json").exists():
        sources = _from_index(folder)
    elif folder.is_dir():
        sources = [_from_path(path) for path in list_clips(folder)]
    else:
        raise UserError(
            f"{folder} is no folder; give a folder of videos or frames, or a data folder with index.json"
        )
    if not sources:
        raise UserError(f"{folder} holds no video, image or folder of frames")
    sources.sort(key=lambda s: s.name)
    for one, other in zip(sources, sources[1:], strict=False):
        if one.name == other.name:
            raise UserError(f"{folder} holds two clips named {one.name!r}; rename one")
    return sources


def _from_index(folder: Path) -> list[Source]:
    """Held-out clips of a data folder; its images only when it has nothing else."""
    from data.reader import Reader
    from data.shards import read_index

    index = read_index(folder)
    samples = index.splits.get("val", ())
    samples = [s for s in samples if s.kind != "image"] or samples
    reader = Reader(index)

    def digest(sample):
        return sample.sha256

    def read(sample, count):
        return reader.frames(sample, count=sample.frames if count is None else min(count, sample.frames))

    return [Source(s.key, partial(digest, s), partial(read, s)) for s in samples]


def _from_path(path: Path) -> Source:
    def read(count):
        return read_frames(path, count=count)

    def digest():
        if path.is_file():
            return sha256(path)
        files = [f"{file.name} {sha256(file)}" for file in sorted(path.iterdir()) if is_image(file)]
        return hashlib.sha256("\n".join(files).encode()).hexdigest()

    return Source(path.stem if path.is_file() else path.name, digest, read)


def _refuse_other(out: Path, found: Any, settings: dict[str, Any]) -> None:
    changes = [
        f"{key} {found.get(key)}, not {value}" for key, value in settings.items() if found.get(key) != value
    ]
    if found.get("sources") != settings["sources"]:
        changes = ["other sources"]
    if changes:
        raise UserError(
            f"{out} was prepared with {' and '.join(changes)}; remove it or choose another folder"
        )


def _write_clip(folder: Path, source: Source, config: PrepareConfig) -> dict[str, Any]:
    """GT first, then LQ from its files: neither is ever held as a whole."""
    from data.degradation import pipeline, preset

    truth = folder / "GT" / source.name
    cuts = (cut(frame, source.name, config) for frame in source.read(config.frames))
    count, (height, width), gt = write_frames(truth, cuts)
    rng = numpy_rng("eval.prepare", config.seed, source.name)
    parameters = pipeline.draw(preset(config.preset), count, height, width, config.scale, rng)
    _, _, lq = write_frames(folder / "LQ" / source.name, pipeline.stream(read_frames(truth), parameters))
    return {
        "name": source.name,
        "frames": count,
        "height": height,
        "width": width,
        "gt_sha256": gt,  # of pixels, not of PNG files
        "lq_sha256": lq,
        "degradation": parameters,
    }


def cut(frame: np.ndarray, name: str, config: PrepareConfig) -> np.ndarray:
    """One HR frame, uint8 `H W 3`, reduced to the short side and cut in the middle."""
    height, width = frame.shape[:2]
    if config.short_side is not None and config.short_side < min(height, width):
        ratio = config.short_side / min(height, width)
        height, width = round(height * ratio), round(width * ratio)
        channels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)
        frame = bicubic_8bit(channels, (height, width)).permute(1, 2, 0).numpy()
    target = config.size or (height - height % config.scale, width - width % config.scale)
    if target[0] > height or target[1] > width or 0 in target:
        raise UserError(
            f"clip {name!r} is {width}x{height}, too small for {target[1]}x{target[0]}; lower --size"
        )
    top, left = (height - target[0]) // 2, (width - target[1]) // 2
    return np.ascontiguousarray(frame[top : top + target[0], left : left + target[1]])


def write_frames(folder: Path, frames: Iterable[np.ndarray]) -> tuple[int, tuple[int, int], str]:
    """Write uint8 `H W 3` frames losslessly as frame-000000.png, ... into `folder`; return their count, their
    (height, width) and the SHA-256 of their pixels."""
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise UserError(f"clip {folder.name!r} has no frames; replace or leave it out")
    digest = hashlib.sha256()
    with VideoWriter(f"{folder}/", fps=25, height=first.shape[0], width=first.shape[1]) as writer:
        for frame in itertools.chain([first], frames):
            writer.write(frame[None])
            digest.update(frame.tobytes())
    return writer.frames, first.shape[:2], digest.hexdigest()


def versions() -> dict[str, str]:
    """What the bytes may depend on besides sources and settings: codecs, arithmetic, the processor."""
    import av
    import PIL

    libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "av": av.__version__,
        **libraries,
        **{name: _encoder_version(name) for name in ("libx264", "libx265")},
        "degradation_code": code_hash("data/degradation", "flashvsr/base")[:12],
    }


def _encoder_version(name: str) -> str:
    """The version an encoder writes into its stream, or "absent"."""
    import av

    try:
        context = av.CodecContext.create(name, "w")
    except av.error.FFmpegError:
        return "absent"
    context.width = context.height = 64
    context.pix_fmt, context.time_base = "yuv420p", Fraction(1, 25)
    if name == "libx265":
        context.options = {"x265-params": "log-level=none:pools=none:frame-threads=1"}
    frame = av.VideoFrame(64, 64, "yuv420p")
    frame.pts = 0
    stream = b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
    # "x264 - core 165 ..." or "x265 (build 216) - 4.2+1-e444744:..."
    found = re.search(rb"x264 - core (\d+(?: r\d+)?)|x265 \(build \d+\) - ([\w.+-]+)", stream)
    return (found[1] or found[2]).decode() if found else "unknown"


def check(folder: str | Path, *, quiet: bool = False) -> list[str]:
    """What is wrong with a prepared set, in sentences; none when it holds the bytes that were written and
    this machine makes the same LQ from its GT.

    GT and LQ are compared with the hashes of prepare.json; LQ is made again from GT with the drawn
    parameters, and where that gives other bytes the versions that differ are named. Raises UserError when
    `folder` has no prepare.json.
    """
    folder = Path(folder)
    if not (folder / "prepare.json").is_file():
        raise UserError(
            f"{folder} has no prepare.json: only what `python -m eval prepare` made can be checked"
        )
    record = read_json(folder / "prepare.json")
    wrong, remade = [], []
    with Progress(len(record["clips"]), "check", unit="clip", quiet=quiet) as progress:
        for clip in record["clips"]:
            intact = True
            for side, key in (("GT", "gt_sha256"), ("LQ", "lq_sha256")):
                if _pixels_hash(folder / side / clip["name"]) != clip[key]:
                    wrong.append(f"{side} of clip {clip['name']!r} is missing or not what was written")
                    intact = intact and side == "LQ"
            if intact and not _remakes(folder / "GT" / clip["name"], clip):
                remade.append(clip["name"])
            progress.update(clip=clip["name"])
    if remade:
        wrong.append(
            f"this machine makes another LQ from the GT of {', '.join(remade)}; "
            f"{differing_versions(record.get('versions', {})) or 'every recorded version is the same here'}"
        )
    return wrong


def differing_versions(recorded: dict[str, str]) -> str:
    """Which versions differ from those of a record, in words; empty when none does."""
    here = versions()
    names = sorted(name for name in {*recorded, *here} if recorded.get(name) != here.get(name))
    return ", ".join(f"{n} was {recorded.get(n, 'not noted')}, here {here.get(n, 'absent')}" for n in names)


def _pixels_hash(clip: Path) -> str:
    digest = hashlib.sha256()
    try:
        for frame in read_frames(clip):
            digest.update(np.ascontiguousarray(frame).data)
    except (UserError, OSError):
        return ""  # a picture that cannot be read is not what was written
    return digest.hexdigest()


def _remakes(truth: Path, clip: dict[str, Any]) -> bool:
    from data.degradation import pipeline

    digest = hashlib.sha256()
    for frame in pipeline.stream(read_frames(truth), clip["degradation"]):
        digest.update(np.ascontiguousarray(frame).data)
    return digest.hexdigest() == clip["lq_sha256"]
