"""Streaming super-resolution: push LR frames as they come, get SR frames as they are done.

As many frames come out as went in, and the same bits whatever way they were pushed: the model always runs on
25 LR frames first (6 latents, 21 frames out) and on 8 after that; a clip that ends earlier or in between has
its last frame repeated and the surplus cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flashvsr.base.cli import UserError, build
from flashvsr.streaming.frames import (
    Canvas,
    Frames,
    Output,
    attention_in_use,
    check_frames,
    choose_decoder,
    model_device,
    no_frames,
    pad_time,
    resolve_ratio,
)
from flashvsr.streaming.stream import (
    FIRST_LATENTS,
    STEP_LATENTS,
    TOKEN_PIXELS,
    Noise,
    Stream,
    StreamSettings,
    dtype_of,
    noise_source,
)
from flashvsr.weights.folder import FlashVSR

STEP_FRAMES = 4 * STEP_LATENTS


def first_latents(frames: int) -> int:
    """Latents of the first call for a clip of `frames`: 2 or 4 when they cover it, else 6."""
    for latents in range(STEP_LATENTS, FIRST_LATENTS, STEP_LATENTS):
        if 4 * latents - 3 >= frames:
            return latents
    return FIRST_LATENTS


class StreamingUpscaler:
    """A one-step model on one stream of frames.

    scale: how many times larger; decoder: tc, vae, or auto (tc where the model has one); sparse_ratio: the
    share of blocks each chunk attends to, as trained (auto), or None for all; kv_chunks: past chunks
    remembered (at least 2); local_range: block rows and columns a block sees, or None for all; attention:
    backend; color_fix: adain, wavelet or none; seed: of the noise; noise: gives a latent's noise instead, a
    function `(latent index, (16, h, w)) -> float32 tensor`, h and w at the padded size, or a mapping from
    latent index to such tensors; compile: compiles the blocks of `model` with torch.compile, which takes a
    minute at the first two pushes of a size and needs a C++ compiler (CPU) or Triton (GPU).

    Raises UserError for a model that does not stream, a missing part or a setting out of range.
    """

    def __init__(
        self,
        model: FlashVSR,
        *,
        scale: int = 4,
        decoder: Literal["auto", "tc", "vae"] = "auto",
        sparse_ratio: float | Literal["auto"] | None = "auto",
        kv_chunks: int = 3,
        local_range: int | None = 11,
        attention: str = "auto",
        color_fix: Literal["adain", "wavelet", "none"] = "adain",
        seed: int = 0,
        noise: Noise | Mapping[int, Tensor] | None = None,
        compile: bool = False,
    ):
        if model.info.kind != "one-step":
            raise UserError(
                f"{model.source} is a model of kind {model.info.kind!r}; only one-step models stream, "
                f"others upscale whole clips (ClipUpscaler)"
            )
        self.output = build(
            Output, {"scale": scale, "decoder": decoder, "color_fix": color_fix, "seed": seed}
        )
        self.settings = build(
            StreamSettings,
            {
                "sparse_ratio": resolve_ratio(model, sparse_ratio),
                "area": model.info.area,
                "kv_chunks": kv_chunks,
                "local_range": local_range,
                "color_fix": color_fix,
                "attention": attention,
            },
        )
        self.attention = attention_in_use(model, attention)
        self.model, self.device = model, model_device(model)
        self.denoiser = model.denoiser()
        self.compiled = compile
        if compile:
            model.dit.compile_blocks()
        self.decoder_name, self.decoder = choose_decoder(model, decoder)
        self.noise = noise_source(noise, seed)
        block = model.dit.config.block
        self._multiple = (TOKEN_PIXELS * block[1], TOKEN_PIXELS * block[2])
        self._reset()

    @property
    def in_use(self) -> dict[str, Any]:
        """What was chosen, for a report: decoder, attention backend, precision, projector, selection."""
        s = self.settings
        return {
            "method": "one-step, streaming",
            "decoder": self.decoder_name,
            "attention": self.attention,
            "precision": str(dtype_of(self.denoiser)).removeprefix("torch."),
            "lr_projector": self.model.info.projector_mode,
            "sparse_ratio": s.sparse_ratio,
            "kv_chunks": s.kv_chunks,
            "local_range": s.local_range,
            "color_fix": s.color_fix,
            "compiled": self.compiled,
            "device": str(self.device),
        }

    def _reset(self) -> None:
        self._stream = Stream(self.denoiser, self.decoder, self.settings, self.noise)
        self._canvas: Canvas | None = None
        self._waiting: Tensor | None = None  # frames not yet given to the model, uint8 F H W 3
        self._last: Tensor | None = None
        self._owed = 0  # frames received and not yet given back

    def push(self, frames: Frames) -> np.ndarray:
        """Takes uint8 `F H W 3`, gives the uint8 `F' sH sW 3` that are done (F' may be 0)."""
        x = check_frames(frames)
        size = (x.shape[1], x.shape[2])
        if self._canvas is None:
            self._canvas = Canvas(size, self.output.scale, self._multiple, self.device)
            self._waiting = x[:0]
        elif size != self._canvas.lr_size:
            raise UserError(
                f"a frame of {size[0]}x{size[1]} after frames of {self._canvas.lr_size[0]}x"
                f"{self._canvas.lr_size[1]}: flush before a clip of another size"
            )
        if x.shape[0]:
            self._waiting = torch.cat([self._waiting, x])
            self._last = x[-1:].clone()
            self._owed += x.shape[0]
        done = []
        while self._waiting.shape[0] >= (need := self._next_call()):
            done.append(self._step(need))
        return np.concatenate(done) if done else self._canvas.empty()

    def flush(self) -> np.ndarray:
        """Gives the rest, so that as many frames have come out as went in; then a new clip may begin."""
        done = []
        while self._owed:
            need = self._next_call()
            if self._stream.next_latent == 0:
                need = 4 * first_latents(self._owed) + 1
            self._waiting = pad_time(self._waiting, need, self._last)
            done.append(self._step(need))
        rest = np.concatenate(done) if done else (self._canvas.empty() if self._canvas else no_frames())
        self._reset()
        return rest

    def _next_call(self) -> int:
        """LR frames of the model's next call."""
        return STEP_FRAMES if self._stream.next_latent else 4 * FIRST_LATENTS + 1

    def _step(self, count: int) -> np.ndarray:
        # no_grad, not inference_mode: training validates live modules here, and goes on training them
        with torch.no_grad():
            lr = self._canvas.place(self._waiting[:count])
            frames = self._canvas.take(self._stream.step(lr))
        self._waiting = self._waiting[count:]
        frames = frames[: self._owed]
        self._owed -= len(frames)
        return frames
