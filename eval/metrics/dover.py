"""DOVER (Wu et al. 2023), a no-reference score of a whole clip, on a model the user brings.

Two numbers go by the name of DOVER. FlashVSR and SeedVR2 print the technical branch times 100 (about 6 to
15); DOVE and STAR print both branches fused, 0 to 1. They are two metrics here. DOVER is for non-commercial
use (S-Lab licence), so neither it nor its weights come with this project.

A clip is seen as DOVER's own evaluation sees it, but for its random draws, which are fixed here: technical,
32 frames two apart from each third of the clip, each cut to 7x7 pieces of 32x32 pixels; aesthetic, 32 frames
spread over the clip, shrunk to 224x224 by plain bilinear lookup.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.metrics.scoring import Frames, Metric, Values
from flashvsr.base.cli import UserError
from flashvsr.base.operators import declare_torchvision

_LENGTH, _STRIDE, _SIDE, _PIECES, _PIECE = 32, 2, 224, 7, 32
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

# (aesthetic view 1 3 32 224 224, technical view k 3 32 224 224) -> their two raw scores
Model = Callable[[Tensor, Tensor], tuple[float, float]]


def fused(technical: float, aesthetic: float) -> float:
    """DOVER's overall score in 0...1 of the two raw branch scores, with the constants of its release."""
    t, a = (technical - 0.1107) / 0.07355, (aesthetic + 0.08285) / 0.03774
    return 1 / (1 + math.exp(-(0.6104 * t + 0.3896 * a)))


def dover_metrics(weights: str | Path, device: str | torch.device = "cpu") -> tuple[Metric, Metric]:
    """`dover_technical` and `dover_overall`; the model runs once for both.

    `weights` is DOVER.pth (needs the package dover), a TorchScript file or the ONNX file of DOVER's export
    (needs onnxruntime, runs on the CPU). Raises UserError when the file or the package is missing or unfit.
    """
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"DOVER's weights {path} do not exist; give DOVER.pth, a TorchScript or an ONNX file")
    model, parts = _load(path, torch.device(device))
    last: list = [None, None]  # the clip scored last and its scores, for the second metric

    def branches(rows: Tensor) -> tuple[float, float]:
        if last[0] is not rows:
            last[:] = rows, model(*(view.to(device) for view in views(rows, parts)))
        return last[1]

    def metric(
        key: str, title: str, digits: int, words: str, score: Callable[[float, float], float]
    ) -> Metric:
        def gather(rows: Tensor) -> Values:
            aesthetic, technical = branches(rows)
            return Values(torch.zeros(0, dtype=torch.float64), score(technical, aesthetic))

        return Metric(
            key=key,
            title=title,
            higher=True,
            digits=digits,
            description=f"DOVER v1, {words}, {path.name}, positions and starts fixed",
            measure=_seen,
            gather=gather,
            needs_gt=False,
        )

    return (
        metric("dover_technical", "DOVER technical x100", 3, "technical branch x100", lambda t, a: 100 * t),
        metric("dover_overall", "DOVER overall", 4, "both branches fused, 0 to 1", fused),
    )


def _seen(frames: Frames) -> Tensor:
    """What the views need of each frame, uint8 `n 2 3 224 224`: shrunk, and cut to pieces; 0.3 MB a frame."""
    x = frames.sr.pixels.movedim(-1, 1)
    small = F.interpolate(x.float(), size=(_SIDE, _SIDE), mode="bilinear").round().to(torch.uint8)
    shorter = min(x.shape[2:])
    if shorter < _SIDE:  # too small to cut from
        scale = _SIDE / shorter
        size = [max(_SIDE, math.floor(side * scale)) for side in x.shape[2:]]
        x = F.interpolate(x.float() / 255, size=size, mode="bilinear").mul(255).to(torch.uint8)
    rows, columns = (_places(side) for side in x.shape[2:])
    return torch.stack([small, x[:, :, rows[:, None], columns]], dim=1).cpu()


def _places(size: int) -> Tensor:
    """Where the 224 rows or columns of the cut view come from: the middle piece of each seventh."""
    seventh = size // _PIECES
    starts = [min(seventh * i, size - _PIECE) + max(0, seventh - _PIECE) // 2 for i in range(_PIECES)]
    return (torch.tensor(starts)[:, None] + torch.arange(_PIECE)).flatten()


def views(rows: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """A clip's aesthetic view `1 3 32 224 224` and technical one `parts 3 32 224 224`, normalised."""
    total = len(rows)
    step = total // _LENGTH
    spread = [(step * i + max(0, step - _STRIDE) // 2) % total for i in range(_LENGTH)]
    part = total // parts
    spare = max(0, part - _LENGTH * _STRIDE) // 2
    dense = [[(part * i + spare + _STRIDE * k) % total for k in range(_LENGTH)] for i in range(parts)]
    mean, std = (torch.tensor(v)[:, None, None] for v in (_MEAN, _STD))
    aesthetic = (rows[spread, 0].float() - mean) / std
    technical = (rows[dense, 1].float() - mean) / std
    return aesthetic.transpose(0, 1)[None], technical.transpose(1, 2)


def _load(path: Path, device: torch.device) -> tuple[Model, int]:
    """The model in a file, and how many parts of a clip its technical branch is shown."""
    try:
        if path.suffix == ".onnx":
            return _onnx(path)
        module = _package(path) if path.suffix == ".pth" else torch.jit.load(path, map_location="cpu")
    except (RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a DOVER model ({type(error).__name__}: {error})") from error
    module = module.eval().to(device)

    def model(aesthetic: Tensor, technical: Tensor) -> tuple[float, float]:
        with torch.no_grad():
            a, t = module(aesthetic, technical)
        return a.mean().item(), t.mean().item()

    return model, 3


def _package(path: Path) -> nn.Module:
    """DOVER.pth in the modules of the package dover, put together as its export to ONNX does."""
    if find_spec("dover") is None:
        raise UserError(
            f"{path} needs the package dover (github.com/VQAssessment/DOVER, non-commercial); a TorchScript "
            "or ONNX file does without"
        )
    declare_torchvision()
    from dover.models import VQABackbone, VQAHead, convnext_3d_tiny

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.technical_backbone = VQABackbone(use_checkpoint=False)
            self.aesthetic_backbone = convnext_3d_tiny(pretrained=False)
            self.technical_head = VQAHead(pre_pool=False, in_channels=768)
            self.aesthetic_head = VQAHead(pre_pool=False, in_channels=768)

        def forward(self, aesthetic: Tensor, technical: Tensor) -> tuple[Tensor, Tensor]:
            a = self.aesthetic_head(self.aesthetic_backbone(aesthetic))
            return a, self.technical_head(self.technical_backbone(technical))

    branches = Branches()
    branches.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return branches


def _onnx(path: Path) -> tuple[Model, int]:
    if find_spec("onnxruntime") is None:
        raise UserError(f"{path} needs the package onnxruntime: pip install -c constraints.txt onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    aesthetic_name, technical_name = (i.name for i in session.get_inputs())
    parts = session.get_inputs()[1].shape[0]  # DOVER's own export fixes it

    def model(aesthetic: Tensor, technical: Tensor) -> tuple[float, float]:
        inputs = {aesthetic_name: aesthetic.cpu().numpy(), technical_name: technical.cpu().numpy()}
        a, t = session.run(None, inputs)
        return float(a.mean()), float(t.mean())

    return model, parts if isinstance(parts, int) else 3
