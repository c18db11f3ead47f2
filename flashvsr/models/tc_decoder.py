"""The tiny conditional (TC) decoder: latents and LR frames -> frames, four per latent.

A TAEHV-style decoder whose input is the latent beside the 8x8-unshuffled LR frames of the same time (768
channels). A MemBlock looks at its own input one frame earlier, so the whole clip in parallel equals frame
by frame with memory. The first call drops three frames: latent 0 is one frame.

Tensor names and shapes are those of `TCDecoder.ckpt`. Maths: golden/README "TC decoder".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashvsr.base.cli import UserError
from flashvsr.config import TCDecoderConfig

Memory = tuple[Tensor, ...]
GROUP, PIXELS = 4, 8


class MemBlock(nn.Module):
    """ReLU(conv(cat[x, previous frame's x]) + x) with three convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.ModuleDict(
            {
                "0": nn.Conv2d(channels * 2, channels, 3, padding=1),
                "2": nn.Conv2d(channels, channels, 3, padding=1),
                "4": nn.Conv2d(channels, channels, 3, padding=1),
            }
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """`x`: `B T C H W`; `past`: the frame before it, `B 1 C H W`."""
        before = torch.cat([past.to(x.dtype), x[:, :-1]], 1)
        y = torch.cat([x, before], 2).flatten(0, 1)
        y = F.relu(self.conv["0"](y))
        y = F.relu(self.conv["2"](y))
        return F.relu(self.conv["4"](y).unflatten(0, x.shape[:2]) + x)


class TGrow(nn.Module):
    """1x1 convolution to `stride` times the channels, which become frames (frame index outermost)."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.flatten(0, 1))
        return y.unflatten(1, (self.stride, -1)).flatten(0, 1).unflatten(0, (x.shape[0], -1))


def _conv(c_in: int, c_out: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)


class TCDecoder(nn.Module):
    def __init__(self, config: TCDecoderConfig):
        super().__init__()
        self.config = config
        a, b, c, d = config.channels
        c_in = config.latent_channels + 3 * GROUP * PIXELS * PIXELS
        self.decoder = nn.ModuleDict(
            {
                "1": _conv(c_in, a, bias=True),
                "3": _conv(a, a),
                **{str(i): MemBlock(a) for i in (5, 6, 7)},
                "9": TGrow(a, 1),
                "10": _conv(a, b),
                **{str(i): MemBlock(b) for i in (11, 12, 13)},
                "15": TGrow(b, 2),
                "16": _conv(b, c),
                **{str(i): MemBlock(c) for i in (17, 18, 19)},
                "21": TGrow(c, 2),
                "22": _conv(c, d),
                "24": _conv(d, d),
                "26": _conv(d, 3, bias=True),
            }
        )

    @staticmethod
    def condition(lr: Tensor, start: bool) -> Tensor:
        """LR frames `B 3 F H W` in [-1,1] -> `B F/4 768 H/8 W/8`, channels (colour, frame, row, column).

        At the start of a clip frame 0 is repeated so that group i holds frames 4i-3 ... 4i.
        """
        if start:
            lr = torch.cat([lr[:, :, :1].expand(-1, -1, GROUP - 1, -1, -1), lr], 2)
        groups = lr.unflatten(2, (-1, GROUP)).transpose(1, 2)  # B g 3 4 H W
        return F.pixel_unshuffle(groups.flatten(2, 3), PIXELS)

    def forward(self, latent: Tensor, lr: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Normalised latents `B 16 n h w` and LR frames `B 3 F 8h 8w` in [-1,1] -> frames, memory.

        F = 4n-3 in the first call (`memory=None`), 4n later. Returns `B 3 F 8h 8w`, unclamped, [-1,1].
        Raises UserError when the two do not fit.
        """
        start = memory is None
        n = latent.shape[2]
        expected = (GROUP * n - 3 * start, latent.shape[3] * PIXELS, latent.shape[4] * PIXELS)
        if tuple(lr.shape[2:]) != expected:
            raise UserError(
                f"the TC decoder takes LR frames of size {expected} beside latents of size "
                f"{tuple(latent.shape[2:])}, got {tuple(lr.shape[2:])}"
            )
        x = torch.cat([self.condition(lr, start).to(latent.dtype), latent.transpose(1, 2)], 2)
        x = 3 * torch.tanh(x / 3)
        past = None if start else iter(memory)
        kept: list[Tensor] = []
        d = self.decoder
        x = self._frames(d["1"], x).relu()
        x = self._frames(d["3"], x).relu()
        for blocks, grow, out in (
            ((5, 6, 7), "9", "10"),
            ((11, 12, 13), "15", "16"),
            ((17, 18, 19), "21", "22"),
        ):
            for i in blocks:
                before = torch.zeros_like(x[:, :1]) if past is None else next(past)
                kept.append(x[:, -1:])
                x = d[str(i)](x, before)
            x = F.interpolate(x.flatten(0, 1), scale_factor=2.0, mode="nearest").unflatten(0, x.shape[:2])
            x = self._frames(d[out], d[grow](x))
        x = self._frames(d["24"], x.relu()).relu()
        frames = 2 * self._frames(d["26"], x).transpose(1, 2) - 1
        return frames[:, :, GROUP - 1 :] if start else frames, tuple(kept)

    @staticmethod
    def _frames(conv: nn.Conv2d, x: Tensor) -> Tensor:
        return conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])
