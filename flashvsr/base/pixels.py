"""Decoded video frames to RGB pixels: upright, resized or cut, always the same bits.

A cut converts only what it shows and what the chroma filter reaches around it; its pixels are those of the
whole frame converted and then cut, bit for bit.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np

# swscale's bicubic chroma filter reaches 4 pixels; multiples of 16 keep chroma grids and dithers in phase.
MARGIN = 16
# From these swscale writes planar RGB with vector instructions, packed RGB without: the same values, later.
_PLANAR_YUV = re.compile(r"yuvj?4[0-4]{2}p(\d\d[lb]e)?")

Box = tuple[int, int, int, int]  # top, left, height, width


def cut(pixels: np.ndarray, box: Box) -> np.ndarray:
    """A box out of `H W 3`, less where that ends earlier."""
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


class ToRGB:
    """Converts the frames of one clip to uint8 `H W 3` RGB, upright.

    `size` = (h, w) resizes (bicubic, antialiased); `crop` (top, left, height, width) then cuts. Frames that
    change their size within the clip are resized to the first one's.
    """

    def __init__(self, size: tuple[int, int] | None = None, crop: Box | None = None) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        # Exact and alike on every CPU; swscale widens the bicubic filter when it shrinks.
        flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        self._flags = flags | Interpolation.BITEXACT
        self._reformatter = VideoReformatter()
        self._size, self._crop = size, crop
        self._graph: tuple[Any, Any] | None = None  # what it was made for, and the crop filter

    def __call__(self, frame: Any) -> np.ndarray:
        turns = round(frame.rotation / 90) % 4
        if self._size is None:
            self._size = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
        height, width = self._size[::-1] if turns % 2 else self._size
        crop = self._crop and _turned(self._crop, turns, height, width)
        if crop and (frame.height, frame.width) == (height, width):
            top, left, bottom, right = _around(frame, crop)
            if (bottom - top, right - left) != (height, width):
                frame = self._cut(frame, top, left, bottom, right)
                height, width = bottom - top, right - left
                crop = (crop[0] - top, crop[1] - left, *crop[2:])
        to = "gbrp" if _PLANAR_YUV.fullmatch(frame.format.name) else "rgb24"
        frame = self._reformatter.reformat(frame, width, height, to, interpolation=self._flags, threads=1)
        pixels = frame.to_ndarray()
        if crop:
            pixels = cut(pixels, crop)
        return np.ascontiguousarray(np.rot90(pixels, turns))

    def _cut(self, frame: Any, top: int, left: int, bottom: int, right: int) -> Any:
        """A part of a frame: FFmpeg's crop filter moves pointers and copies nothing."""
        made_for = (frame.format.name, frame.width, frame.height, top, left, bottom, right)
        if self._graph is None or self._graph[0] != made_for:
            from av.filter import Graph

            graph = Graph()
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format.name,
                time_base=frame.time_base or Fraction(1, 25),
            )
            crop = graph.add("crop", f"{right - left}:{bottom - top}:{left}:{top}:exact=1")
            source.link_to(crop)
            crop.link_to(graph.add("buffersink"))
            graph.configure()
            self._graph = made_for, graph
        graph = self._graph[1]
        graph.push(frame)
        return graph.pull()


def _turned(crop: Box, turns: int, height: int, width: int) -> Box:
    """A box of the upright picture as a box of the stored one, `height` x `width`; upright = rot90^turns."""
    top, left, h, w = crop
    if turns == 1:
        return left, width - top - h, w, h
    if turns == 2:
        return height - top - h, width - left - w, h, w
    if turns == 3:
        return height - left - w, top, w, h
    return crop


def _around(frame: Any, crop: Box) -> Box:
    """Top, left, bottom, right of what must be converted for the box; all where a part is not exact."""
    whole = (0, 0, frame.height, frame.width)
    if not _PLANAR_YUV.fullmatch(frame.format.name):
        return whole
    luma, chroma = frame.planes[0], frame.planes[1]
    if luma.width % chroma.width or luma.height % chroma.height:
        return whole  # an odd size stretches its chroma a little, and not alike everywhere
    top, left, h, w = crop
    return (
        max(0, (top - MARGIN) // MARGIN * MARGIN),
        max(0, (left - MARGIN) // MARGIN * MARGIN),
        min(frame.height, -(-(top + h + MARGIN) // MARGIN) * MARGIN),
        min(frame.width, -(-(left + w + MARGIN) // MARGIN) * MARGIN),
    )
