"""From a counter to a sample: which clip, where in time, which crop, which flip, which degradation."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.degradation import degrade
from data.degradation.presets import preset
from data.pairs import Pairs, is_pairs
from data.reader import Damaged, LocalShards, Reader
from data.remote import CACHE, RemoteShards, ShardCache, is_remote
from data.sampler import shuffled
from data.shards import Sample, read_index
from flashvsr.base.cli import UserError
from flashvsr.base.draws import numpy_rng

TRIES = 32  # so many other clips are tried in the place of a damaged one

# What may differ between two runs that see the same samples.
_NOT_CONTENT = ("shards", "workers", "cache_dir", "cache_gb")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a stage asks of the data. Sizes are HR pixels."""

    shards: str  # folder of `python -m data build`, its index.json or the URL of one; or a folder of pairs
    split: str = "train"
    latents_per_clip: int  # n: a clip has 4n+1 frames
    height: int
    width: int
    scale: int = 4
    images: int = 0  # images packed beside every video
    image_height: int | None = None  # default: the video's
    image_width: int | None = None
    short_side: int | None = None  # larger sources are first shrunk to this short side; None: native pixels
    slots: int | None = None  # only this many distinct draws, visited in shuffled epochs; None: always fresh
    variants: int = 1  # degradations of every slot, taken in turn by epochs
    strides: tuple[int, ...] = (1,)  # of source frames from one to the next: one is drawn per clip
    degradation: str = "realbasicvsr"
    workers: int = 0
    flip: bool = True  # left-right, half of the clips; a video model was trained upright, so never up-down
    cache_dir: str | None = None  # of remote shards; None: ~/.cache/flashvsr/shards
    cache_gb: float = 50.0

    def __post_init__(self) -> None:
        for name in ("height", "width", "image_height", "image_width"):
            value = getattr(self, name)
            if value is not None and (value <= 0 or value % 32):
                raise UserError(f"{name}={value} must be a positive multiple of 32")
            if value is not None and value % self.scale:
                raise UserError(f"{name}={value} must be a multiple of scale={self.scale}")
        least_of = {"latents_per_clip": 1, "scale": 1, "images": 0, "workers": 0, "variants": 1}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.slots is not None and self.slots < 1:
            raise UserError(f"slots={self.slots} must be at least 1, or null for always fresh draws")
        if self.slots is None and self.variants > 1:
            raise UserError(f"variants={self.variants} needs slots: without, all draws are fresh anyway")
        if not self.strides or min(self.strides) < 1:
            raise UserError(f"strides={list(self.strides)} must be one or more numbers of at least 1")
        if self.cache_gb <= 0:
            raise UserError(f"cache_gb={self.cache_gb:g} must be more than 0")
        if self.images == 0 and (self.image_height or self.image_width):
            raise UserError("image_height and image_width need images=1 or more")
        preset(self.degradation)

    @property
    def frames(self) -> int:
        return 4 * self.latents_per_clip + 1

    @property
    def video_size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def image_size(self) -> tuple[int, int]:
        return self.image_height or self.height, self.image_width or self.width


def there_and_back(have: int, want: int) -> list[int]:
    """Frame numbers 0 … have-1, back to 0, forward again …, `want` of them, the ends not repeated."""
    period = max(2 * (have - 1), 1)
    return [min(i % period, period - i % period) if have > 1 else 0 for i in range(want)]


class Clips:
    """The samples of one split as a pure function of (seed, counter).

    `source` is a `Reader` of shards, or `Pairs`, whose LR frames are taken instead of degrading.
    """

    def __init__(self, config: DataConfig, source: Reader | Pairs, seed: int, quiet: bool = False) -> None:
        self.config, self.source, self.seed = config, source, seed
        if config.split not in source.splits:
            have = ", ".join(source.splits)
            raise UserError(f"no split '{config.split}' in '{source.name}': it has {have}")
        if isinstance(source, Pairs):
            for name, only in (("short_side", None), ("variants", 1), ("scale", source.scale)):
                if getattr(config, name) != only:
                    raise UserError(
                        f"{name}={getattr(config, name)} has no effect on given pairs of HR and LR: "
                        f"set it to {'null' if only is None else only}"
                    )
        everything = source.splits[config.split]
        moving = [s for s in everything if s.kind != "image"]
        self.videos = self._large_enough(moving, config.video_size, quiet)
        # A corpus without images gives single frames of its videos.
        stills = [s for s in everything if s.kind == "image"] or moving
        self.stills = self._large_enough(stills, config.image_size, quiet) if config.images else []

    def _large_enough(self, samples: list[Sample], crop: tuple[int, int], quiet: bool) -> list[Sample]:
        fit, small = [], []
        for sample in samples:
            large = all(a >= b for a, b in zip(self._size(sample), crop, strict=True))
            (fit if large else small).append(sample)
        where = f"split '{self.config.split}' of '{self.source.name}'"
        need = f"a {crop[1]}x{crop[0]} crop"
        if self.config.short_side:
            need += f" at short_side={self.config.short_side}"
        if not samples:
            raise UserError(f"{where} has no videos: add some to `python -m data build`")
        if not fit:
            raise UserError(f"no clip in {where} is large enough for {need} (first: '{small[0].key}')")
        if small and not quiet:
            names = ", ".join(s.key for s in small[:3]) + (", …" if len(small) > 3 else "")
            print(f"{where}: {len(small)} of {len(samples)} skipped, too small for {need}: {names}")
        return fit

    def _size(self, sample: Sample) -> tuple[int, int]:
        """Height and width of a source after the shrink to `short_side`; never enlarged."""
        short = min(sample.height, sample.width)
        if self.config.short_side is None or short <= self.config.short_side:
            return sample.height, sample.width
        ratio = self.config.short_side / short
        return round(sample.height * ratio), round(sample.width * ratio)

    def identity(self) -> dict:
        """What the samples depend on, as JSON: two equal identities give the same samples."""
        config = {k: v for k, v in vars(self.config).items() if k not in _NOT_CONTENT}
        corpus = "".join(s.content for s in self.videos + self.stills)
        return {"seed": self.seed, "config": config, "corpus": hashlib.sha256(corpus.encode()).hexdigest()}

    def place(self, counter: int) -> tuple[int, int]:
        """(slot, variant) of a sample: all slots once per epoch, their variants in turn by epochs."""
        slots = self.config.slots
        if slots is None:
            return counter, 0
        return shuffled(counter, slots, self.seed, "slots"), counter // slots % self.config.variants

    def sample(self, counter: int) -> dict[str, Any]:
        """Sample `counter`: `{id, counter, segments, damaged}`.

        `segments[0]` is the video, hr uint8 `3 4n+1 H W` and lr `3 4n+1 H/scale W/scale`; then come `images`
        segments of one frame. With `slots`, counters of the same slot give the same HR. In the place of a
        clip that is damaged stands another, the same in every process; `damaged` says which and why. Raises
        UserError when too many are damaged or a shard cannot be had.
        """
        slot, variant = self.place(counter)
        segments, damaged = self._segments(slot, [variant])
        for segment in segments:
            segment["lr"] = segment.pop(f"lr.{variant}")
        name = f"{self.config.split}-{slot}"
        return {"id": name, "counter": counter, "segments": segments, "damaged": damaged}

    def pack(self, slot: int) -> dict[str, Any]:
        """A slot with all its variants: like `sample`, with `lr.0`, `lr.1`, … in the place of lr."""
        segments, damaged = self._segments(slot, range(self.config.variants))
        return {"segments": segments, "damaged": damaged}

    def _segments(self, slot: int, variants: Sequence[int]) -> tuple[list[dict], list[str]]:
        config, damaged = self.config, []
        videos = self._candidates(self.videos, slot, 0, slot, f"clips {config.split}")
        segments = [self._segment(videos, config.frames, config.video_size, slot, 0, variants, damaged)]
        for i in range(1, config.images + 1):
            turn = slot * config.images + i - 1
            stills = self._candidates(self.stills, slot, i, turn, f"stills {config.split}")
            segments.append(self._segment(stills, 1, config.image_size, slot, i, variants, damaged))
        return segments, damaged

    def _candidates(
        self, pool: list[Sample], slot: int, number: int, turn: int, name: str
    ) -> Iterator[Sample]:
        """The clip whose turn it is, each once per epoch, and then those that replace it if it is damaged."""
        yield pool[shuffled(turn, len(pool), self.seed, name)]
        order = numpy_rng("substitute", self.seed, self.config.split, slot, number).permutation(len(pool))
        for i in order[:TRIES].tolist():
            yield pool[i]

    def _segment(
        self,
        candidates: Iterable[Sample],
        frames: int,
        crop: tuple[int, int],
        slot: int,
        number: int,
        variants: Sequence[int],
        damaged: list[str],
    ) -> dict[str, torch.Tensor]:
        """hr and lr.VARIANT of the first candidate that is whole; notes the others in `damaged`."""
        tried = []
        for source in candidates:
            try:
                return self._cut(source, frames, crop, slot, number, variants)
            except Damaged as error:
                if str(error) not in tried:
                    tried.append(str(error))
                    damaged.append(str(error))
        raise UserError(
            f"all {len(tried)} clips tried in '{self.source.name}' are damaged (the last: {tried[-1]}); "
            "is this the index of other shards? build them again with `python -m data build`"
        )

    def _cut(
        self,
        source: Sample,
        frames: int,
        crop: tuple[int, int],
        slot: int,
        number: int,
        variants: Sequence[int],
    ) -> dict[str, torch.Tensor]:
        config, paired = self.config, isinstance(self.source, Pairs)
        names = self.seed, config.split, slot, number
        # Strides that the clip has frames for; the shortest of all when it has too few for any.
        fitting = [s for s in config.strides if (frames - 1) * s < source.frames] or [min(config.strides)]
        stride = fitting[int(numpy_rng("stride", *names).integers(len(fitting)))]
        rng = numpy_rng("crop", *names)
        height, width = self._size(source)
        start = int(rng.integers(max(source.frames - (frames - 1) * stride - 1, 0) + 1))
        grid = config.scale if paired else 1  # LR pixels are not split
        top, left = (
            int(rng.integers((whole - part) // grid + 1)) * grid
            for whole, part in zip((height, width), crop, strict=True)
        )
        flip = bool(rng.integers(2)) and config.flip
        count = min(frames, len(range(start, source.frames, stride)))
        size = None if (height, width) == (source.height, source.width) else (height, width)
        box = (top, left, *crop)
        hr = self.source.frames(source, start, count, size, box, stride)
        hr = _finished(hr, frames, flip)
        segment = {"hr": _channels_first(hr)}
        if paired:
            lr = _finished(self.source.lr_frames(source, start, count, box, stride), frames, flip)
            return segment | {"lr.0": _channels_first(lr)}
        for variant in variants:
            rng = numpy_rng("degrade", *names, *([variant] if variant else []))
            lr, _ = degrade(hr, config.scale, config.degradation, rng)
            segment[f"lr.{variant}"] = _channels_first(lr)
        return segment


def _finished(pixels: np.ndarray, frames: int, flip: bool) -> np.ndarray:
    """`F H W 3` brought to `frames` frames, there and back where they are too few, and flipped."""
    if len(pixels) < frames:
        pixels = pixels[there_and_back(len(pixels), frames)]
    return np.ascontiguousarray(pixels[:, :, ::-1] if flip else pixels)


def _channels_first(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous()


def open_source(config: DataConfig) -> Reader | Pairs:
    """What `config.shards` names; raises UserError when it is missing or cannot be fetched."""
    if is_remote(config.shards):
        folder = Path(config.cache_dir).expanduser() if config.cache_dir else CACHE
        shards = RemoteShards(config.shards, ShardCache(folder, round(config.cache_gb * 1e9)))
        return Reader(shards.index(), shards)
    if is_pairs(config.shards):
        return Pairs(config.shards, config.scale)
    index = read_index(config.shards)
    shards = LocalShards(index.folder)
    shards.refuse_short(index)
    return Reader(index, shards)


def open_dataset(config: DataConfig, seed: int) -> Clips:
    """The clips of `config`; raises UserError when shards or index are missing or no clip is large enough."""
    return Clips(config, open_source(config), seed)
