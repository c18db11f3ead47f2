"""What all upscalers share: settings of the output, frames in and out, padding to whole blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flashvsr.attention.backends import describe
from flashvsr.base.cli import UserError
from flashvsr.base.resize import bicubic_8bit, to_signed, to_uint8
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.streaming.beside import download, upload
from flashvsr.weights.folder import FlashVSR

Frames = np.ndarray | Tensor


@dataclass(frozen=True)
class Output:
    """How many times larger, through which decoder, with which colours, from which noise."""

    scale: int | float = 4
    decoder: Literal["auto", "tc", "vae"] = "auto"
    color_fix: Literal["adain", "wavelet", "none"] = "adain"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.scale < math.inf:
            raise UserError(f"scale={self.scale} must be at least 1")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output, rounded to whole pixels (halves up)."""
        return math.floor(height * self.scale + 0.5), math.floor(width * self.scale + 0.5)


MADE_FOR = 4  # the scale of the release and of every stage's training


def other_scale(scale: float, note: Callable[[str], None]) -> None:
    """Tells of a scale that the model did not see in training."""
    if scale != MADE_FOR:
        note(f"scale={scale:g}: the model was made for {MADE_FOR}; detail may be wrong or missing")


def choose_decoder(model: FlashVSR, decoder: str) -> tuple[str, TCDecoder | WanVAE]:
    """The decoder's name and module. `auto` takes the TC decoder, of a model without one the VAE."""
    if decoder == "auto":
        decoder = "vae" if model.tc_decoder is None and model.vae is not None else "tc"
    part = {"tc": "tc_decoder", "vae": "vae"}[decoder]
    model.require(part)
    return decoder, getattr(model, part)


def resolve_ratio(model: FlashVSR, sparse_ratio: float | Literal["auto"] | None) -> float | None:
    """`auto` is the ratio the model was made for; None selects nothing."""
    if sparse_ratio == "auto":
        return model.info.sparse_ratio
    if sparse_ratio is not None and (not isinstance(sparse_ratio, (int, float)) or sparse_ratio <= 0):
        raise UserError(f"sparse_ratio={sparse_ratio!r} must be a number above 0, none or auto")
    return sparse_ratio


def attention_in_use(model: FlashVSR, attention: str) -> str:
    """Which attention backend this model runs with here, in words; UserError where it cannot."""
    config, weight = model.dit.config, model.dit.patch_embedding.weight
    return describe(attention, weight.device, weight.dtype, config.head_dim, math.prod(config.block))


def check_frames(frames: Frames) -> Tensor:
    """uint8 `F H W 3`, a numpy array or a tensor, as a CPU tensor; UserError for anything else."""
    x = torch.from_numpy(np.ascontiguousarray(frames)) if isinstance(frames, np.ndarray) else frames.cpu()
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[3] != 3 or 0 in x.shape[1:3]:
        raise UserError(f"frames must be uint8 of shape (F, H, W, 3), not {x.dtype} {tuple(x.shape)}")
    return x


def no_frames() -> np.ndarray:
    """Nothing came, so nothing goes: uint8 `0 0 0 3`."""
    return np.empty((0, 0, 0, 3), np.uint8)


def mirrored(size: int, padded: int) -> Tensor:
    """Indices 0 ... size-1 continued by mirroring without repeating the edge, as often as needed."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(padded) % period
    return torch.minimum(index, period - index) if size > 1 else torch.zeros(padded, dtype=torch.long)


class Canvas:
    """Between LR frames of one size and the padded output size that the model works at.

    LR frames are upsampled with the 8-bit bicubic, then continued to the right and downwards by mirroring to
    multiples of `multiple` (rows, columns); results are cropped back.
    """

    def __init__(
        self,
        lr_size: tuple[int, int],
        size: tuple[int, int],
        multiple: tuple[int, int],
        device: torch.device | str,
    ):
        self.lr_size, self.size, self.device = lr_size, size, device
        self.padded = tuple(-(-side // m) * m for side, m in zip(self.size, multiple, strict=True))
        self._rows, self._columns = (
            mirrored(side, padded).to(device) for side, padded in zip(self.size, self.padded, strict=True)
        )

    def place(self, frames: Tensor) -> Tensor:
        """uint8 `F h w 3` -> float32 `1 3 F H W` in [-1,1] at the padded output size, on the device."""
        return to_signed(self.place_8bit(frames))

    def place_8bit(self, frames: Tensor) -> Tensor:
        """As `place`, as the uint8 pixels before they go to [-1,1]."""
        x = bicubic_8bit(upload(frames, self.device).permute(3, 0, 1, 2), self.size)
        if self.padded != self.size:
            x = x.index_select(-2, self._rows).index_select(-1, self._columns)
        return x[None]

    def take(self, sr: Tensor) -> np.ndarray:
        """`1 3 F H W` in [-1,1] at the padded size -> uint8 `F sH sW 3`."""
        height, width = self.size
        frames = [to_uint8(frame[:, :height, :width]) for frame in sr[0].unbind(1)]
        return download(torch.stack(frames).permute(0, 2, 3, 1).contiguous())

    def empty(self) -> np.ndarray:
        """No frames of the output size."""
        return np.empty((0, *self.size, 3), np.uint8)


def pad_time(frames: Tensor, count: int, last: Tensor) -> Tensor:
    """`frames` with the frame `last` (`1 H W 3`) repeated behind them until there are `count`."""
    missing = count - frames.shape[0]
    return frames if missing <= 0 else torch.cat([frames, last.expand(missing, -1, -1, -1)])


def model_device(model: FlashVSR) -> torch.device:
    """Where the DiT lives."""
    model.require("dit")
    return model.dit.patch_embedding.weight.device
