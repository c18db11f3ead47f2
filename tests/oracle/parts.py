"""LR Proj-In, the TC decoder frame by frame, and the colour corrections."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def channel_rms(x: Tensor, gamma: Tensor) -> Tensor:
    """x / ||x||_2 * sqrt(C) * gamma over axis 1."""
    length = torch.sqrt((x * x).sum(1, keepdim=True))
    shape = [1, -1] + [1] * (x.ndim - 2)
    return x / length * math.sqrt(x.shape[1]) * gamma.reshape(shape)


def unshuffle(x: Tensor, side: int) -> Tensor:
    """`B C F H W` -> `B (C side side) F H/side W/side`, channels in the order colour, row, column."""
    b, c, f, h, w = x.shape
    x = x.reshape(b, c, f, h // side, side, w // side, side)
    return x.permute(0, 1, 4, 6, 2, 3, 5).reshape(b, c * side * side, f, h // side, w // side)


# ---- LR Proj-In -----------------------------------------------------------------------------------------


class Projector:
    """Group by group of four frames. `variant`: causal (v1.1) or buffer (v1)."""

    def __init__(self, weights: Weights, variant: str):
        self.w, self.variant = weights, variant
        self.layers = sum(n.startswith("linear_layers.") and n.endswith("weight") for n in weights)
        self.cache: dict[str, Tensor] = {}

    def _stage(self, number: int, x: Tensor) -> Tensor:
        """One convolution with the two frames that stand in front of the group, norm and SiLU."""
        if self.variant == "buffer":
            past = x[:, :, -2:]
        else:
            first = x[:, :, :1]
            past = self.cache.get(f"conv{number}", torch.cat([first, first], 2))
        self.cache[f"conv{number}"] = x[:, :, -2:]
        padded = F.pad(torch.cat([past, x], 2), (1, 1, 1, 1, 0, 0), mode="replicate")
        y = F.conv3d(padded, self.w[f"conv{number}.weight"], self.w[f"conv{number}.bias"], stride=(2, 1, 1))
        return silu(channel_rms(y, self.w[f"norm{number}.gamma"]))

    def group(self, frames: Tensor) -> list[Tensor]:
        """Four frames `B 3 4 H W` -> per layer tokens `B (h w) D`."""
        y = self._stage(2, self._stage(1, unshuffle(frames, 16)))
        tokens = y.flatten(2).transpose(1, 2)
        return [
            tokens @ self.w[f"linear_layers.{i}.weight"].T + self.w[f"linear_layers.{i}.bias"]
            for i in range(self.layers)
        ]

    def clip(self, video: Tensor) -> list[Tensor]:
        """`B 3 4n+1 H W` -> per layer `B (n h w) D`. Frame 0 four times comes first and gives nothing."""
        self.cache = {}
        self.group(video[:, :, [0, 0, 0, 0]])
        groups = [self.group(video[:, :, i : i + 4]) for i in range(1, video.shape[2], 4)]
        return [torch.cat(layer, 1) for layer in zip(*groups, strict=True)]


# ---- TC decoder -----------------------------------------------------------------------------------------


class TCDecoder:
    """One latent at a time, and inside it one frame at a time."""

    def __init__(self, weights: Weights):
        self.w = weights
        self.memory: dict[int, Tensor] = {}
        self.started = False

    def _conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.w[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, self.w.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    def _remember(self, i: int, x: Tensor) -> Tensor:
        before = self.memory.get(i, torch.zeros_like(x))
        self.memory[i] = x
        y = torch.relu(self._conv(f"{i}.conv.0", torch.cat([x, before], 1)))
        y = torch.relu(self._conv(f"{i}.conv.2", y))
        return torch.relu(self._conv(f"{i}.conv.4", y) + x)

    def _frames(self, x: Tensor) -> list[Tensor]:
        """One latent beside its condition, `B 784 h w` -> four frames `B 3 8h 8w`."""
        x = torch.relu(self._conv("1", 3 * torch.tanh(x / 3)))
        frames = [torch.relu(self._conv("3", x))]
        for blocks, grow in (((5, 6, 7), 9), ((11, 12, 13), 15), ((17, 18, 19), 21)):
            coming = []
            for frame in frames:
                for i in blocks:
                    frame = self._remember(i, frame)
                frame = frame.repeat_interleave(2, 2).repeat_interleave(2, 3)
                channels = frame.shape[1]
                grown = self._conv(f"{grow}.conv", frame)
                coming += [self._conv(str(grow + 1), part) for part in grown.split(channels, 1)]
            frames = coming
        return [self._conv("26", torch.relu(self._conv("24", torch.relu(x)))) for x in frames]

    def call(self, latent: Tensor, lr: Tensor) -> Tensor:
        """`B 16 n h w` and `B 3 F 8h 8w` in [-1,1] -> raw rgb in [0,1], `B 3 F 8h 8w`."""
        if not self.started:
            short = -lr.shape[2] % 4
            lr = torch.cat([lr[:, :, :1]] * short + [lr], 2)
        out = []
        for i in range(latent.shape[2]):
            four = lr[:, :, 4 * i : 4 * i + 4]
            b, _, _, h, w = four.shape
            condition = four.reshape(b, 3, 4, h // 8, 8, w // 8, 8).permute(0, 1, 2, 4, 6, 3, 5)
            condition = condition.reshape(b, 768, h // 8, w // 8)
            out += self._frames(torch.cat([condition, latent[:, :, i]], 1))
        frames = torch.stack(out, 2)
        first, self.started = not self.started, True
        return frames[:, :, 3:] if first else frames


# ---- colours --------------------------------------------------------------------------------------------


def adain(sr: Tensor, lr: Tensor) -> Tensor:
    def mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean((-1, -2), keepdim=True)
        return mean, torch.sqrt(((x - mean) ** 2).mean((-1, -2), keepdim=True) + 1e-5)

    (a, b), (c, d) = mean_std(sr), mean_std(lr)
    return (sr - a) / b * d + c


def _blur(x: Tensor, distance: int) -> Tensor:
    """[1,2,1]x[1,2,1]/16 with taps `distance` apart, replicating at the border, over the last two axes."""
    for axis in (-1, -2):
        i = torch.arange(x.shape[axis])
        low, high = (i - distance).clamp(min=0), (i + distance).clamp(max=x.shape[axis] - 1)
        x = (x.index_select(axis, low) + 2 * x + x.index_select(axis, high)) / 4
    return x


def wavelet(sr: Tensor, lr: Tensor) -> Tensor:
    detail, low_sr, low_lr = torch.zeros_like(sr), sr, lr
    for level in range(5):
        blurred = _blur(low_sr, 2**level)
        detail, low_sr, low_lr = detail + (low_sr - blurred), blurred, _blur(low_lr, 2**level)
    return detail + low_lr


def correct(sr: Tensor, lr: Tensor, method: str) -> Tensor:
    corrected = {"adain": adain, "wavelet": wavelet, "none": lambda a, b: a}[method](sr, lr)
    return corrected.clamp(-1, 1)
