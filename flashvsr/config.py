"""Widths of every module, and the presets that name them. The only place where a width is written.

A config is plain data: it travels in `flashvsr.json`, and code reads it as attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flashvsr.base.cli import UserError

# Wan2.1's latent statistics per channel (golden/README "VAE").
WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True)
class DiTConfig:
    """The Wan2.1 T2V transformer. `block` is the attention block in tokens (time, rows, columns)."""

    dim: int = 1536
    ffn: int = 8960
    layers: int = 30
    heads: int = 12
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_channels: int = 16
    eps: float = 1e-6
    block: tuple[int, int, int] = (2, 8, 8)

    def __post_init__(self) -> None:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise UserError(
                f"dim={self.dim} does not split into heads={self.heads} of an even width; change one of them"
            )
        if self.block[0] != 2:
            raise UserError(f"block={self.block}: a chunk is 2 latents, so a block spans 2 in time")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class ProjectorConfig:
    """LR Proj-In. `mode` is part of a checkpoint's identity: clip, causal (v1.1) or buffer (v1)."""

    hidden1: int = 2048
    hidden2: int = 3072
    out_dim: int = 1536
    layer_num: int = 1
    mode: str = "causal"

    def __post_init__(self) -> None:
        if self.mode not in ("clip", "causal", "buffer"):
            raise UserError(f"projector mode {self.mode!r} is none of clip, causal, buffer")


@dataclass(frozen=True)
class VAEConfig:
    """Wan2.1's VAE of base width `dim`; `mean` and `std` normalise its latents."""

    dim: int = 96
    z_dim: int = 16
    mean: tuple[float, ...] = WAN_MEAN
    std: tuple[float, ...] = WAN_STD


@dataclass(frozen=True)
class TCDecoderConfig:
    """The tiny conditional decoder: widths of its four levels, from latent to pixel size."""

    channels: tuple[int, int, int, int] = (512, 256, 128, 128)
    latent_channels: int = 16


@dataclass(frozen=True)
class ModelConfig:
    """All four modules."""

    dit: DiTConfig = field(default_factory=DiTConfig)
    lr_projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    tc_decoder: TCDecoderConfig = field(default_factory=TCDecoderConfig)


PRESETS: dict[str, ModelConfig] = {
    # Minutes on a CPU: the whole road in `make demo`. 2x4x4 blocks keep sparsity real at 128x128 output.
    "tiny": ModelConfig(
        dit=DiTConfig(
            dim=192, ffn=768, layers=6, heads=3, freq_dim=64, text_dim=32, text_len=8, block=(2, 4, 4)
        ),
        lr_projector=ProjectorConfig(hidden1=96, hidden2=128, out_dim=192),
        vae=VAEConfig(dim=8),
        tc_decoder=TCDecoderConfig(channels=(64, 48, 32, 32)),
    ),
    # Hours on one consumer GPU: experiments that mean something.
    "small": ModelConfig(
        dit=DiTConfig(
            dim=512, ffn=2048, layers=12, heads=8, freq_dim=256, text_dim=64, text_len=16, block=(2, 4, 4)
        ),
        lr_projector=ProjectorConfig(hidden1=256, hidden2=384, out_dim=512),
        vae=VAEConfig(dim=32),
        tc_decoder=TCDecoderConfig(channels=(128, 96, 64, 64)),
    ),
    # The paper's model: Wan2.1-T2V-1.3B with FlashVSR's projector and TC decoder.
    "wan1.3b": ModelConfig(),
}
