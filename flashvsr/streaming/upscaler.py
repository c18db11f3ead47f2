"""Streaming super-resolution: push LR frames as they come, get SR frames as they are done.

As many frames come out as went in, and the same bits whatever way they were pushed: the model always runs on
25 LR frames first (6 latents, 21 frames out) and on 8 after that; a clip that ends earlier or in between has
its last frame repeated and the surplus cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    other_scale,
    pad_time,
    resolve_ratio,
)
from flashvsr.streaming.preflight import Preflight, budget
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
from flashvsr.streaming.tiling import TiledStream, Tiles, Tiling, lay, overlap_pixels, whole
from flashvsr.weights.folder import FlashVSR, say

STEP_FRAMES = 4 * STEP_LATENTS
VAE_LATENTS = 24  # that a VAE is given again after a retry


def first_latents(frames: int) -> int:
    """Latents of the first call for a clip of `frames`: 2 or 4 when they cover it, else 6."""
    for latents in range(STEP_LATENTS, FIRST_LATENTS, STEP_LATENTS):
        if 4 * latents - 3 >= frames:
            return latents
    return FIRST_LATENTS


class StreamingUpscaler:
    """A one-step model on one stream of frames.

    scale: how many times larger, also fractions from 1 on (the model was made for 4); decoder: tc, vae, or
    auto (tc where the model has one); sparse_ratio: the share of blocks each chunk attends to, as trained
    (auto), or None for all; kv_chunks: past chunks remembered (at least 2); local_range: block rows and
    columns a block sees, or None for all; local_boundary: at the border that window is truncated, as in the
    release, or shifted inside (preserved); attention: backend; color_fix: adain, wavelet or none; seed: of
    the noise; noise: gives a latent's noise instead, a function `(latent index, (16, h, w)) -> float32
    tensor`, h and w at the padded size of the whole picture, or a mapping from latent index to such tensors;
    compile: compiles the blocks of `model` with torch.compile, which takes a minute at the first two pushes
    of a size and needs a C++ compiler (CPU) or Triton (GPU).

    tile: LR pixels of a square tile, rounded up to whole blocks of the output; auto takes the tiles that
    compute the fewest pixels within the memory; overlap: LR pixels that neighbours share at least; memory:
    GiB of the device that model and stream may take together, or auto for 0.9 of what is free: a picture that
    needs more is refused before the first frame (None: not looked at, but with tile=auto, where it is auto);
    offload: projector, DiT and decoder are on the device only for their turn, and what tiles remember waits
    on the host; note: told, in a sentence, of a scale the model was not made for and of a retry.

    Raises UserError for a model that does not stream, a missing part or a setting out of range.
    """

    def __init__(
        self,
        model: FlashVSR,
        *,
        scale: int | float = 4,
        decoder: Literal["auto", "tc", "vae"] = "auto",
        sparse_ratio: float | Literal["auto"] | None = "auto",
        kv_chunks: int = 3,
        local_range: int | None = 11,
        local_boundary: Literal["truncated", "preserved"] = "truncated",
        attention: str = "auto",
        color_fix: Literal["adain", "wavelet", "none"] = "adain",
        seed: int = 0,
        noise: Noise | Mapping[int, Tensor] | None = None,
        compile: bool = False,
        tile: int | Literal["auto"] | None = None,
        overlap: int = 24,
        memory: float | Literal["auto"] | None = None,
        offload: bool = False,
        note: Callable[[str], None] = say,
    ):
        if model.info.kind != "one-step":
            raise UserError(
                f"{model.source} is a model of kind {model.info.kind!r}; only one-step models stream, "
                f"others upscale whole clips (ClipUpscaler)"
            )
        self.output = build(
            Output, {"scale": scale, "decoder": decoder, "color_fix": color_fix, "seed": seed}
        )
        other_scale(scale, note)
        self.settings = build(
            StreamSettings,
            {
                "sparse_ratio": resolve_ratio(model, sparse_ratio),
                "area": model.info.area,
                "kv_chunks": kv_chunks,
                "local_range": local_range,
                "boundary": local_boundary,
                "color_fix": color_fix,
                "attention": attention,
            },
        )
        self.tiling = build(Tiling, {"tile": tile, "overlap": overlap, "memory": memory, "offload": offload})
        self.attention = attention_in_use(model, attention)
        self.model, self.device, self.note = model, model_device(model), note
        self.denoiser = model.denoiser()
        self.compiled = compile
        if compile:
            model.dit.compile_blocks()
        self.decoder_name, self.decoder = choose_decoder(model, decoder)
        if offload:
            for part in (model.dit, model.lr_projector, model.tc_decoder, model.vae):
                if part is not None:
                    part.to("cpu")
        self.noise = noise_source(noise, seed)
        block = model.dit.config.block
        self._multiple = (TOKEN_PIXELS * block[1], TOKEN_PIXELS * block[2])
        self._most: int | None = None  # tiles have fewer pixels: a device has run out of memory
        self._reset()

    @property
    def in_use(self) -> dict[str, Any]:
        """What was chosen, for a report: decoder, attention backend, precision, projector, selection, seed,
        and the tiles, once the first frame has told the size."""
        s, t = self.settings, self.tiling
        return {
            "method": "one-step, streaming",
            "decoder": self.decoder_name,
            "attention": self.attention,
            "precision": str(dtype_of(self.denoiser)).removeprefix("torch."),
            "lr_projector": self.model.info.projector_mode,
            "scale": self.output.scale,
            "sparse_ratio": s.sparse_ratio,
            "kv_chunks": s.kv_chunks,
            "local_range": s.local_range,
            "local_boundary": s.boundary,
            "color_fix": s.color_fix,
            "seed": self.output.seed,
            "tiles": t.tile if self._tiles is None else str(self._tiles),
            "offload": t.offload,
            "compiled": self.compiled,
            "device": str(self.device),
        }

    @property
    def tiles(self) -> Tiles | None:
        """How the picture of the running clip is cut; None before its first frame."""
        return self._tiles

    def _reset(self) -> None:
        self._stream: Stream | TiledStream | None = None
        self._tiles: Tiles | None = None
        self._canvas: Canvas | None = None
        self._retried = False
        self._past: Tensor | None = None  # the last frames given to the model: enough to start it again
        self._waiting: Tensor | None = None  # frames not yet given to the model, uint8 F H W 3
        self._last: Tensor | None = None
        self._position = 0  # latents the model has been given
        self._owed = 0  # frames received and not yet given back

    def push(self, frames: Frames) -> np.ndarray:
        """Takes uint8 `F H W 3`, gives the uint8 `F' sH sW 3` that are done (F' may be 0)."""
        x = check_frames(frames)
        size = (x.shape[1], x.shape[2])
        if self._canvas is None:
            self._begin(Canvas(size, self.output.size(*size), self._multiple, self.device))
            self._waiting = self._past = x[:0]
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
            if self._position == 0:
                need = 4 * first_latents(self._owed) + 1
            self._waiting = pad_time(self._waiting, need, self._last)
            done.append(self._step(need))
        rest = np.concatenate(done) if done else (self._canvas.empty() if self._canvas else no_frames())
        self._reset()
        return rest

    def _next_call(self) -> int:
        """LR frames of the model's next call."""
        return STEP_FRAMES if self._position else 4 * FIRST_LATENTS + 1

    def _step(self, count: int) -> np.ndarray:
        lr = self._waiting[:count]
        frames, ended = self._attempt(lr)
        if frames is None:
            self._start_again(ended)
            frames, ended = self._attempt(lr)
            if frames is None:
                raise UserError(self._ended_again(ended))
        self._position = self._stream.next_latent
        self._past = torch.cat([self._past, lr])[-self._context :]
        self._waiting = self._waiting[count:]
        frames = frames[: self._owed]
        self._owed -= len(frames)
        return frames

    def _attempt(self, frames: Tensor) -> tuple[np.ndarray | None, str]:
        """What `_run` gives, or None and the reason where memory ended. The error itself is gone on return:
        it keeps the tensors of the failed call alive."""
        try:
            return self._run(frames), ""
        except torch.OutOfMemoryError as error:
            return None, str(error).splitlines()[0]

    def _ended_again(self, reason: str) -> str:
        return (
            f"{self.device} is out of memory again ({reason}); take a smaller tile or scale, or offload=True"
        )

    def _run(self, frames: Tensor) -> np.ndarray:
        """One call of the model: uint8 `F H W 3` -> uint8 `F' sH sW 3`."""
        # no_grad, not inference_mode: training validates live modules here, and goes on training them
        with torch.no_grad():
            tiled = isinstance(self._stream, TiledStream)
            lr = self._canvas.place_8bit(frames) if tiled else self._canvas.place(frames)
            return self._canvas.take(self._stream.step(lr))

    # ---- tiles and memory ----

    def _begin(self, canvas: Canvas) -> None:
        """Chooses the tiles of a picture and starts its stream; UserError where the memory is too small."""
        tiling, size = self.tiling, canvas.padded
        shared = overlap_pixels(tiling.overlap, self.output.scale)
        preflight = self._preflight()
        if tiling.tile == "auto":
            tiles = preflight.choose(size, shared, self._multiple, self._most)
            if tiles is None:
                preflight.check(whole(size), shared, self._multiple)
        elif tiling.tile is None:
            tiles = whole(size)
        else:
            tiles = lay(size, tiling.tile, tiling.overlap, self.output.scale, self._multiple)
        if tiles is None or (self._most is not None and tiles.area >= self._most):
            tiles = self._smaller(size)
        if tiling.memory is not None:
            preflight.check(tiles, shared, self._multiple)
        self._canvas, self._tiles = canvas, tiles
        self._stream = self._new_stream(tiles)

    def _preflight(self, limited: bool = True) -> Preflight:
        memory = self.tiling.memory or "auto"
        limit = budget(self.model, self.device, memory) if limited else None
        decoder, offload = self.decoder_name, self.tiling.offload
        return Preflight(self.model, self.settings, decoder, self.device, limit, offload)

    def _new_stream(self, tiles: Tiles) -> Stream | TiledStream:
        def make(noise: Noise) -> Stream:
            return Stream(self.denoiser, self.decoder, self.settings, noise)

        if len(tiles.places) == 1 and not self.tiling.offload:
            return make(self.noise)
        return TiledStream(tiles, make, self.noise, self.device, self.tiling.offload)

    def _smaller(self, canvas: tuple[int, int]) -> Tiles:
        """Tiles of fewer than `_most` pixels; UserError when there are none."""
        shared = overlap_pixels(self.tiling.overlap, self.output.scale)
        tiles = self._preflight(limited=False).choose(canvas, shared, self._multiple, self._most)
        if tiles is None:
            raise UserError(
                f"{self.device} is out of memory and there are no smaller tiles; take a smaller overlap, "
                f"kv_chunks=2 or offload=True"
            )
        return tiles

    @property
    def _context(self) -> int:
        """LR frames from which the state of a running stream is made again: a first call's, those of all the
        chunks it remembers, and what its decoder looks back (the TC decoder: 6 latents; a VAE's many layers
        further, though ever less)."""
        latents = VAE_LATENTS if self.decoder_name == "vae" else FIRST_LATENTS
        return 4 * max(latents, STEP_LATENTS * self.settings.kv_chunks) + 1

    def _start_again(self, reason: str) -> None:
        """After the device ran out of memory: smaller tiles, their state made again from the last frames.

        What was given stays. Of what comes, the keys and values remembered differ a little: in the old
        stream they had seen, through the layers, frames older than these."""
        if self._retried:
            raise UserError(self._ended_again(reason))
        self._retried = True
        old = self._tiles
        self._stream = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._most = old.area // 2 + 1
        self._tiles = self._smaller(self._canvas.padded)
        self.note(
            f"{self.device} is out of memory with tiles: {old}; going on once with tiles: {self._tiles} "
            f"({reason})"
        )
        self._stream = self._new_stream(self._tiles)
        latents = min(self._position, self._context // 4)
        self._stream.next_latent = self._position - latents
        at = 0
        while at < self._past.shape[0]:
            count = STEP_FRAMES if at else min(4 * FIRST_LATENTS + 1, self._past.shape[0])
            frames, ended = self._attempt(self._past[at : at + count])
            if frames is None:
                raise UserError(self._ended_again(ended))
            at += count
