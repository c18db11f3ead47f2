"""`python -m data degrade`: clips to low resolution, with a JSON file beside each that can make it again."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.degradation.pipeline import check, draw, stream
from data.degradation.presets import preset
from flashvsr.base.cli import Progress, UserError
from flashvsr.base.draws import numpy_rng
from flashvsr.base.files import read_json, write_json
from flashvsr.base.video_io import VideoWriter, is_video, list_clips, probe, read_frames


@dataclass(frozen=True)
class Request:
    """What is asked of every clip; `replay` is a sidecar whose parameters are used instead of new ones."""

    preset: str = "realbasicvsr"
    seed: int = 0
    scale: int = 4
    replay: dict | None = None
    force: bool = False
    quiet: bool = False

    def __post_init__(self):
        if self.scale < 1:
            raise UserError(f"--scale {self.scale} must be at least 1")
        preset(self.preset)


def degrade_path(source: str | Path, out: str | Path, request: Request) -> str:
    """Degrades a clip, or every clip of a folder; returns what was done in a sentence.

    `out` is a folder for PNG frames or a video file (lossless), for a folder of clips a folder that gets one
    such folder per clip. Each result has a JSON file of the same name beside it, written last: a clip that
    has one, made with the same settings, is kept. Raises UserError for what cannot be done.
    """
    source, out = Path(source), Path(out)
    clips = list_clips(source)
    if not clips:
        raise UserError(f"{source} holds no video, image or folder of frames")
    if clips == [source]:
        return _one(source, out, sidecar_of(out), ("degrade", request.seed), request)
    if request.replay is not None:
        raise UserError(f"{source} is a folder of clips: --replay makes one clip again, name that clip")
    if is_video(out):
        raise UserError(f"{out} is a video file, {source} a folder of clips: give a folder")
    names = names_of(source, clips)
    made = 0
    with Progress(len(clips), "degrading", unit="clip", quiet=request.quiet) as progress:
        for name, clip in names.items():
            keys = ("degrade", request.seed, name)
            said = _one(clip, out / name, sidecar_of(out / name), keys, request, bar=False)
            made += not said.endswith("kept")
            progress.update(clip=name)
    return f"{out}: {made} of {len(clips)} clips made, {len(clips) - made} kept"


def names_of(folder: Path, clips: list[Path]) -> dict[str, Path]:
    """Every clip under a name of its own: its path below `folder` without a suffix."""
    names: dict[str, Path] = {}
    for clip in clips:
        below = clip.relative_to(folder)
        name = (below.with_suffix("") if clip.is_file() else below).as_posix()
        if name in names:
            raise UserError(f"{names[name]} and {clip} would have the same result; rename one")
        names[name] = clip
    return names


def sidecar_of(out: Path) -> Path:
    """Where the parameters of a result stand: clip.mkv and clip/ have clip.json."""
    return out.with_suffix(".json") if is_video(out) else out.with_name(out.name + ".json")


def _one(clip: Path, out: Path, sidecar: Path, keys: tuple, request: Request, bar: bool = True) -> str:
    info = probe(clip)
    scale = request.scale if request.replay is None else request.replay["scale"]
    height, width = (side // scale * scale for side in (info.height, info.width))
    if not height or not width:
        raise UserError(f"'{clip}' is {info.width}x{info.height}, too small for --scale {scale}")
    settings = {"source": clip.name, "preset": request.preset, "seed": request.seed, "scale": scale}
    if request.replay is not None:
        settings |= {key: request.replay[key] for key in ("preset", "seed")}
    if sidecar.exists() and out.exists() and not request.force:
        _refuse_other(sidecar, settings)
        return f"{out}: kept"

    def cropped() -> Iterator[np.ndarray]:
        return (np.ascontiguousarray(frame[:height, :width]) for frame in read_frames(clip))

    # What containers say of their length is not always true; the walks need the exact count.
    count = sum(1 for _ in read_frames(clip))
    if request.replay is None:
        params = draw(preset(request.preset), count, height, width, scale, numpy_rng(*keys))
    else:
        params = _parameters(request.replay, clip, count, height, width)
    digest = hashlib.sha256()
    quiet = request.quiet or not bar
    with (
        Progress(count, "degrading", unit="frame", quiet=quiet) as progress,
        VideoWriter(_named(out), info.fps, height // scale, width // scale, lossless=True) as writer,
    ):
        for frame in stream(cropped(), params):
            writer.write(frame[None])
            digest.update(frame.tobytes())
            progress.update()
    facts = {"frames": count, "hr": [height, width], "lr_sha256": digest.hexdigest(), "parameters": params}
    write_json(sidecar, settings | facts)
    return _said(out, sidecar, request, facts, (info.height, info.width), scale)


def _named(out: Path) -> str:
    """A path as VideoWriter reads it: a folder ends in a slash even where its name has a dot."""
    return str(out) if is_video(out) else f"{out}/"


def _refuse_other(sidecar: Path, settings: dict) -> None:
    found = read_json(sidecar)
    for key, value in settings.items():
        if found.get(key) != value:
            raise UserError(
                f"{sidecar} was made with {key} {found.get(key)!r}, not {value!r}: "
                f"--force makes it again, or choose another OUT"
            )


def read_replay(path: str | Path) -> dict:
    """The content of a sidecar, checked; UserError when it is not one."""
    found = read_json(path)
    missing = [k for k in ("preset", "seed", "scale", "frames", "hr", "parameters") if k not in found]
    if missing:
        raise UserError(f"{path} is not the JSON of a degraded clip: {', '.join(missing)} missing")
    check(found["parameters"])
    return found


def _parameters(replay: dict, clip: Path, count: int, height: int, width: int) -> dict:
    have, need = (count, height, width), (replay["frames"], *replay["hr"])
    if have != need:
        ours, theirs = (f"{n} frames of {w}x{h}" for n, h, w in (have, need))
        raise UserError(
            f"{clip} has {ours}, the parameters are for {theirs}: name the clip they were made for"
        )
    return replay["parameters"]


def _said(
    out: Path, sidecar: Path, request: Request, facts: dict, source: tuple[int, int], scale: int
) -> str:
    height, width = facts["hr"]
    said = f"{out}: {facts['frames']} frames of {width // scale}x{height // scale}, parameters in {sidecar}"
    if (height, width) != source:
        said += f"; cropped from {source[1]}x{source[0]} to multiples of {scale}"
    if request.replay is not None and "lr_sha256" in request.replay:
        same = request.replay["lr_sha256"] == facts["lr_sha256"]
        said += "; the same bytes as recorded" if same else "; NOT the bytes that were recorded"
    return said
