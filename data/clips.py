"""From a counter to a sample: which clip, where in time, which crop, which flip, which degradation."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from data.degradation import degrade
from data.degradation.blur import mirror_index
from data.degradation.presets import preset
from data.reader import Reader
from data.sampler import shuffled
from data.shards import Index, Sample, read_index
from flashvsr.base.cli import UserError
from flashvsr.base.draws import numpy_rng


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a stage asks of the data. Sizes are HR pixels."""

    shards: str  # folder of `python -m data build`, or its index.json
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
    degradation: str = "realbasicvsr"
    workers: int = 0
    flip: bool = True  # left-right, half of the clips; a video model was trained upright, so never up-down

    def __post_init__(self) -> None:
        for name in ("height", "width", "image_height", "image_width"):
            value = getattr(self, name)
            if value is not None and (value <= 0 or value % 32):
                raise UserError(f"{name}={value} must be a positive multiple of 32")
            if value is not None and value % self.scale:
                raise UserError(f"{name}={value} must be a multiple of scale={self.scale}")
        for name, least in (("latents_per_clip", 1), ("scale", 1), ("images", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.slots is not None and self.slots < 1:
            raise UserError(f"slots={self.slots} must be at least 1, or null for always fresh draws")
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


class Clips:
    """The samples of one split as a pure function of (seed, counter)."""

    def __init__(self, config: DataConfig, index: Index, seed: int, quiet: bool = False) -> None:
        self.config, self.index, self.seed = config, index, seed
        self.reader = Reader(index)
        if config.split not in index.splits:
            have = ", ".join(index.splits)
            raise UserError(f"no split '{config.split}' in '{index.folder}': it has {have}")
        everything = index.splits[config.split]
        moving = [s for s in everything if s.kind != "image"]
        self.videos = self._large_enough(moving, config.video_size, quiet)
        # A corpus without images gives single frames of its videos.
        stills = [s for s in everything if s.kind == "image"] or moving
        self.stills = self._large_enough(stills, config.image_size, quiet) if config.images else []

    def _large_enough(self, samples: list[Sample], crop: tuple[int, int], quiet: bool) -> list[Sample]:
        fit = [s for s in samples if all(a >= b for a, b in zip(self._size(s), crop, strict=True))]
        small = [s for s in samples if s not in fit]
        where = f"split '{self.config.split}' of '{self.index.folder}'"
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
        config = {k: v for k, v in vars(self.config).items() if k not in ("shards", "workers")}
        corpus = "".join(s.content for s in self.videos + self.stills)
        return {"seed": self.seed, "config": config, "corpus": hashlib.sha256(corpus.encode()).hexdigest()}

    def sample(self, counter: int) -> dict:
        """Sample `counter`: `{id, counter, segments}`.

        `segments[0]` is the video, hr uint8 `3 4n+1 H W` and lr `3 4n+1 H/scale W/scale`; then come `images`
        segments of one frame. With `slots`, counters of the same slot give the same sample. Raises UserError
        naming a clip that cannot be read.
        """
        config = self.config
        slot = counter if config.slots is None else shuffled(counter, config.slots, self.seed, "slots")
        clip = self.videos[shuffled(slot, len(self.videos), self.seed, f"clips {config.split}")]
        segments = [self._segment(clip, config.frames, config.video_size, slot, 0)]
        for i in range(1, config.images + 1):
            rng = numpy_rng("still", self.seed, config.split, slot, i)
            still = self.stills[int(rng.integers(len(self.stills)))]
            segments.append(self._segment(still, 1, config.image_size, slot, i))
        return {"id": f"{config.split}-{slot}", "counter": counter, "segments": segments}

    def _segment(self, source: Sample, frames: int, crop: tuple[int, int], slot: int, number: int) -> dict:
        rng = numpy_rng("crop", self.seed, self.config.split, slot, number)
        height, width = self._size(source)
        start = int(rng.integers(max(source.frames - frames, 0) + 1))
        top = int(rng.integers(height - crop[0] + 1))
        left = int(rng.integers(width - crop[1] + 1))
        flip = bool(rng.integers(2)) and self.config.flip
        size = None if (height, width) == (source.height, source.width) else (height, width)
        hr = self.reader.frames(source, start, min(frames, source.frames), size, (top, left, *crop))
        hr = torch.from_numpy(hr)
        if len(hr) < frames:
            hr = hr[mirror_index(len(hr), 0, frames - len(hr))]  # too short: forward, backward, forward …
        if flip:
            hr = hr.flip(2)
        degradation_rng = numpy_rng("degrade", self.seed, self.config.split, slot, number)
        lr, _ = degrade(np.ascontiguousarray(hr), self.config.scale, self.config.degradation, degradation_rng)
        return {
            "hr": hr.permute(3, 0, 1, 2).contiguous(),
            "lr": torch.from_numpy(lr).permute(3, 0, 1, 2).contiguous(),
        }


def open_dataset(config: DataConfig, seed: int) -> Clips:
    """The clips of `config`; raises UserError when shards or index are missing or no clip is large enough."""
    return Clips(config, read_index(config.shards), seed)
