"""What accompanies the pictures of a video: sound, subtitles, chapters and metadata, copied as they are.

Nothing is encoded again. Where the new file's type cannot hold a sound track, that is said before any work.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from flashvsr.base.cli import UserError

# What a container writes about itself, and what turns frames that are upright already.
_OWN = frozenset(("major_brand", "minor_version", "compatible_brands", "encoder", "rotate", "duration"))
_OTHERS = {".mkv": "matroska", ".mov": "mov"}  # what may hold what OUT cannot


class Companions:
    """The other streams of the video at `source`, from `start` up to `end` (seconds on its clock).

    `attach` adds streams, chapters and metadata to an output container; `up_to` and `rest` then copy what is
    due, so that tracks lie beside each other in the file. Use as a context manager. `dropped` says in words
    what is not copied, `missing` what could not be read.
    """

    def __init__(
        self,
        source: str | Path,
        suffix: str,
        start: Fraction | None = None,
        end: Fraction | None = None,
        audio: bool = True,
    ) -> None:
        import av

        self.source, self.suffix, self.start, self.end = str(source), suffix.lower(), start, end
        self.dropped: list[str] = []
        self.missing: str | None = None
        self._input = av.open(self.source, metadata_errors="replace")
        kinds = ("audio", "subtitle") if audio else ("subtitle",)
        self._streams = [s for s in self._input.streams if s.type in kinds and s.codec_context is not None]
        self._copies: dict[int, Any] = {}
        self._last: dict[int, int] = {}
        self._packets = self._due()
        self._next = None

    def __enter__(self) -> Companions:
        return self

    def __exit__(self, *_: object) -> None:
        self._input.close()

    @property
    def shift(self) -> Fraction:
        """What is taken off all time stamps, in seconds: a cut begins at 0, as does what began later."""
        if self.start is not None:
            return self.start
        begins = [s.start_time * s.time_base for s in self._input.streams if s.start_time is not None]
        return max(min(begins, default=Fraction(0)), Fraction(0))

    def attach(self, output: Any) -> None:
        """Adds streams, chapters and metadata to a container that is open for writing.

        UserError for sound that its type cannot hold; subtitles that it cannot hold are left out.
        """
        for stream in self._streams:
            name = stream.codec_context.name
            codec = stream.codec_context.codec.canonical_name
            if codec not in output.supported_codecs:
                what = f"{stream.type} track of kind {name}"
                other = next((s for s, format in _OTHERS.items() if codec in _held_by(format)), None)
                if stream.type == "audio":
                    hint = f"name OUT {other}" if other else "convert it to AAC first"
                    raise UserError(
                        f"{self.source}: its {what} cannot be copied into a {self.suffix} file; {hint}, or "
                        f"leave the sound out with --no-audio"
                    )
                hint = f", a {other} file can" if other else ""
                self.dropped.append(f"{what} (a {self.suffix} file cannot hold it{hint})")
                continue
            copy = output.add_stream_from_template(stream)
            copy.metadata.update(_kept(stream.metadata))
            copy.disposition = stream.disposition
            copy.time_base = stream.time_base
            self._copies[stream.index] = copy
        others = {s.type for s in self._input.streams if s.type in ("data", "attachment") and not _text(s)}
        self.dropped += [f"{kind} track" for kind in sorted(others)]
        if len(self._input.streams.video) > 1:
            self.dropped.append("video track or cover picture beside the first video track")
        output.metadata.update(_kept(self._input.metadata))
        chapters = [c for c in map(self._cut, self._input.chapters()) if c is not None]
        if chapters:
            output.set_chapters(chapters)

    def _cut(self, chapter: dict[str, Any]) -> dict[str, Any] | None:
        """A chapter on the new clock; None when it lies outside."""
        base, shift = chapter["time_base"], self.shift
        begin, end = chapter["start"] * base, chapter["end"] * base
        begin = max(begin, self.start) if self.start is not None else begin
        end = min(end, self.end) if self.end is not None else end
        if begin >= end:
            return None
        times = {"start": round((begin - shift) / base), "end": round((end - shift) / base)}
        return chapter | times

    def up_to(self, output: Any, seconds: Fraction | None) -> None:
        """Copies the packets that are due at `seconds` on the new clock (None: all that are left)."""
        while True:
            if self._next is None:
                self._next = next(self._packets, None)
            if self._next is None or (seconds is not None and self._next[0] > seconds):
                return
            output.mux(self._next[1])
            self._next = None

    def _due(self) -> Iterator[tuple[Fraction, Any]]:
        """(time on the new clock, packet of the new file) in the order they lie in the file."""
        import av

        chosen = [s for s in self._streams if s.index in self._copies]
        if not chosen:
            return
        packets = self._input.demux(chosen)
        while True:
            try:
                packet = next(packets, None)
            except IndexError:  # PyAV: a packet of a stream that appears only now
                packets = self._input.demux(chosen)
                continue
            except av.error.FFmpegError as error:
                self.missing = (
                    f"{self.source}: sound and subtitles cannot be read to their end ({error.strerror})"
                )
                return
            if packet is None:
                return
            if (copied := self._moved(packet)) is not None:
                yield copied.dts * copied.time_base, copied

    def _moved(self, packet: Any) -> Any:
        """The packet on the new clock and in the new stream; None for what lies outside or has no time."""
        if packet.size == 0 or packet.pts is None or packet.dts is None or packet.pts < packet.dts:
            return None
        index, at = packet.stream.index, packet.pts * packet.time_base
        outside = (self.start is not None and at < self.start) or (self.end is not None and at >= self.end)
        if outside or packet.dts <= self._last.get(index, packet.dts - 1):
            return None
        self._last[index] = packet.dts
        shift = round(self.shift / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        packet.stream = self._copies[index]
        return packet


def _held_by(format: str) -> set[str]:
    import av

    with av.open(io.BytesIO(), "w", format=format) as file:
        return file.supported_codecs


def _kept(metadata: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in metadata.items() if k.lower() not in _OWN and not k.startswith("_STATISTICS")}


def _text(stream: Any) -> bool:
    """Chapters lie in an MP4 as a data track as well."""
    return stream.metadata.get("handler_name") == "SubtitleHandler"
