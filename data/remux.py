"""Videos cut into files: at keyframes with the packets as they are, or encoded anew."""

import itertools
from pathlib import Path
from typing import Any

from data.workers import Beat
from flashvsr.base.demux import opened
from flashvsr.base.video_io import VideoWriter, read_frames

# What these containers hold can be put back into one of the same kind; everything else goes into Matroska.
SAME = (".mp4", ".m4v", ".mov")


def split(source: Path, folder: Path, stem: str, most_bytes: int, beat: Beat) -> list[tuple[int, Path]]:
    """Writes the video's packets to files `STEM-NNNN` of about `most_bytes` in `folder`; returns (first
    frame, file) of each, nothing where it cannot be cut. The same source gives the same bytes.

    Cut only where nothing on one side of the cut refers to the other: at keyframes that all frames before
    them in the stream precede in time, and all after them follow. Needs a source whose packets have ordered
    time stamps (`flashvsr.base.demux.frame_times`).
    """
    with opened(source) as (container, stream):
        packets = []
        for packet in container.demux(stream):
            beat()
            if packet.size:
                packets.append((packet.pts, packet.is_keyframe, packet.size))
    starts = _starts(packets, most_bytes)
    if len(starts) == 1:
        return []
    suffix = source.suffix.lower() if source.suffix.lower() in SAME else ".mkv"
    ordered = sorted(pts for pts, _, _ in packets)
    firsts = [ordered.index(packets[start][0]) for start in starts]
    files = [folder / f"{stem}-{n:04d}{suffix}" for n in range(len(starts))]
    with opened(source) as (container, stream):
        incoming = (packet for packet in container.demux(stream) if packet.size)
        for start, end, file in zip(starts, [*starts[1:], len(packets)], files, strict=True):
            _write(itertools.islice(incoming, end - start), stream, file, beat)
    return list(zip(firsts, files, strict=True))


def _starts(packets: list[tuple[int, bool, int]], most_bytes: int) -> list[int]:
    """The packets, by number, at which files begin."""
    latest = list(itertools.accumulate((pts for pts, _, _ in packets), max))
    after = list(itertools.accumulate((pts for pts, _, _ in reversed(packets)), min))[::-1]
    total = list(itertools.accumulate((size for _, _, size in packets), initial=0))
    starts, last = [0], 0
    for i, (pts, is_key, _) in enumerate(packets):
        if i and is_key and latest[i - 1] < pts == after[i]:
            # One whole group more would be too much: begin at the group before.
            if total[i] - total[starts[-1]] > most_bytes and last > starts[-1]:
                starts.append(last)
            last = i
    if total[-1] - total[starts[-1]] > most_bytes and last > starts[-1]:
        starts.append(last)
    return starts


def _write(packets: Any, stream: Any, file: Path, beat: Beat) -> None:
    import av

    from flashvsr.base.files import atomic

    options = {"fflags": "+bitexact"}
    if file.suffix in SAME:
        options["movflags"] = "+faststart"
    with atomic(file) as part, av.open(str(part), "w", container_options=options) as out:
        track = out.add_stream_from_template(stream)
        begin = None
        for packet in packets:
            begin = packet.pts if begin is None else begin
            packet.pts -= begin
            packet.dts = None if packet.dts is None else packet.dts - begin
            packet.stream = track
            out.mux(packet)
            beat()


def encode(
    source: Path, file: Path, start: int, count: int, fps: float, codec: str, crf: float, beat: Beat
) -> None:
    """Writes frames start … start + count - 1 of a clip to `file`, encoded anew."""
    frames = read_frames(source, start, count)
    first = next(frames)
    with VideoWriter(file, fps, *first.shape[:2], codec=codec, crf=crf) as writer:
        for frame in itertools.chain([first], frames):
            writer.write(frame[None])
            beat()
