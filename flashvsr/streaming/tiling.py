"""Spatial tiles of one stream: every tile a `Stream` of its own, blended into one picture.

Tiles overlap, and in the overlap one fades into the next. Fading happens between tiles only: at the border of
the picture a tile keeps its full weight. Along an axis, the seam of tiles i and i+1 is a ramp S from 0 to 1
around the middle of their overlap, sampled at pixel centres; the weight of tile i is S(i-1) - S(i), with 1
before the first seam and 0 after the last, so that weights sum to 1 wherever seams are. Ramps are rounded to
multiples of 2^-12: products of two and their sums are exact in float32.

Colours are corrected once, on the blended picture, so that tiles cannot differ in their statistics; the noise
of a tile is cut from the noise of the whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from flashvsr.base.cli import UserError
from flashvsr.base.resize import to_signed
from flashvsr.streaming.color import correct
from flashvsr.streaming.stream import (
    FIRST_LATENTS,
    LATENT_PIXELS,
    LOOK_AHEAD,
    TOKEN_PIXELS,
    Noise,
    Stream,
)

Size = tuple[int, int]
STEPS = 2**12  # of a ramp


@dataclass(frozen=True)
class Tiling:
    """How a stream may be cut and how much memory it may take; see `StreamingUpscaler`."""

    tile: int | Literal["auto"] | None = None
    overlap: int = 24
    memory: float | Literal["auto"] | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.tile not in (None, "auto") and self.tile < 1:
            raise UserError(f"tile={self.tile} must be at least 1 LR pixel, auto, or none for no tiles")
        if self.overlap < 0:
            raise UserError(f"overlap={self.overlap} must be at least 0 LR pixels")
        if self.memory not in (None, "auto") and not self.memory > 0:
            raise UserError(f"memory={self.memory} must be above 0 GiB, auto, or none for no limit")


def positions(length: int, side: int, overlap: int) -> list[int]:
    """Where tiles of `side` begin that cover `length`, evenly spread, overlapping by `overlap` or more.

    All in pixels; `length`, `side` and `overlap` are multiples of 16, and so are the positions: a tile's
    tokens are the picture's.
    """
    if side >= length:
        return [0]
    gaps = math.ceil((length - side) / (side - overlap))
    return [(length - side) * i // gaps // TOKEN_PIXELS * TOKEN_PIXELS for i in range(gaps)] + [length - side]


def weights(length: int, starts: list[int], side: int, overlap: int) -> list[Tensor]:
    """Weights of the tiles along one axis, float32 of `side` values each; at every pixel they sum to 1.

    What overlaps beyond `overlap` is left out on both sides of a seam: there a tile knows least.
    """
    centres = torch.arange(length) + 0.5

    def seam(i: int) -> Tensor:
        middle = (starts[i] + side + starts[i + 1]) / 2
        ramp = ((centres - middle) / max(overlap, 1e-3) + 0.5).clamp(0, 1)
        return (ramp * STEPS).round() / STEPS

    seams = [torch.ones(length), *(seam(i) for i in range(len(starts) - 1)), torch.zeros(length)]
    return [(seams[i] - seams[i + 1])[start : start + side] for i, start in enumerate(starts)]


@dataclass(frozen=True)
class Tiles:
    """How a canvas of output pixels is cut: tiles of one size, at least `overlap` in common."""

    canvas: Size
    size: Size
    overlap: int

    @cached_property
    def places(self) -> list[Size]:
        """Top left corners, row by row."""
        rows, columns = (positions(n, s, self.overlap) for n, s in zip(self.canvas, self.size, strict=True))
        return [(top, left) for top in rows for left in columns]

    @cached_property
    def weights(self) -> list[Tensor]:
        """Of every place, float32 of the tile's size."""
        axes = []
        for length, side in zip(self.canvas, self.size, strict=True):
            axes.append(weights(length, positions(length, side, self.overlap), side, self.overlap))
        return [row[:, None] * column for row in axes[0] for column in axes[1]]

    @property
    def area(self) -> int:
        """Pixels of one tile."""
        return self.size[0] * self.size[1]

    @property
    def computed(self) -> int:
        """Pixels of all tiles."""
        return len(self.places) * self.area

    @property
    def redundancy(self) -> float:
        """Pixels computed per pixel of the canvas."""
        return self.computed / (self.canvas[0] * self.canvas[1])

    def __str__(self) -> str:
        if len(self.places) == 1:
            return "none"
        return (
            f"{len(self.places)} of {self.size[0]}x{self.size[1]}, overlap {self.overlap}, "
            f"{self.redundancy:.2f} times the work"
        )


def whole(canvas: Size) -> Tiles:
    """One tile: the canvas."""
    return Tiles(canvas, canvas, 0)


def overlap_pixels(overlap: int, scale: float) -> int:
    """An overlap in LR pixels as one in output pixels, rounded up to whole tokens."""
    return math.ceil(overlap * scale / TOKEN_PIXELS) * TOKEN_PIXELS


def lay(canvas: Size, tile: int, overlap: int, scale: float, multiple: Size) -> Tiles:
    """Square tiles of `tile` LR pixels, rounded up to whole blocks of the output and cut where the canvas is
    smaller. UserError for an overlap that leaves nothing of a tile."""
    shared = overlap_pixels(overlap, scale)
    size = tuple(min(math.ceil(tile * scale / m) * m, n) for m, n in zip(multiple, canvas, strict=True))
    if any(side <= shared and side < n for side, n in zip(size, canvas, strict=True)):
        raise UserError(
            f"overlap={overlap} leaves nothing of a tile={tile}; take an overlap of half of it or less"
        )
    return Tiles(canvas, size, shared)


def candidates(canvas: Size, overlap: int, multiple: Size) -> list[Tiles]:
    """Every way to cut the canvas, those that compute the fewest pixels first, then the fewest tiles.

    overlap in output pixels. Tiles may be oblong; they are at least twice as long as their overlap, so that
    half of a tile or more is its own.
    """
    sides = []
    for length, m in zip(canvas, multiple, strict=True):
        sides.append([s for s in range(m, length + 1, m) if s == length or s >= 2 * overlap])
    every = [Tiles(canvas, (h, w), overlap) for h in sides[0] for w in sides[1]]
    return sorted(every, key=lambda t: (t.computed, len(t.places)))


class TiledStream:
    """Tiles that stream together, with the interface of one `Stream`.

    make: makes a tile's stream from its noise; device: where it computes. With `offload` the projector, the
    DiT and the decoder are on the device only for their turn in each step, which all tiles take together, and
    what tiles remember waits in the host's memory: the same frames, for the time the copies take.
    """

    def __init__(
        self,
        tiles: Tiles,
        make: Callable[[Noise], Stream],
        noise: Noise,
        device: torch.device,
        offload: bool = False,
    ):
        self.tiles, self.device, self.offload = tiles, device, offload
        full = tuple(side // LATENT_PIXELS for side in tiles.canvas)
        # all tiles of a step ask for the same latents
        field = lru_cache(FIRST_LATENTS)(lambda index, channels: noise(index, (channels, *full)))
        self.streams = [make(self._cut_noise(field, place)) for place in tiles.places]
        self.pending: Tensor | None = None

    def _cut_noise(self, field: Callable[[int, int], Tensor], place: Size) -> Noise:
        top, left = (at // LATENT_PIXELS for at in place)

        def cut(index: int, shape: tuple[int, int, int]) -> Tensor:
            return field(index, shape[0])[:, top : top + shape[1], left : left + shape[2]]

        return cut

    @property
    def next_latent(self) -> int:
        return self.streams[0].next_latent

    @next_latent.setter
    def next_latent(self, index: int) -> None:
        for stream in self.streams:
            stream.next_latent = index

    def _part(self, place: Size) -> tuple[slice, slice]:
        return tuple(slice(at, at + side) for at, side in zip(place, self.tiles.size, strict=True))

    @contextmanager
    def _turn(self, module: nn.Module) -> Iterator[None]:
        """The module is on the device meanwhile."""
        if not self.offload:
            yield
            return
        module.to(self.device)
        try:
            yield
        finally:
            module.to("cpu")

    @torch.no_grad()
    def step(self, lr: Tensor) -> Tensor:
        """LR frames at the canvas' size, uint8 `1 3 F H W` -> SR frames `1 3 F' H W`, float32, clamped."""
        first = self.streams[0]
        places = self.tiles.places

        def cut(place: Size) -> Tensor:
            rows, columns = self._part(place)
            return to_signed(lr[..., rows, columns])

        with self._turn(first.denoiser.lr_projector):
            features = [s.project(cut(p)) for s, p in zip(self.streams, places, strict=True)]
        with self._turn(first.denoiser.dit):
            latents = [self._sample(s, f) for s, f in zip(self.streams, features, strict=True)]
        del features
        frames = lr if self.pending is None else torch.cat([self.pending, lr], 2)
        count = frames.shape[2] - LOOK_AHEAD
        self.pending = frames[:, :, count:].clone()
        out = torch.zeros(1, 3, count, *self.tiles.canvas, device=lr.device)
        with self._turn(first.decoder):
            for stream, place, latent, weight in zip(
                self.streams, places, latents, self.tiles.weights, strict=True
            ):
                rows, columns = self._part(place)
                sr = self._render(stream, latent, cut(place))
                out[..., rows, columns] += sr if len(places) == 1 else sr.mul_(weight.to(sr.device))
        for i in range(count):
            frame = slice(i, i + 1)
            reference = to_signed(frames[:, :, frame])
            out[:, :, frame] = correct(out[:, :, frame], reference, first.settings.color_fix)
        return out

    def _sample(self, stream: Stream, features: list[Tensor]) -> Tensor:
        ring = stream.ring
        if self.offload and ring is not None:
            ring.keys, ring.values, ring.pooled = (
                x.to(self.device) for x in (ring.keys, ring.values, ring.pooled)
            )
        latent = stream.sample(features)
        if self.offload:
            ring = stream.ring
            ring.keys, ring.values, ring.pooled = (x.to("cpu") for x in (ring.keys, ring.values, ring.pooled))
        return latent

    def _render(self, stream: Stream, latent: Tensor, lr: Tensor) -> Tensor:
        if self.offload and stream.decoder_memory is not None:
            stream.decoder_memory = tuple(x.to(self.device) for x in stream.decoder_memory)
            stream.pending = stream.pending.to(self.device)
        sr, _ = stream.render(latent, lr)
        if self.offload:
            stream.decoder_memory = tuple(x.to("cpu") for x in stream.decoder_memory)
            stream.pending = stream.pending.to("cpu")
        return sr
