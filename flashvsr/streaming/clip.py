"""Whole clips with n sampler steps: the teacher (dense) and the sparse student (chunk-causal).

Nothing comes out before the clip has ended; memory grows with it. Same frames in and out as the streaming
upscaler, same padding, same decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flashvsr import flow
from flashvsr.attention.plans import CHUNK, PackedDense, Plan, SparseCausal, training_ratio
from flashvsr.base.cli import UserError, build
from flashvsr.streaming.color import correct
from flashvsr.streaming.frames import (
    Canvas,
    Frames,
    Output,
    attention_in_use,
    check_frames,
    choose_decoder,
    model_device,
    no_frames,
    other_scale,
    pad_time,
    resolve_ratio,
)
from flashvsr.streaming.stream import (
    LATENT_PIXELS,
    STEP_LATENTS,
    TOKEN_PIXELS,
    Noise,
    decode,
    dtype_of,
    noise_source,
)
from flashvsr.weights.folder import FlashVSR, say


class ClipUpscaler:
    """A teacher or sparse student on one clip.

    steps: of the Euler sampler (default: what the model was made for); attention, sparse_ratio: of a sparse
    student only; on_step: called after every sampler step and decoded piece with (done, total); the other
    settings as in `StreamingUpscaler`. Raises UserError for a model that streams, a missing part, a setting
    out of range or without effect.
    """

    def __init__(
        self,
        model: FlashVSR,
        *,
        steps: int | None = None,
        scale: int | float = 4,
        decoder: Literal["auto", "tc", "vae"] = "auto",
        sparse_ratio: float | Literal["auto"] | None = "auto",
        attention: str = "auto",
        color_fix: Literal["adain", "wavelet", "none"] = "adain",
        seed: int = 0,
        noise: Noise | Mapping[int, Tensor] | None = None,
        on_step: Callable[[int, int], None] | None = None,
        note: Callable[[str], None] = say,
    ):
        if model.info.kind not in ("teacher", "sparse"):
            raise UserError(
                f"{model.source} is a model of kind {model.info.kind!r}; a teacher or a sparse student "
                f"upscales whole clips, a one-step model streams (StreamingUpscaler)"
            )
        self.sparse = model.info.kind == "sparse"
        if not self.sparse and (attention, sparse_ratio) != ("auto", "auto"):
            raise UserError("attention and sparse_ratio have no effect on a teacher, which attends to all")
        self.steps = model.info.steps if steps is None else steps
        if not isinstance(self.steps, int) or self.steps < 1:
            raise UserError(f"steps={self.steps!r} must be a whole number of at least 1")
        self.output = build(
            Output, {"scale": scale, "decoder": decoder, "color_fix": color_fix, "seed": seed}
        )
        other_scale(scale, note)
        self.sparse_ratio = resolve_ratio(model, sparse_ratio)
        self.attention = attention
        self.attention_in_use = attention_in_use(model, attention) if self.sparse else "dense"
        self.model, self.device = model, model_device(model)
        self.denoiser = model.denoiser()
        self.decoder_name, self.decoder = choose_decoder(model, decoder)
        self.noise = noise_source(noise, seed)
        self.on_step = on_step
        self._reset()

    @property
    def in_use(self) -> dict[str, Any]:
        """What was chosen, for a report: decoder, attention backend, precision, projector, steps."""
        chosen = {
            "method": f"{self.model.info.kind}, whole clip, {self.steps} steps",
            "decoder": self.decoder_name,
            "attention": self.attention_in_use,
            "precision": str(dtype_of(self.denoiser)).removeprefix("torch."),
            "lr_projector": self.model.info.projector_mode,
            "color_fix": self.output.color_fix,
            "device": str(self.device),
        }
        if self.sparse:
            chosen |= {"sparse_ratio": self.sparse_ratio, "window": self.model.info.window}
        return chosen

    def _reset(self) -> None:
        self._frames: list[Tensor] = []

    def push(self, frames: Frames) -> np.ndarray:
        """Takes uint8 `F H W 3`; gives no frame yet, uint8 `0 sH sW 3`."""
        x = check_frames(frames)
        if self._frames and x.shape[1:] != self._frames[0].shape[1:]:
            raise UserError(
                f"a frame of {x.shape[1]}x{x.shape[2]} after frames of {self._frames[0].shape[1]}x"
                f"{self._frames[0].shape[2]}: flush before a clip of another size"
            )
        self._frames.append(x.clone())
        return np.empty((0, *self.output.size(*x.shape[1:3]), 3), np.uint8)

    def flush(self) -> np.ndarray:
        """Runs the model on all frames pushed and gives as many; then a new clip may begin."""
        if not self._frames:
            return no_frames()
        frames = torch.cat(self._frames)
        self._reset()
        count = frames.shape[0]
        block = self.model.dit.config.block if self.sparse else (1, 1, 1)
        canvas = Canvas(
            tuple(frames.shape[1:3]),
            self.output.size(*frames.shape[1:3]),
            (TOKEN_PIXELS * block[1], TOKEN_PIXELS * block[2]),
            self.device,
        )
        if count == 0:
            return canvas.empty()
        latents = -(-(count + 3) // 4)  # 4n - 3 frames out cover the clip
        latents = -(-latents // CHUNK) * CHUNK if self.sparse else latents
        pieces = -(-latents // STEP_LATENTS)
        done = _Counter(self.steps + pieces, self.on_step)
        with torch.no_grad():
            lr = canvas.place(pad_time(frames, 4 * latents + 1, frames[-1:]))
            z = self._sample(lr, latents, done)
            return self._decode(z, lr, canvas, done)[:count]

    def _plan(self, latents: int, height: int, width: int) -> Plan:
        config, info = self.model.dit.config, self.model.info
        grid = (latents, height // TOKEN_PIXELS, width // TOKEN_PIXELS)
        if not self.sparse:
            return PackedDense([grid], config.head_dim, self.device)
        return SparseCausal(
            grid,
            block=config.block,
            head_dim=config.head_dim,
            ratio=training_ratio(self.sparse_ratio, info.area, height, width),
            window=info.window,
            backend=self.attention,
            device=self.device,
        )

    def _sample(self, lr: Tensor, latents: int, done: _Counter) -> Tensor:
        """LR frames `1 3 4n+1 H W` -> latents `1 16 n h w`, by Euler steps from sigma 1 to 0."""
        height, width = lr.shape[-2:]
        features = self.denoiser.features([lr.to(dtype_of(self.denoiser))])
        shape = (self.model.dit.config.in_channels, height // LATENT_PIXELS, width // LATENT_PIXELS)
        noise = torch.stack([self.noise(i, shape) for i in range(latents)], 1)[None].to(lr)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            plan = self._plan(latents, height, width)  # a new one every step: it keeps its choice of blocks
            (v,) = self.denoiser([x], sigma[:, None], plan, features=features)
            done.add()
            return v.to(x.dtype)

        return flow.euler(velocity, noise, flow.sampling_sigmas(self.steps))

    def _decode(self, z: Tensor, lr: Tensor, canvas: Canvas, done: _Counter) -> np.ndarray:
        """In pieces of two latents, so that memory does not grow with the clip here."""
        frames, memory, at = [], None, 0
        for piece in z.split(STEP_LATENTS, 2):
            count = 4 * piece.shape[2] - 3 * (at == 0)
            reference = lr[:, :, at : at + count]
            sr, memory = decode(self.decoder, piece, reference, memory)
            frames.append(canvas.take(correct(sr, reference, self.output.color_fix)))
            at += count
            done.add()
        return np.concatenate(frames)


class _Counter:
    """Counts pieces of work for whoever wants to know."""

    def __init__(self, total: int, tell: Callable[[int, int], None] | None):
        self.done, self.total, self.tell = 0, total, tell

    def add(self) -> None:
        self.done += 1
        if self.tell is not None:
            self.tell(self.done, self.total)
