"""Which tiles a picture is cut into, within the memory of the device."""

from __future__ import annotations

import torch

from flashvsr.base.cli import UserError
from flashvsr.streaming.preflight import Estimate, Preflight, budget
from flashvsr.streaming.stream import StreamSettings
from flashvsr.streaming.tiling import Size, Tiles, Tiling, lay, overlap_pixels, whole
from flashvsr.weights.folder import FlashVSR


class Layout:
    """What is chosen before a picture's first frame, and anew after the device ran out of memory.

    Canvases are padded outputs, in pixels; they and tiles are multiples of `multiple`. scale: of the output.
    """

    def __init__(
        self,
        model: FlashVSR,
        settings: StreamSettings,
        decoder: str,
        device: torch.device,
        tiling: Tiling,
        scale: float,
        multiple: Size,
    ):
        self._model, self._settings, self._decoder, self._device = model, settings, decoder, device
        self._tiling, self._scale, self._multiple = tiling, scale, multiple
        self._overlap = overlap_pixels(tiling.overlap, scale)
        self._below: int | None = None  # pixels of a tile: the device has run out of memory

    def tiles(self, canvas: Size) -> Tiles:
        """The tiles of a picture; UserError, with what would fit, where the memory is too small."""
        tiling = self._tiling
        if tiling.tile == "auto":
            preflight = self._preflight()
            tiles = preflight.choose(canvas, self._overlap, self._multiple, self._below)
            if tiles is None:
                preflight.check(whole(canvas), self._overlap, self._multiple)
        elif tiling.tile is None:
            tiles = whole(canvas)
        else:
            tiles = lay(canvas, tiling.tile, tiling.overlap, self._scale, self._multiple)
        if tiles is None or (self._below is not None and tiles.area >= self._below):
            tiles = self._smaller(canvas)
        if tiling.memory is not None:
            self._preflight().check(tiles, self._overlap, self._multiple)
        return tiles

    def after(self, tiles: Tiles) -> Tiles:
        """Tiles of half the pixels or less, for this picture and those to come: with `tiles` the device ran
        out of memory. UserError when there are none."""
        self._below = tiles.area // 2 + 1
        return self._smaller(tiles.canvas)

    def room_beside(self, tiles: Tiles) -> bool:
        """Whether the memory allows the decoder beside the next call's DiT; not with tiles or offload."""
        if len(tiles.places) > 1 or self._tiling.offload:
            return False
        return self._tiling.memory is None or self._preflight().fits(tiles, pipelined=True)

    def estimate(self, tiles: Tiles, pipelined: bool) -> Estimate:
        """What a picture cut so takes."""
        return self._preflight(limited=False).estimate(tiles, pipelined=pipelined)

    def _preflight(self, limited: bool = True) -> Preflight:
        memory = self._tiling.memory or "auto"
        limit = budget(self._model, self._device, memory) if limited else None
        return Preflight(
            self._model, self._settings, self._decoder, self._device, limit, self._tiling.offload
        )

    def _smaller(self, canvas: Size) -> Tiles:
        tiles = self._preflight(limited=False).choose(canvas, self._overlap, self._multiple, self._below)
        if tiles is None:
            raise UserError(
                f"{self._device} is out of memory and there are no smaller tiles; take a smaller overlap, "
                f"kv_chunks=2 or offload=True"
            )
        return tiles
