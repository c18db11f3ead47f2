"""Samples as a function of the counter, and the same order for any number of ranks and workers."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from data.clips import Clips, there_and_back
from data.degradation import degrade
from data.loader import DataConfig, batches, open_dataset
from data.reader import Reader
from data.sampler import RankCounters, shuffled
from data.shards import read_index
from flashvsr.base.cli import UserError
from flashvsr.base.draws import numpy_rng
from tests.data.conftest import CLIPS, moving


@pytest.fixture
def config(shards):
    return DataConfig(shards=str(shards), latents_per_clip=2, height=32, width=64, flip=False)


def same(a, b):
    return a["id"] == b["id"] and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        for x, y in zip(a["segments"], b["segments"], strict=True)
    )


def test_shuffled_visits_everything_once_an_epoch():
    epochs = [[shuffled(e * 7 + i, 7, 3, "clips") for i in range(7)] for e in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1]
    assert [shuffled(i, 7, 4, "clips") for i in range(7)] != epochs[0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_one_order(world):
    ranks = [list(islice(iter(RankCounters(20, 3, rank, world)), 4)) for rank in range(world)]
    steps = [sum((ranks[r][step] for r in range(world)), []) for step in range(4)]
    assert sum(steps, []) == list(range(20, 20 + 12 * world))


def test_sample_layout_and_exact_pixels(config):
    clips = open_dataset(config, seed=1)
    for counter in range(4):
        sample = clips.sample(counter)
        assert sample["id"] == f"train-{counter}" and sample["counter"] == counter
        hr, lr = sample["segments"][0]["hr"], sample["segments"][0]["lr"]
        assert hr.shape == (3, 9, 32, 64) and lr.shape == (3, 9, 8, 16)
        assert hr.dtype == lr.dtype == torch.uint8
        assert any(holds(moving(*shape), hr) for shape in CLIPS.values())


def holds(source: np.ndarray, hr: torch.Tensor) -> bool:
    """Whether a crop `C F H W` is a window of a source `F H W 3`, mirrored in time when that is too short."""
    frames = hr.permute(1, 2, 3, 0).numpy()
    count, height, width = frames.shape[:3]
    if len(source) < count:
        source = np.concatenate([source, source[-2::-1]])[:count]
    starts = range(len(source) - count + 1)
    tops, lefts = range(source.shape[1] - height + 1), range(source.shape[2] - width + 1)
    for s in starts:
        for t in tops:
            for x in lefts:
                if np.array_equal(source[s, t, x : x + 4], frames[0, 0, :4]) and np.array_equal(
                    source[s : s + count, t : t + height, x : x + width], frames
                ):
                    return True
    return False


def only(config, key, **change) -> Clips:
    """Clips of one source alone."""
    reader = Reader(read_index(config.shards))
    rows = tuple(s for rows in reader.splits.values() for s in rows if s.key == key)
    reader = Reader(replace(reader.index, splits={"train": rows}))
    return Clips(replace(config, **change), reader, seed=0)


def pixels(sample, number=0) -> np.ndarray:
    """HR frames of a segment as `F H W 3`."""
    return sample["segments"][number]["hr"].permute(1, 2, 3, 0).numpy()


def test_short_clips_go_back_and_forth(config):
    cedar = only(config, "cedar", height=64)
    expected = moving(*CLIPS["cedar"])[[0, 1, 2, 3, 4, 3, 2, 1, 0]]
    assert np.array_equal(pixels(cedar.sample(0)), expected)


def test_flip_mirrors_some_clips_and_changes_nothing_else(config):
    plain, flipping = open_dataset(config, 1), open_dataset(replace(config, flip=True), 1)
    flipped = 0
    for counter in range(8):
        a, b = (c.sample(counter)["segments"][0]["hr"] for c in (plain, flipping))
        flipped += torch.equal(a.flip(-1), b) and not torch.equal(a, b)
        assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
    assert 1 <= flipped <= 7


def test_samples_depend_on_seed_and_counter_alone(config):
    first = open_dataset(config, 1)
    again = open_dataset(config, 1)
    assert same(first.sample(5), again.sample(5)) and same(first.sample(5), first.sample(5))
    assert not same(first.sample(5), first.sample(8))  # same clip three draws later, another crop
    assert not same(first.sample(5), open_dataset(config, 2).sample(5))


def test_slots_bound_the_distinct_samples(config):
    clips = open_dataset(replace(config, slots=3), 1)
    samples = [clips.sample(c) for c in range(6)]
    assert sorted(s["id"] for s in samples[:3]) == sorted(s["id"] for s in samples[3:])
    by_id = {s["id"]: s for s in samples[:3]}
    assert len(by_id) == 3 and all(same(s, by_id[s["id"]]) for s in samples[3:])


def test_images_are_packed_beside_the_video(config):
    clips = open_dataset(replace(config, images=2, image_height=64, image_width=64), 1)
    segments = clips.sample(0)["segments"]
    assert [tuple(s["hr"].shape) for s in segments] == [(3, 9, 32, 64), (3, 1, 64, 64), (3, 1, 64, 64)]
    assert [tuple(s["lr"].shape) for s in segments[1:]] == [(3, 1, 16, 16)] * 2
    assert not torch.equal(segments[1]["hr"], segments[2]["hr"])


def test_short_side_shrinks_and_never_enlarges(config):
    clips = open_dataset(replace(config, height=32, width=32, short_side=64), 1)
    sizes = {s.key: clips._size(s) for s in clips.videos}
    expected = {"ash": (64, 96), "birch": (80, 64), "cedar": (64, 64), "fir": (64, 85)}
    assert sizes == {k: expected[k] for k in sizes}
    assert clips.sample(0)["segments"][0]["hr"].shape == (3, 9, 32, 32)


class Numbers:
    """Clips whose sample is its counter."""

    def sample(self, counter):
        segment = {"hr": torch.full((3, 1, 2, 2), counter % 251, dtype=torch.uint8)}
        return {"id": f"n-{counter}", "counter": counter, "segments": [segment], "damaged": []}


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_the_order_in_closed_form_for_any_ranks_workers_and_start(world, workers):
    """Batch b of rank r holds counters start + (b·world + r)·micro + j: one integer says where a run is."""
    start, micro, steps = 13, 2, 4 if world < 8 or not workers else 1
    for rank in range(world) if not workers else {0, world - 1}:
        stream = batches(Numbers(), start, micro, rank, world, workers)
        for b, batch in zip(range(steps), stream, strict=False):
            expected = [start + (b * world + rank) * micro + j for j in range(micro)]
            assert batch["counters"].tolist() == expected and batch["ids"] == [f"n-{c}" for c in expected]
            assert batch["segments"][0]["hr"][:, 0, 0, 0, 0].tolist() == [c % 251 for c in expected]


@pytest.mark.parametrize("worlds", [(1, 8), (8, 2), (4, 3)])
def test_resuming_with_another_world_size_skips_and_repeats_nothing(worlds):
    """Three steps of 24 samples, then the rest by another number of ranks, from one integer."""
    seen = []
    for world, first, last in ((worlds[0], 0, 3), (worlds[1], 3, 6)):
        micro = 24 // world
        streams = [batches(Numbers(), 24 * first, micro, r, world, 0) for r in range(world)]
        for _ in range(first, last):
            seen += [c for stream in streams for c in next(stream)["counters"].tolist()]
    assert seen == list(range(6 * 24))


def test_an_epoch_holds_every_clip_and_every_image_once(config):
    index = read_index(config.shards)
    rows = [replace(s, key=f"{s.key}{i}") for i in range(5) for s in index.splits["train"]]
    rows += [replace(rows[0], key=f"still{i}", kind="image", frames=1) for i in range(10)]
    reader, drawn = Reader(replace(index, splits={"train": tuple(rows)})), []
    clips = Clips(replace(config, images=2, height=32, width=32), reader, 3)
    clips._cut = lambda source, *_: drawn.append(source.key) or {"hr": None, "lr.0": None}
    for epoch in range(2):
        drawn.clear()
        for counter in range(15 * epoch, 15 * (epoch + 1)):
            clips.sample(counter)
        videos, stills = drawn[::3], [key for key in drawn if key.startswith("still")]
        assert sorted(videos) == sorted(s.key for s in rows if s.kind == "video")
        assert len(stills) == 30 and all(stills.count(f"still{i}") == 3 for i in range(10))


def test_a_sample_is_what_its_draws_say(config):
    """The slow reference: the documented draws by hand, over whole decoded clips."""
    config = replace(config, latents_per_clip=1, flip=True, strides=(1, 2, 5))
    clips, sources = open_dataset(config, 7), {k: moving(*v) for k, v in CLIPS.items()}
    strides = set()
    for counter in range(9):
        turn = numpy_rng("order", 7, "clips train", 3, counter // 3).permutation(3)[counter % 3]
        source = sources[clips.videos[turn].key]
        fitting = [s for s in (1, 2, 5) if 4 * s < len(source)] or [1]
        stride = fitting[numpy_rng("stride", 7, "train", counter, 0).integers(len(fitting))]
        rng = numpy_rng("crop", 7, "train", counter, 0)
        start = rng.integers(max(len(source) - 4 * stride - 1, 0) + 1)
        top, left = rng.integers(source.shape[1] - 32 + 1), rng.integers(source.shape[2] - 64 + 1)
        expected = source[start::stride][:5, top : top + 32, left : left + 64]
        if rng.integers(2):
            expected = expected[:, :, ::-1]
        expected = np.concatenate([expected, expected[-2::-1]])[:5]
        assert np.array_equal(pixels(clips.sample(counter)), expected)
        lr, _ = degrade(
            np.ascontiguousarray(expected), 4, "realbasicvsr", numpy_rng("degrade", 7, "train", counter, 0)
        )
        assert np.array_equal(clips.sample(counter)["segments"][0]["lr"].permute(1, 2, 3, 0).numpy(), lr)
        strides.add(stride)
    assert len(strides) > 1


@pytest.mark.parametrize("have", [1, 2, 3, 7])
def test_there_and_back(have):
    walk = list(range(have)) + list(range(have - 2, 0, -1))
    assert there_and_back(have, 20) == [walk[i % len(walk)] for i in range(20)]


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0)])
def test_batches_are_the_same_for_any_world_and_workers(config, world, workers):
    clips = open_dataset(replace(config, images=1, height=32, width=32), 1)
    expected = [clips.sample(c) for c in range(4, 12)]
    steps = 8 // (2 * world)
    streams = [batches(clips, 4, 2, rank, world, workers) for rank in range(world)]
    got = [next(stream) for _ in range(steps) for stream in streams]
    for i, batch in enumerate(got):
        pair = expected[2 * i : 2 * i + 2]
        assert batch["ids"] == [s["id"] for s in pair]
        assert batch["counters"].tolist() == [s["counter"] for s in pair]
        for j, segment in enumerate(batch["segments"]):
            for name, tensor in segment.items():
                assert torch.equal(tensor, torch.stack([s["segments"][j][name] for s in pair]))


class Failing:
    def sample(self, counter):
        raise UserError(f"clip {counter} is damaged")


def test_a_users_error_in_a_worker_stays_one_sentence():
    with pytest.raises(UserError, match="^clip 0 is damaged$"):
        next(batches(Failing(), 0, 1, 0, 1, 1))


def test_small_clips_are_left_out_and_counted_or_refused(config, capsys):
    clips = open_dataset(replace(config, height=64, width=96), 1)
    out = capsys.readouterr().out
    kept = {s.key for s in clips.videos}
    assert kept <= {"ash", "fir"} and kept and "skipped, too small for a 96x64 crop" in out
    with pytest.raises(UserError, match="no clip in split 'train' .* large enough for a 256x256 crop"):
        open_dataset(replace(config, height=256, width=256), 1)
    with pytest.raises(UserError, match="no split 'test'"):
        open_dataset(replace(config, split="test"), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 40}, "height=40 must be a positive multiple of 32"),
        ({"latents_per_clip": 0}, "latents_per_clip=0"),
        ({"slots": 0}, "slots=0"),
        ({"strides": ()}, r"strides=\[\]"),
        ({"strides": (1, 0)}, r"strides=\[1, 0\] must be"),
        ({"variants": 2}, "variants=2 needs slots"),
        ({"cache_gb": 0.0}, "cache_gb=0 must be more than 0"),
        ({"scale": 3}, "multiple of scale=3"),
        ({"image_height": 64}, "need images=1"),
        ({"degradation": "nice"}, "unknown degradation preset 'nice'"),
    ],
)
def test_configs_that_make_no_sense_are_refused(config, change, message):
    with pytest.raises(UserError, match=message):
        replace(config, **change)
