"""`python -m data bench --shards DIR`: what reaching a clip costs, and the loader's rate by workers.

The plain way of reaching a clip decodes its video from the beginning, converts whole frames and cuts them.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from data.bench import table
from data.clips import Clips
from data.latents import cached
from data.loader import DataConfig, batches, open_dataset
from data.reader import Reader, _Window
from data.shards import Sample
from flashvsr.base.cli import UserError
from flashvsr.base.demux import opened
from flashvsr.base.files import write_json
from flashvsr.base.measure import interleaved, machine, time_median

WORKERS = (0, 1, 2)


def run(shards: str, size: str, frames: int, preset: str, json: str | None) -> str:
    """Measures, writes `json` if asked, returns the table. A sample has 4n+1 frames, at most `frames`."""
    height, _, width = size.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise UserError(f"--size {size!r} must be HEIGHTxWIDTH, for example 256x256")
    sides = {"height": int(height), "width": int(width)}
    n = max(1, (frames - 1) // 4)
    config = DataConfig(shards=shards, latents_per_clip=n, slots=8, degradation=preset, **sides)
    clips = open_dataset(config, 0)
    rows = [*reach_rows(clips), *loader_rows(clips)]
    if json is not None:
        facts = {"machine": machine(), "shards": shards, "size": size, "frames": config.frames}
        write_json(json, facts | {"preset": preset, "rows": rows})
    return table(rows, "frames/s", 50)


def reach_rows(clips: Clips) -> list[dict]:
    """For every video of the split: frames per second of a crop out of its last frames, ours and plainly."""
    rows = []
    for sample in clips.videos:
        count = min(clips.config.frames, sample.frames)
        place = clips.source, sample, sample.frames - count, count, clips.config.video_size
        assert np.array_equal(_ours(*place), _plainly(*place))
        ways = {"ours": partial(_ours, *place), "plain": partial(_plainly, *place)}
        seconds = interleaved(ways, repeats=3, warmup=0)
        rows.append(
            {
                "name": f"reach {sample.key} ({sample.width}x{sample.height}, frame {place[2]})",
                "frames_per_second": count / seconds["ours"],
                "plain_frames_per_second": count / seconds["plain"],
            }
        )
    return rows


def _ours(reader: Reader, sample: Sample, start: int, count: int, size: tuple[int, int]) -> np.ndarray:
    return reader.frames(sample, start, count, crop=(0, 0, *size))


def _plainly(reader: Reader, sample: Sample, start: int, count: int, size: tuple[int, int]) -> np.ndarray:
    """Every frame up to the last wanted one is decoded; those are converted whole to packed RGB and cut."""
    from av.video.reformatter import Interpolation, VideoReformatter

    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    flags |= Interpolation.BITEXACT
    reformatter, first, frames = VideoReformatter(), sample.start + start, []
    with reader.shards.open(sample.shard) as file:
        window = _Window(file, sample.offset, sample.size, sample.shard)
        with opened(window) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                if number >= first:
                    turns = round(frame.rotation / 90)
                    frame = reformatter.reformat(frame, format="rgb24", interpolation=flags, threads=1)
                    frames.append(np.rot90(frame.to_ndarray(), turns)[: size[0], : size[1]])
                if len(frames) == count:
                    break
    return np.stack(frames)


def loader_rows(clips: Clips) -> list[dict]:
    """Samples and frames per second of the loader by workers: all made anew, and from the cache."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = cached(clips, Path(folder), None, "bench", quiet=True)
        for name, source, count in (("made anew", clips, 4), ("from the cache", made, 32)):
            for workers in WORKERS:
                stream = batches(source, 0, 1, 0, 1, workers)
                seconds = time_median(lambda s=stream, n=count: [next(s) for _ in range(n)], 3)
                row = {"name": f"{name}, {workers} workers", "samples_per_second": count / seconds}
                rows.append(row | {"frames_per_second": count * clips.config.frames / seconds})
    return rows
