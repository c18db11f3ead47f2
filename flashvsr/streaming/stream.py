"""The whole state of one tile of one stream, and its one step.

A step takes LR frames at output size (4n+1 in the first call, n <= 6 latents; 4n later), runs projector,
one-step DiT and decoder, corrects colours, and gives 4n-3 frames first and 4n later: the model looks four
LR frames ahead. Nothing in here grows with time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flashvsr.attention.plans import CachedStreaming, training_ratio
from flashvsr.attention.ring import Ring
from flashvsr.attention.selection import local_window
from flashvsr.base.cli import UserError
from flashvsr.base.draws import generator
from flashvsr.models.denoiser import Denoiser
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.streaming.beside import upload
from flashvsr.streaming.color import correct

LOOK_AHEAD = 4  # LR frames the projector reads beyond the frames of a latent
FIRST_LATENTS, STEP_LATENTS = 6, 2
LATENT_PIXELS, TOKEN_PIXELS = 8, 16

Noise = Callable[[int, tuple[int, int, int]], Tensor]  # latent index, (16, h, w) -> float32 tensor


def seeded_noise(seed: int) -> Noise:
    """Noise of latent i from (seed, i) alone, however frames are pushed."""
    return lambda index, shape: torch.randn(shape, generator=generator(seed, "stream.noise", index))


def noise_source(noise: Noise | Mapping[int, Tensor] | None, seed: int) -> Noise:
    """Where a latent's noise comes from: a function, a mapping from latent index to tensor, or the seed.

    The result raises UserError for a latent that the mapping lacks and for noise of another shape.
    """
    if noise is None:
        return seeded_noise(seed)

    def given(index: int, shape: tuple[int, int, int]) -> Tensor:
        if isinstance(noise, Mapping):
            if index not in noise:
                raise UserError(
                    f"the given noise has nothing for latent {index}; give each a tensor {shape}, also "
                    f"those of the last frame's repeats, or give a function (index, shape) -> tensor"
                )
            drawn = noise[index]
        else:
            drawn = noise(index, shape)
        if tuple(drawn.shape) != tuple(shape):
            raise UserError(f"the given noise of latent {index} is {tuple(drawn.shape)} instead of {shape}")
        return drawn

    return given


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's weights. LR frames, latents and colours stay float32 around all of them."""
    return next(module.parameters()).dtype


def decode(
    decoder: TCDecoder | WanVAE, latent: Tensor, reference: Tensor, memory: tuple | None
) -> tuple[Tensor, tuple]:
    """Latents `B 16 n h w` and their LR frames `B 3 F H W` -> frames before colour correction; memory.

    F = 4n-3 in the first call (`memory=None`), 4n later. VAE frames are clamped, TC frames are not. Two
    latents at a time: a first call's six would hold three times the activations.
    """
    frames, at = [], 0
    for piece in latent.to(dtype_of(decoder)).split(STEP_LATENTS, 2):
        count = 4 * piece.shape[2] - 3 * (memory is None)
        if isinstance(decoder, TCDecoder):
            sr, memory = decoder(piece, reference[:, :, at : at + count], memory)
        else:
            sr, memory = decoder.decode(piece, memory)
            sr = sr.clamp(-1, 1)
        # what is kept are last frames of long activations: as copies, so that those can go
        memory = tuple(kept.clone() for kept in memory)
        frames.append(sr.to(reference.dtype))
        at += count
    return torch.cat(frames, 2), memory


@dataclass(frozen=True)
class StreamSettings:
    """How a stream selects, remembers, decodes and colours; see `StreamingUpscaler`."""

    sparse_ratio: float | None = 2.0
    area: int = 768 * 1280
    kv_chunks: int = 3
    local_range: int | None = 11
    boundary: Literal["truncated", "preserved"] = "truncated"
    color_fix: str = "adain"
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.kv_chunks < 2:
            raise UserError(
                f"kv_chunks={self.kv_chunks}: a stream keeps at least 2 past chunks (as the release does)"
            )
        if self.local_range is not None and self.local_range < 1:
            raise UserError(f"local_range={self.local_range} must be at least 1, or none for no limit")
        if self.local_range is None and self.boundary != "truncated":
            raise UserError(f"local_boundary={self.boundary!r} has no effect without a local_range")


class Stream:
    """One clip, batch 1 or more, of fixed output size.

    `decoder` is a TCDecoder (conditioned on the LR frames) or a WanVAE (its frames are clamped before the
    colour correction).
    """

    def __init__(
        self, denoiser: Denoiser, decoder: TCDecoder | WanVAE, settings: StreamSettings, noise: Noise
    ):
        self.denoiser, self.decoder, self.settings, self.noise = denoiser, decoder, settings, noise
        self.next_latent = 0
        self.projector_memory = None
        self.decoder_memory = None
        self.pending: Tensor | None = None  # LR frames whose latents are still to come
        self.ring: Ring | None = None
        self.local: Tensor | None = None

    def _begin(self, rows: int, columns: int) -> None:
        config, s = self.denoiser.dit.config, self.settings
        blocks = (rows // config.block[1], columns // config.block[2])
        per_chunk = blocks[0] * blocks[1]
        block_tokens = config.block[0] * config.block[1] * config.block[2]
        self.ring = Ring(s.kv_chunks, config.layers, per_chunk * block_tokens, per_chunk)
        if s.local_range is not None:
            self.local = local_window(*blocks, s.local_range, s.boundary).to(
                self.denoiser.dit.patch_embedding.weight.device
            )

    def plan(self, latents: int, height: int, width: int) -> CachedStreaming:
        """The attention plan of the next `latents` at an output size in pixels."""
        config, s = self.denoiser.dit.config, self.settings
        grid = (latents, height // TOKEN_PIXELS, width // TOKEN_PIXELS)
        if self.ring is None:
            self._begin(grid[1], grid[2])
        return CachedStreaming(
            grid,
            self.next_latent,
            self.ring,
            block=config.block,
            head_dim=config.head_dim,
            ratio=training_ratio(s.sparse_ratio, s.area, height, width),
            local=self.local,
            backend=s.attention,
            device=self.denoiser.dit.patch_embedding.weight.device,
        )

    def project(self, lr: Tensor) -> list[Tensor]:
        """LR frames `B 3 F H W` in [-1,1] -> per fed layer features `B n H/16 W/16 D`."""
        if self.next_latent == 0 and lr.shape[2] > 4 * FIRST_LATENTS + 1:
            raise UserError(f"the first call takes at most {4 * FIRST_LATENTS + 1} LR frames")
        projector = self.denoiser.lr_projector
        features, memory = projector(lr.to(dtype_of(projector)), self.projector_memory)
        if memory is not None:  # None of a mode that cannot stream: one call is all it takes
            self.projector_memory = tuple(kept.clone() for kept in memory)
        return features

    def sample(self, features: list[Tensor]) -> Tensor:
        """Features of the next n latents -> latents `B 16 n h w` (z = noise - velocity at sigma 1)."""
        batch, n, rows, columns = features[0].shape[:4]
        height, width = rows * TOKEN_PIXELS, columns * TOKEN_PIXELS
        device = features[0].device
        plan = self.plan(n, height, width)
        channels = self.denoiser.dit.config.in_channels
        shape = (channels, height // LATENT_PIXELS, width // LATENT_PIXELS)
        noise = torch.stack([self.noise(self.next_latent + i, shape) for i in range(n)], 1)
        noise = upload(noise.float(), device).expand(batch, -1, -1, -1, -1)
        sigma = torch.ones(batch, 1, device=device)
        (v,) = self.denoiser([noise], sigma, plan, features=[[f] for f in features])
        self.ring.advance(plan.chunks)
        self.next_latent += n
        return noise - v.to(noise.dtype)

    def denoise(self, lr: Tensor) -> Tensor:
        """LR frames `B 3 F H W` in [-1,1] -> latents `B 16 n h w`."""
        return self.sample(self.project(lr))

    def render(self, latent: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and the LR frames they came from -> SR frames before colour correction, and the LR frames
        of the same time."""
        frames_in = lr if self.pending is None else torch.cat([self.pending, lr], 2)
        count = frames_in.shape[2] - LOOK_AHEAD
        reference, self.pending = frames_in[:, :, :count], frames_in[:, :, count:].clone()
        sr, self.decoder_memory = decode(self.decoder, latent, reference, self.decoder_memory)
        return sr, reference

    def run(self, lr: Tensor) -> Tensor:
        """The core on a whole clip: F = 8n+1 LR frames `B 3 F H W` at output size -> F-4 SR frames.

        25 frames first, then 8 at a time (a shorter clip in one call); UserError for another F.
        """
        count, first = lr.shape[2], 4 * FIRST_LATENTS + 1
        if count < 9 or count % 8 != 1:
            raise UserError(f"the core takes 8n+1 LR frames from 9 on, got {count}")
        starts = [0, *range(first, count, 4 * STEP_LATENTS)]
        ends = [*starts[1:], count]
        return torch.cat([self.step(lr[:, :, a:b]) for a, b in zip(starts, ends, strict=True)], 2)

    @torch.no_grad()
    def step(self, lr: Tensor) -> Tensor:
        """LR frames at output size, `B 3 F H W` in [-1,1] -> SR frames, clamped."""
        return self.finish(self.denoise(lr), lr)

    @torch.no_grad()
    def finish(self, latent: Tensor, lr: Tensor) -> Tensor:
        """The second half of a step, from what `denoise` gave for `lr`. It shares no memory with the first:
        that may already be at the next LR frames."""
        sr, reference = self.render(latent, lr)
        return correct(sr, reference, self.settings.color_fix)
