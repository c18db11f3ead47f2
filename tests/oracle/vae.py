"""Wan's VAE with 3-D convolutions: 1, then 4 frames per encoder step; 1 latent per decoder step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle.parts import channel_rms, silu

Weights = dict[str, Tensor]
MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
MEAN += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
STD += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


class VAE:
    """`cache` holds, by layer name, the frames a layer has seen last."""

    def __init__(self, weights: Weights):
        self.w = weights
        self.cache: dict[str, Tensor] = {}

    # -- layers, on `B C T H W`

    def conv(self, name: str, x: Tensor) -> Tensor:
        """Causal in time, zeros before the first frame; 1x1x1 kernels need no past."""
        weight = self.w[f"{name}.weight"]
        kt, kh, kw = weight.shape[2:]
        if kt > 1:
            zeros = torch.zeros_like(x[:, :, :1]).repeat_interleave(kt - 1, 2)
            x = torch.cat([self.cache.get(name, zeros), x], 2)
            self.cache[name] = x[:, :, -(kt - 1) :]
        return F.conv3d(x, weight, self.w[f"{name}.bias"], padding=(0, kh // 2, kw // 2))

    def residual(self, name: str, x: Tensor) -> Tensor:
        y = self.conv(f"{name}.residual.2", silu(channel_rms(x, self.w[f"{name}.residual.0.gamma"])))
        y = self.conv(f"{name}.residual.6", silu(channel_rms(y, self.w[f"{name}.residual.3.gamma"])))
        return y + (self.conv(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in self.w else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        out = []
        for frame in x.unbind(2):
            y = channel_rms(frame, self.w[f"{name}.norm.gamma"])
            y = F.conv2d(y, self.w[f"{name}.to_qkv.weight"], self.w[f"{name}.to_qkv.bias"]).flatten(2)
            q, k, v = (part.transpose(1, 2) for part in y.chunk(3, 1))
            y = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v
            y = y.transpose(1, 2).reshape(frame.shape)
            out.append(frame + F.conv2d(y, self.w[f"{name}.proj.weight"], self.w[f"{name}.proj.bias"]))
        return torch.stack(out, 2)

    def _in_space(self, name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        weight, bias = self.w[f"{name}.resample.1.weight"], self.w[f"{name}.resample.1.bias"]
        frames = [F.conv2d(frame, weight, bias, stride=stride, padding=padding) for frame in x.unbind(2)]
        return torch.stack(frames, 2)

    def downsample(self, name: str, x: Tensor) -> Tensor:
        x = self._in_space(name, F.pad(x, (0, 1, 0, 1)), 2, 0)
        if f"{name}.time_conv.weight" not in self.w:
            return x
        last = self.cache.get(name)
        self.cache[name] = x[:, :, -1:]
        if last is None:
            return x
        weight, bias = self.w[f"{name}.time_conv.weight"], self.w[f"{name}.time_conv.bias"]
        return F.conv3d(torch.cat([last, x], 2), weight, bias, stride=(2, 1, 1))

    def upsample(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.time_conv.weight" in self.w:
            if name not in self.cache:  # the first latent skips the convolution and is not seen later
                self.cache[name] = torch.zeros_like(torch.cat([x, x], 2))
            else:
                seen = torch.cat([self.cache[name], x], 2)
                self.cache[name] = seen[:, :, -2:]
                y = F.conv3d(seen, self.w[f"{name}.time_conv.weight"], self.w[f"{name}.time_conv.bias"])
                c = x.shape[1]
                x = torch.stack([y[:, :c], y[:, c:]], 3).flatten(2, 3)
        return self._in_space(name, x.repeat_interleave(2, 3).repeat_interleave(2, 4), 1, 1)

    # -- halves

    def _half(self, half: str, x: Tensor) -> Tensor:
        """conv1, the levels and the middle in the half's own order, head."""
        levels = "downsamples" if half == "encoder" else "upsamples"
        resample = self.downsample if half == "encoder" else self.upsample
        middle = [
            lambda x: self.residual(f"{half}.middle.0", x),
            lambda x: self.attention(f"{half}.middle.1", x),
            lambda x: self.residual(f"{half}.middle.2", x),
        ]
        count = 1 + max(int(n.split(".")[2]) for n in self.w if n.startswith(f"{half}.{levels}."))
        x = self.conv(f"{half}.conv1", x)
        if half == "decoder":
            for step in middle:
                x = step(x)
        for i in range(count):
            name = f"{half}.{levels}.{i}"
            x = resample(name, x) if f"{name}.resample.1.weight" in self.w else self.residual(name, x)
        if half == "encoder":
            for step in middle:
                x = step(x)
        return self.conv(f"{half}.head.2", silu(channel_rms(x, self.w[f"{half}.head.0.gamma"])))

    def encode(self, video: Tensor) -> Tensor:
        """`B 3 4n+1 H W` in [-1,1] -> normalised posterior mean."""
        self.cache = {}
        steps = [video[:, :, :1]]
        steps += [video[:, :, i : i + 4] for i in range(1, video.shape[2], 4)]
        h = torch.cat([self._half("encoder", x) for x in steps], 2)
        mean = self.conv("conv1", h).chunk(2, 1)[0]
        return (mean - self._column(MEAN, mean)) / self._column(STD, mean)

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latents -> frames, unclamped."""
        self.cache = {}
        raw = self.conv("conv2", latent * self._column(STD, latent) + self._column(MEAN, latent))
        frames = [self._half("decoder", raw[:, :, i : i + 1]) for i in range(raw.shape[2])]
        return torch.cat(frames, 2)

    @staticmethod
    def _column(values: list[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype).reshape(1, -1, 1, 1, 1)
