"""What can be evaluated: baselines, folders of finished outputs, and our models with settings.

`--method NAME=SPEC` becomes a `Method`, and `open_method` turns it into a function that gives a fresh object
with `push(frames)` and `flush()` for each clip. Nothing else is known about a method.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from eval.baselines import NETWORKS, Bicubic, Chunked, Lanczos, load_network
from eval.cache import clip_hash, code_hash, files_hash
from eval.datasets import Clip, TestSet, measure_clip
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import list_clips

FORMS = (
    "NAME=bicubic, NAME=lanczos, NAME=basicvsr,weights=FILE[,interval=N][,overlap=N][,carry=true] (or "
    "iconvsr), NAME=FOLDER_OF_OUTPUTS (a video or a folder of frames for each clip) or "
    "NAME=MODEL_FOLDER[,setting=value...]"
)
INTERPOLATIONS = {"bicubic": Bicubic, "lanczos": Lanczos}
_CHUNK_SETTINGS = ("interval", "overlap", "carry")
_LOAD_SETTINGS = ("lr_projector",)  # of flashvsr.load; all others belong to flashvsr.method
_MODEL_CODE = ("attention", "base", "models", "streaming", "weights", "config.py", "flow.py")


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
    """A parsed `NAME=SPEC`; `kind` is "outputs", "model", or the name of a baseline."""

    name: str
    spec: str
    kind: str
    path: Path | None
    settings: dict[str, Any]


def parse_method(text: str) -> Method:
    """Parse `NAME=SPEC` (or just a baseline's name); UserError lists the valid forms."""
    name, equals, spec = text.partition("=")
    if text in INTERPOLATIONS:
        spec = text
    elif not equals or not spec or not re.fullmatch(r"[\w.+ -]+", name):
        raise UserError(f"cannot read --method {text!r}; valid forms: {FORMS}")
    place, *assignments = spec.split(",")
    settings = dict(_setting(text, a) for a in assignments)
    if place in INTERPOLATIONS or place in NETWORKS:
        kind, path = place, None
    elif Path(place).is_dir():
        path = Path(place)
        kind = "model" if is_model(path) else "outputs"
    else:
        raise UserError(f"--method {text!r}: there is no folder or baseline {place!r}; valid forms: {FORMS}")
    if settings and (kind in INTERPOLATIONS or kind == "outputs"):
        raise UserError(f"--method {text!r}: settings have no effect, {place} is no model folder")
    unknown = [key for key in settings if key not in ("weights", *_CHUNK_SETTINGS)]
    if unknown and kind in NETWORKS:
        raise UserError(f"--method {text!r}: {kind} has no {unknown[0]!r}; valid forms: {FORMS}")
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
    method: Method, scale: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], Upscaler]:
    """Load what the method needs once; the function returned gives an upscaler for a new clip.

    Not for finished outputs. Raises whatever flashvsr.load, flashvsr.method and load_network raise.
    """
    if method.kind in INTERPOLATIONS:
        return lambda: INTERPOLATIONS[method.kind](scale)
    if method.kind == "outputs":
        raise ValueError(f"{method.name} is finished: there is nothing to run")

    settings = dict(method.settings)
    if method.kind in NETWORKS:
        weights = settings.pop("weights", None)
        network = load_network(method.kind, weights, scale=scale, device=device, dtype=dtype)
        return lambda: Chunked(network, **settings)

    import flashvsr

    loading = {key: settings.pop(key) for key in _LOAD_SETTINGS if key in settings}
    if scale != 4:
        settings.setdefault("scale", scale)
    model = flashvsr.load(method.path, dtype=dtype, device=device, **loading)
    return lambda: flashvsr.method(model, **settings)


def fingerprint(method: Method, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Everything besides the clip that a method's frames follow from, as a JSON value."""
    made = {"kind": method.kind, "settings": method.settings, "torch": torch.__version__}
    if method.kind in INTERPOLATIONS:
        code = code_hash("eval/baselines/interpolation.py", "flashvsr/base/resize.py")
        return made | {"code": code}
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    if method.kind in NETWORKS:
        weights = method.settings.get("weights", "random")
        files = [] if weights == "random" else [Path(str(weights))]
        code = code_hash("eval/baselines", "flashvsr/base")
    else:
        files = sorted(path for path in method.path.iterdir() if path.is_file() and path.suffix != ".md")
        code = code_hash(*(f"flashvsr/{place}" for place in _MODEL_CODE))
    return made | {
        "weights": files_hash(files),
        "code": code,
        "device": gpu or torch.device(device).type,
        "dtype": str(dtype).removeprefix("torch."),
    }


def finished_outputs(method: Method, test_set: TestSet, several: bool) -> dict[str, Path]:
    """Where the finished outputs of a set's clips are: in the method's folder, or with several sets (or
    where there is one) in its sub-folder of the set's name. UserError names a clip without output."""
    folder = method.path / test_set.name if (method.path / test_set.name).is_dir() else method.path
    if several and folder == method.path:
        raise UserError(
            f"method {method.name!r}: {method.path} has no folder {test_set.name}; with several data sets "
            f"outputs are looked for in a folder of the set's name"
        )
    found = {p.name if p.is_dir() else p.stem: p for p in list_clips(folder)}
    for clip in test_set.clips:
        if clip.name not in found:
            raise UserError(f"method {method.name!r}: {folder} has no output for clip {clip.name!r}")
    return {clip.name: found[clip.name] for clip in test_set.clips}


def finished(method: Method, path: Path, clip: Clip, align: str) -> dict[str, Any]:
    """Size, count and hash of a finished output: the fields of eval.cache.Output.

    UserError when it has another number of frames than the clip (all of it, or the part evaluated), unless
    `align` allows to take those both have.
    """
    count, height, width = measure_clip(path)
    if align == "refuse" and count not in (clip.frames, clip.total):
        raise UserError(
            f"method {method.name!r}: {path} has {count} frames, clip {clip.name!r} has {clip.total} "
            f"({clip.frames} evaluated); they must be the same (--align first takes those both have)"
        )
    return {"frames": count, "height": height, "width": width, "pixels": clip_hash(path)}
