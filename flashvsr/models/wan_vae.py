"""Wan2.1's causal video VAE: 8x8 in space, 4x in time, 16 latent channels; any width (`dim`).

Frame 0 becomes latent 0; frames 4i-3 ... 4i become latent i. Every layer is causal in time, so the
whole clip in one call equals any split into calls that hand `memory` on (first call 1+4a frames or
any number of latents, later calls 4a frames).

Inside, activations are `B T C H W` and a 3x3x3 convolution is the sum of its three temporal taps, each a
2-D convolution over frames: no padded copy of the clip, and on a CPU up to 10x faster than float32
`conv3d`, which has no fast path for few channels.

Tensor names and shapes are those of `Wan2.1_VAE.pth`. Maths: golden/README "VAE" (released code).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashvsr.base.cli import UserError
from flashvsr.config import VAEConfig
from flashvsr.models.norm import ChannelRMS

Memory = tuple[Tensor, ...]


class Tape:
    """What the causal layers keep between two calls, in the order in which the layers run.

    `past()` hands out the entries of the previous call (None at the start of a clip), `keep()` records
    this call's; `memory` is the value to give to the next call.
    """

    def __init__(self, memory: Memory | None):
        self._past = None if memory is None else iter(memory)
        self._kept: list[Tensor] = []

    def past(self) -> Tensor | None:
        return None if self._past is None else next(self._past)

    def keep(self, frames: Tensor) -> None:
        self._kept.append(frames)

    @property
    def memory(self) -> Memory:
        return tuple(self._kept)


def frames_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """Applies a 2-D module to every frame of `B T C H W`."""
    y = conv(x.flatten(0, 1))
    return y.unflatten(0, x.shape[:2])


class CausalConv3d(nn.Module):
    """Convolution with zero padding, causal in time: output frame t sees t - (k_t - 1) ... t.

    `weight` is `C_out C_in k_t k_h k_w`, as in the release's files.
    """

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int], time_stride: int = 1):
        super().__init__()
        reference = nn.Conv3d(c_in, c_out, kernel)
        self.weight, self.bias = reference.weight, reference.bias
        self.time_stride = time_stride
        self.padding = (kernel[1] // 2, kernel[2] // 2)

    def taps(self, x: Tensor) -> Tensor:
        """The bare convolution over time, without padding. `B T C H W` -> `B (T - k_t)//stride + 1 ...`."""
        k, stride = self.weight.shape[2], self.time_stride
        t_out = (x.shape[1] - k) // stride + 1
        out = None
        for tap in range(k):
            frames = x[:, tap : tap + stride * (t_out - 1) + 1 : stride]
            bias = self.bias if tap == 0 else None
            y = F.conv2d(frames.flatten(0, 1), self.weight[:, :, tap], bias, padding=self.padding)
            out = y if out is None else out + y
        return out.unflatten(0, (x.shape[0], t_out))

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        k = self.weight.shape[2]
        if k == 1:
            return self.taps(x)
        past = tape.past()
        if past is None:
            past = x.new_zeros(x.shape[0], k - 1, *x.shape[2:])
        x = torch.cat([past.to(x.dtype), x], 1)
        tape.keep(x[:, -(k - 1) :])
        return self.taps(x)


class ResidualBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelRMS(c_in, 3),
                "2": CausalConv3d(c_in, c_out, (3, 3, 3)),
                "3": ChannelRMS(c_out, 3),
                "6": CausalConv3d(c_out, c_out, (3, 3, 3)),
            }
        )
        self.shortcut = CausalConv3d(c_in, c_out, (1, 1, 1)) if c_in != c_out else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        r = self.residual
        y = r["2"](F.silu(r["0"](x)), tape)
        y = r["6"](F.silu(r["3"](y)), tape)
        return y + (x if self.shortcut is None else self.shortcut(x, tape))


class FrameAttention(nn.Module):
    """Single-head attention among the positions of one frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelRMS(channels, 2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        frames = self.norm(x).flatten(0, 1)
        q, k, v = self.to_qkv(frames).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(frames.shape)
        return x + self.proj(y).unflatten(0, x.shape[:2])


class Downsample(nn.Module):
    """Halves height and width (zero padding right and bottom), and with `time` the frames after the first.

    In time a clip's first frame passes unchanged; the rest is a strided convolution over all frames.
    """

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), time_stride=2) if time else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        x = frames_conv(self.resample["1"], F.pad(x, (0, 1, 0, 1)))
        if self.time_conv is None:
            return x
        past = tape.past()
        tape.keep(x[:, -1:])
        if past is None:
            return x if x.shape[1] == 1 else torch.cat([x[:, :1], self.time_conv.taps(x)], 1)
        return self.time_conv.taps(torch.cat([past.to(x.dtype), x], 1))


class Upsample(nn.Module):
    """Doubles height and width (nearest, then a convolution to half the channels), and with `time` all
    frames after the clip's first: that one skips the temporal convolution, and the second sees zeros
    where the first would be."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if time else None

    def _double_time(self, x: Tensor, tape: Tape) -> Tensor:
        past = tape.past()
        first, rest = (x[:, :1], x[:, 1:]) if past is None else (x[:, :0], x)
        if past is None:
            past = x.new_zeros(x.shape[0], 2, *x.shape[2:])
        rest = torch.cat([past.to(x.dtype), rest], 1)
        tape.keep(rest[:, -2:])
        if rest.shape[1] == 2:
            return first
        pairs = self.time_conv.taps(rest).unflatten(2, (2, x.shape[2]))
        return torch.cat([first, pairs.flatten(1, 2)], 1)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        if self.time_conv is not None:
            x = self._double_time(x, tape)
        doubled = F.interpolate(x.flatten(0, 1), scale_factor=2.0, mode="nearest").unflatten(0, x.shape[:2])
        return frames_conv(self.resample["1"], doubled)


def middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), FrameAttention(channels), ResidualBlock(channels, channels)]
    )


class Encoder(nn.Module):
    def __init__(self, dim: int, z_dim: int):
        super().__init__()
        widths = [dim, dim, dim * 2, dim * 4, dim * 4]
        self.conv1 = CausalConv3d(3, dim, (3, 3, 3))
        layers: list[nn.Module] = []
        for level, (c_in, c_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers += [ResidualBlock(c_in, c_out), ResidualBlock(c_out, c_out)]
            if level < 3:
                layers.append(Downsample(c_out, time=level > 0))
        self.downsamples = nn.ModuleList(layers)
        self.middle = middle(widths[-1])
        self.head = nn.ModuleDict(
            {"0": ChannelRMS(widths[-1], 3), "2": CausalConv3d(widths[-1], z_dim * 2, (3, 3, 3))}
        )

    def layers(self) -> Sequence[nn.Module]:
        return [self.conv1, *self.downsamples, *self.middle]


class Decoder(nn.Module):
    def __init__(self, dim: int, z_dim: int):
        super().__init__()
        widths = [dim * 4, dim * 4, dim * 4, dim * 2, dim]
        self.conv1 = CausalConv3d(z_dim, widths[0], (3, 3, 3))
        self.middle = middle(widths[0])
        layers: list[nn.Module] = []
        for level, (c_in, c_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            c_in = c_in // 2 if level > 0 else c_in  # the upsampling before it has halved them
            layers += [ResidualBlock(c_in, c_out), ResidualBlock(c_out, c_out), ResidualBlock(c_out, c_out)]
            if level < 3:
                layers.append(Upsample(c_out, time=level < 2))
        self.upsamples = nn.ModuleList(layers)
        self.head = nn.ModuleDict({"0": ChannelRMS(dim, 3), "2": CausalConv3d(dim, 3, (3, 3, 3))})

    def layers(self) -> Sequence[nn.Module]:
        return [self.conv1, *self.middle, *self.upsamples]


class WanVAE(nn.Module):
    """Encoder and decoder around normalised latents: (posterior mean - m) / s per channel.

    `latents_mean` and `latents_std` are Wan's constants by default; a VAE trained here carries its own,
    measured on its training data (`set_statistics`), in the model folder's json.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.dim, config.z_dim)
        self.conv1 = CausalConv3d(config.z_dim * 2, config.z_dim * 2, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config.dim, config.z_dim)
        self.checkpointing = False  # recompute each layer in the backward pass: set by the training stage
        self.register_buffer("latents_mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("latents_std", torch.tensor(config.std), persistent=False)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Gives this VAE its own latent normalisation (each a vector of `z_dim` values)."""
        self.latents_mean.copy_(mean)
        self.latents_std.copy_(std)

    def _run(self, half: Encoder | Decoder, x: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        tape = Tape(memory)
        recompute = self.checkpointing and torch.is_grad_enabled()
        for layer in half.layers():
            x = _checkpointed(layer, x, tape) if recompute else layer(x, tape)
        x = half.head["2"](F.silu(half.head["0"](x)), tape)
        return x, tape.memory

    def posterior(self, video: Tensor, memory: Memory | None = None) -> tuple[Tensor, Tensor, Memory]:
        """`B 3 F H W` in [-1,1] -> mean and log variance `B 16 n h w` (not normalised), memory.

        H and W are multiples of 8; F is 1 + 4a in the first call, 4a later.
        """
        if video.shape[-1] % 8 or video.shape[-2] % 8 or (video.shape[2] - (memory is None)) % 4:
            raise UserError(
                f"the VAE takes sides in multiples of 8 and 1+4a frames (4a after the first call), "
                f"got {tuple(video.shape[2:])}"
            )
        h, memory = self._run(self.encoder, video.transpose(1, 2), memory)
        mean, logvar = self.conv1.taps(h).transpose(1, 2).chunk(2, 1)
        return mean, logvar, memory

    def encode(self, video: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """`B 3 F H W` in [-1,1] -> normalised posterior mean `B 16 n F/8 W/8`, and memory."""
        mean, _, memory = self.posterior(video, memory)
        return self.normalise(mean), memory

    def decode(self, latent: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Normalised latents `B 16 n h w` -> video `B 3 F 8h 8w`, unclamped; F = 4n-3 first, 4n later."""
        raw = latent * self._column(self.latents_std, latent) + self._column(self.latents_mean, latent)
        x, memory = self._run(self.decoder, self.conv2.taps(raw.transpose(1, 2)), memory)
        return x.transpose(1, 2), memory

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training's autoencoder: a posterior sample decoded. -> reconstruction, mean, log variance.

        video: `B 3 F H W` in [-1,1]; noise: standard normal of the latent's shape.
        """
        mean, logvar, _ = self.posterior(video)
        sample = mean + (0.5 * logvar).exp() * noise
        return self.decode(self.normalise(sample))[0], mean, logvar

    def normalise(self, mean: Tensor) -> Tensor:
        """Posterior mean `B 16 n h w` -> normalised latent."""
        return (mean - self._column(self.latents_mean, mean)) / self._column(self.latents_std, mean)

    @staticmethod
    def _column(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like.dtype).reshape(1, -1, 1, 1, 1)


def _checkpointed(layer: nn.Module, x: Tensor, tape: Tape) -> Tensor:
    """One layer under activation checkpointing: its share of the tape passes through as plain tensors."""
    count = sum(isinstance(m, CausalConv3d) and m.weight.shape[2] > 1 for m in layer.modules())
    past = [tape.past() for _ in range(count)]
    start_of_clip = any(frames is None for frames in past)

    def run(x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        inner = Tape(None if start_of_clip else past)
        y = layer(x, inner)
        return (y, *inner.memory)

    y, *kept = checkpoint(run, x, *(() if start_of_clip else past), use_reentrant=False)
    for frames in kept:
        tape.keep(frames)
    return y
