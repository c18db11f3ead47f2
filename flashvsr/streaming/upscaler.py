"""Streaming super-resolution: push LR frames as they come, get SR frames as they are done.

As many frames come out as went in, and the same bits whatever way they were pushed: the model always runs on
25 LR frames first (6 latents, 21 frames out) and on 8 after that; a clip that ends earlier or in between has
its last frame repeated and the surplus cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from flashvsr.base.cli import UserError, build
from flashvsr.streaming.beside import Beside, borrow
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
from flashvsr.streaming.layout import Layout
from flashvsr.streaming.preflight import Estimate
from flashvsr.streaming.stream import (
    FIRST_LATENTS,
    LOOK_AHEAD,
    STEP_LATENTS,
    TOKEN_PIXELS,
    Noise,
    Stream,
    StreamSettings,
    dtype_of,
    noise_source,
)
from flashvsr.streaming.tiling import TiledStream, Tiles, Tiling
from flashvsr.weights.folder import FlashVSR, say

T = TypeVar("T")
STEP_FRAMES = 4 * STEP_LATENTS
VAE_LATENTS = 24  # that a VAE is given again after a retry


def first_latents(frames: int) -> int:
    """Latents of the first call for a clip of `frames`: 2 or 4 when they cover it, else 6."""
    for latents in range(STEP_LATENTS, FIRST_LATENTS, STEP_LATENTS):
        if 4 * latents - 3 >= frames:
            return latents
    return FIRST_LATENTS


@dataclass
class _Call:
    """One call of the model: the LR frames it takes, uint8 `F h w 3`, and where its result will be, if it has
    been begun."""

    frames: Tensor
    later: Future[np.ndarray] | None = None

    @property
    def latents(self) -> int:
        return self.frames.shape[0] // 4

    @property
    def gives(self) -> int:
        """SR frames: of a clip's first call, the one with a frame over, four less than it takes."""
        count = self.frames.shape[0]
        return count - LOOK_AHEAD if count % STEP_FRAMES else count


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
    on the host; pipelined: the decoder works on one call beside the DiT on the next, and frames are given one
    call later: the same frames (not with tiles or offload, nor where `memory` is too small for both at once;
    on a CPU it helps where torch's threads leave cores idle); note: told, in a sentence, of a scale the model
    was not made for and of a retry.

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
        pipelined: bool = False,
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
        self.attention, self.pipelined = attention_in_use(model, attention), pipelined
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
        self._layout = Layout(
            model, self.settings, self.decoder_name, self.device, self.tiling, scale, self._multiple
        )
        self._beside: Beside | None = None
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
            "pipelined": self.pipelined if self._tiles is None else self._beside is not None,
            "compiled": self.compiled,
            "device": str(self.device),
        }

    @property
    def tiles(self) -> Tiles | None:
        """How the picture of the running clip is cut; None before its first frame."""
        return self._tiles

    @property
    def memory(self) -> Estimate:
        """What the running clip takes, in the preflight's estimate; a clip must have begun."""
        return self._layout.estimate(self._tiles, pipelined=self._beside is not None)

    def _reset(self) -> None:
        self._stream: Stream | TiledStream | None = None
        self._end_beside()
        self._calls: list[_Call] = []  # those not finished, oldest first
        self._tiles: Tiles | None = None
        self._canvas: Canvas | None = None
        self._retried = False
        self._past: Tensor | None = None  # the last frames given to the model: enough to start it again
        self._waiting: Tensor | None = None  # frames not yet given to the model, uint8 F H W 3
        self._last: Tensor | None = None
        self._position = 0  # latents of the calls that are finished
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
            done += self._call(need)
        return self._together(done)

    def flush(self) -> np.ndarray:
        """Gives the rest, so that as many frames have come out as went in; then a new clip may begin."""
        done = []
        while self._owed > sum(call.gives for call in self._calls):
            need = self._next_call()
            if not self._begun:
                need = 4 * first_latents(self._owed) + 1
            self._waiting = pad_time(self._waiting, need, self._last)
            done += self._call(need)
        rest = self._together(done + self._finish_all())
        self._reset()
        return rest

    def settle(self) -> np.ndarray:
        """Gives the frames of all calls that were begun; the clip goes on."""
        return self._together(self._finish_all())

    def _together(self, done: list[np.ndarray]) -> np.ndarray:
        if not done:
            return self._canvas.empty() if self._canvas else no_frames()
        return np.concatenate(done)

    @property
    def _begun(self) -> bool:
        return bool(self._position or self._calls)

    def _next_call(self) -> int:
        """LR frames of the model's next call."""
        return STEP_FRAMES if self._begun else 4 * FIRST_LATENTS + 1

    def _call(self, count: int) -> list[np.ndarray]:
        """Begins a call with the first `count` frames that wait; gives those of the call before it, or, where
        nothing works beside, its own."""
        call = _Call(self._waiting[:count])
        self._waiting = self._waiting[count:]
        self._calls.append(call)
        if self._beside is None:
            return self._finish_all()
        call.later, ended = self._attempt(lambda: self._begin_call(call.frames))
        done = self._finish_all(but=1)
        if call.later is None and self._beside is not None:  # else one before it was the first to fail
            self._start_again(ended)
        return done if call.later is not None else done + self._finish_all()

    def _begin_call(self, frames: Tensor) -> Future[np.ndarray]:
        """The first half of a call, up to the latents, now; the second beside what comes next."""
        stream, canvas = self._stream, self._canvas
        with torch.no_grad():
            lr = canvas.place(frames)
            latent = stream.denoise(lr)

        def decode() -> np.ndarray:
            borrow([latent, lr, *filter(torch.is_tensor, [stream.pending, *(stream.decoder_memory or ())])])
            return canvas.take(stream.finish(latent, lr))

        return self._beside(decode)

    def _finish_all(self, but: int = 0) -> list[np.ndarray]:
        """The frames of the calls that were begun, without those of the last `but`."""
        done = []
        while len(self._calls) > but:
            done.append(self._finish())
        return done

    def _finish(self) -> np.ndarray:
        call = self._calls[0]
        frames, ended = self._attempt(call.later.result if call.later else lambda: self._run(call.frames))
        if frames is None:
            self._start_again(ended)
            frames, ended = self._attempt(lambda: self._run(call.frames))
            if frames is None:
                raise UserError(self._ended_again(ended))
        self._calls.pop(0)
        self._position += call.latents
        self._past = torch.cat([self._past, call.frames])[-self._context :]
        frames = frames[: self._owed]
        self._owed -= len(frames)
        return frames

    def _attempt(self, work: Callable[[], T]) -> tuple[T | None, str]:
        """What `work` gives, or None and the reason where memory ended. The error itself is gone on return:
        it keeps the tensors of the failed call alive."""
        try:
            return work(), ""
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
        self._tiles = self._layout.tiles(canvas.padded)
        self._canvas, self._stream = canvas, self._new_stream(self._tiles)
        if self.pipelined and self._layout.room_beside(self._tiles):
            self._beside = Beside(self.device)

    def _end_beside(self) -> None:
        if self._beside is not None:
            self._beside.close()
            self._beside = None

    def _new_stream(self, tiles: Tiles) -> Stream | TiledStream:
        def make(noise: Noise) -> Stream:
            return Stream(self.denoiser, self.decoder, self.settings, noise)

        if len(tiles.places) == 1 and not self.tiling.offload:
            return make(self.noise)
        return TiledStream(tiles, make, self.noise, self.device, self.tiling.offload)

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
        self._end_beside()
        for call in self._calls:  # what they gave, if anything, is of a stream that goes
            call.later = None
        self._stream = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._tiles = self._layout.after(old)
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
            frames, ended = self._attempt(lambda lr=self._past[at : at + count]: self._run(lr))
            if frames is None:
                raise UserError(self._ended_again(ended))
            at += count
