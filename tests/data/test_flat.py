"""The loader holds nothing back: host memory and open files stay flat over many samples."""

import gc
import os
from pathlib import Path

import pytest

from data.build import build
from data.latents import cached
from data.loader import DataConfig, batches, open_dataset
from tests.data.conftest import moving, write_clip

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Clips that are quick to degrade, one of them damaged."""
    folder = tmp_path_factory.mktemp("flat")
    (folder / "src").mkdir()
    for i in range(8):
        write_clip(folder / "src" / f"clip{i}.mp4", moving(i, 12, 48, 48))
    index = build([folder / "src"], folder / "out", quiet=True)
    sample = index.splits["train"][1]
    with open(folder / "out" / sample.shard, "r+b") as file:
        file.seek(sample.offset + sample.size // 2)
        file.write(bytes(16))
    return folder / "out"


def resident() -> int:
    """Bytes of anonymous memory: what is mapped from files belongs to the page cache."""
    gc.collect()
    lines = {line.split(":")[0]: line.split(":")[1] for line in STATUS.read_text().splitlines()}
    return int(lines["RssAnon"].split()[0]) * 1024


def flat(stream, warm: int, samples: int, allowed: int) -> None:
    """Fails unless `samples` more than `warm` leave memory within `allowed` bytes and no file open. What
    other tests left in this process may grow once; a leak grows every time."""
    for _ in range(warm):
        next(stream)
    grown = []
    for _ in range(3):
        before, files = resident(), len(os.listdir("/proc/self/fd"))
        for _ in range(samples):
            next(stream)
        assert len(os.listdir("/proc/self/fd")) == files
        grown.append(resident() - before)
        if grown[-1] <= allowed:
            return
    raise AssertionError(f"{grown} bytes more, each time over {samples} samples")


def clips(folder, **change):
    config = DataConfig(
        shards=str(folder), latents_per_clip=1, height=32, width=32, degradation="realesrgan", **change
    )
    return open_dataset(config, 0)


def over(samples: int, corpus, tmp_path, allowed: int) -> None:
    """Half of the samples made anew, half from the cache."""
    flat(batches(clips(corpus, images=1), 0, 1, 0, 1, 0), samples // 10, samples // 2, allowed)
    made = cached(clips(corpus, slots=8), tmp_path, None, "pixels", quiet=True)
    flat(batches(made, 0, 1, 0, 1, 0), samples // 10, samples // 2, allowed)


def test_flat_over_five_hundred_samples(corpus, tmp_path, quick):
    over(500, corpus, tmp_path, 4 << 20)


@pytest.mark.slow
def test_flat_over_ten_thousand_samples(corpus, tmp_path):
    over(10_000, corpus, tmp_path, 8 << 20)
