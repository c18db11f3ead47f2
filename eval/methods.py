"""What can be evaluated: baselines, folders of finished outputs, and our models with settings.

`--method NAME=SPEC` becomes a `Method`, and `open_method` turns it into a function that starts one clip and
gives something with `push(frames)` and `flush()`. The runner knows nothing else.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from eval.baselines import Bicubic
from eval.datasets import Pair, TestSet, measure_clip
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import list_clips, read_frames

FORMS = (
    "NAME=bicubic, NAME=FOLDER_OF_OUTPUTS (a video or a folder of frames for each clip) "
    "or NAME=MODEL_FOLDER[,setting=value...]"
)
_LOAD_SETTINGS = ("lr_projector",)  # of flashvsr.load; all others belong to flashvsr.method


class Upscaler(Protocol):
    """A method on one clip: as many frames come out in all as went in."""

    def push(self, frames: np.ndarray) -> np.ndarray | torch.Tensor:
        """uint8 `F H W 3` in, the uint8 `F' sH sW 3` that are ready out."""
        ...

    def flush(self) -> np.ndarray | torch.Tensor:
        """The rest."""
        ...


@dataclass(frozen=True)
class Method:
    """A parsed `NAME=SPEC`."""

    name: str
    spec: str
    kind: Literal["bicubic", "outputs", "model"]
    path: Path | None
    settings: dict[str, Any]


def parse_method(text: str) -> Method:
    """Parse `NAME=SPEC` (or just `bicubic`); UserError lists the valid forms."""
    name, equals, spec = text.partition("=")
    if text == "bicubic":
        spec = text
    elif not equals or not spec or not re.fullmatch(r"[\w.+ -]+", name):
        raise UserError(f"cannot read --method {text!r}; valid forms: {FORMS}")
    place, *assignments = spec.split(",")
    settings = dict(_setting(text, a) for a in assignments)
    if place == "bicubic":
        kind, path = "bicubic", None
    elif Path(place).is_dir():
        path = Path(place)
        kind = "model" if is_model(path) else "outputs"
    else:
        raise UserError(f"--method {text!r}: there is no folder or baseline {place!r}; valid forms: {FORMS}")
    if settings and kind != "model":
        raise UserError(f"--method {text!r}: settings have no effect, {place} is no model folder")
    return Method(name, spec, kind, path, settings)


def is_model(folder: Path) -> bool:
    """Whether a folder is something for `flashvsr.load`, by the release's file names or our flashvsr.json."""
    release = ("flashvsr.json", "LQ_proj_in.ckpt", "TCDecoder.ckpt")
    return any((folder / name).exists() for name in release) or any(folder.glob("diffusion_*.safetensors"))


def _setting(text: str, assignment: str) -> tuple[str, Any]:
    key, equals, value = assignment.partition("=")
    if not equals or not key.isidentifier() or not value:
        raise UserError(f"--method {text!r}: {assignment!r} is no setting; write setting=value")
    words = {"true": True, "false": False, "none": None, "null": None}
    if value.lower() in words:
        return key, words[value.lower()]
    for number in (int, float):
        try:
            return key, number(value)
        except ValueError:
            continue
    return key, value


def open_method(
    method: Method, test_set: TestSet, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[Pair], Upscaler]:
    """Load what the method needs once; the function returned starts a fresh upscaler for a clip.

    Raises UserError when outputs are missing, and whatever flashvsr.load and flashvsr.method raise.
    """
    if method.kind == "bicubic":
        return lambda pair: Bicubic(test_set.scale)
    if method.kind == "outputs":
        clips = {p.name if p.is_dir() else p.stem: p for p in list_clips(method.path)}
        for pair in test_set.pairs:
            if pair.name not in clips:
                raise UserError(f"method {method.name!r}: {method.path} has no output for clip {pair.name!r}")
        return lambda pair: Finished(method.name, clips[pair.name], pair)

    import flashvsr

    settings = dict(method.settings)
    loading = {key: settings.pop(key) for key in _LOAD_SETTINGS if key in settings}
    if test_set.scale != 4:
        settings.setdefault("scale", test_set.scale)
    model = flashvsr.load(method.path, dtype=dtype, device=device, **loading)
    return lambda pair: flashvsr.method(model, **settings)


class Finished:
    """Frames somebody has already made, handed out as if they were being made."""

    def __init__(self, name: str, path: Path, pair: Pair):
        count, _, _ = measure_clip(path)
        if count not in (pair.frames, pair.total):
            raise UserError(
                f"method {name!r}: {path} has {count} frames, clip {pair.name!r} has {pair.total} in GT "
                f"({pair.frames} evaluated); they must be the same"
            )
        self._frames: Iterator[np.ndarray] = read_frames(path)

    def push(self, frames: np.ndarray) -> np.ndarray:
        """As many finished frames as LR frames came in."""
        return np.stack(list(islice(self._frames, len(frames))))

    def flush(self) -> np.ndarray:
        """Nothing is held back."""
        return np.empty((0, 0, 0, 3), dtype=np.uint8)
