"""Own HR and LR clips: aligned crops of both, nothing degraded, misfits refused in a sentence."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data.clips import open_dataset
from data.loader import DataConfig
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import VideoWriter
from tests.data.conftest import moving, write_clip


def lr_of(hr: np.ndarray) -> np.ndarray:
    """Every fourth pixel: says where in HR an LR pixel lies."""
    return np.ascontiguousarray(hr[:, ::4, ::4])


@pytest.fixture(scope="module")
def sources():
    return {"walk": moving(1, 12, 64, 96), "a/run": moving(2, 7, 96, 64), "frames": moving(3, 5, 64, 64)}


@pytest.fixture
def folder(sources, tmp_path):
    """Two videos, a folder of frames and an image, with their LR sides in other containers."""
    for side in ("HR", "LR"):
        for name, pixels in sources.items():
            pixels = pixels if side == "HR" else lr_of(pixels)
            path = tmp_path / side / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name == "frames":
                with VideoWriter(f"{path}/", 25, *pixels.shape[1:3]) as writer:
                    writer.write(pixels)
            else:
                write_clip(path.with_suffix(".mkv" if side == "HR" else ".mp4"), pixels)
        still = moving(4, 1, 64, 64)
        Image.fromarray((still if side == "HR" else lr_of(still))[0]).save(tmp_path / side / "still.png")
    return tmp_path


def config(folder, **change):
    return replace(
        DataConfig(shards=str(folder), latents_per_clip=2, height=32, width=32, flip=True), **change
    )


def test_hr_and_lr_are_the_same_window_turned_alike(folder, sources):
    clips = open_dataset(config(folder, images=1), 1)
    assert {s.key for rows in clips.source.splits.values() for s in rows} == {*sources, "still"}
    flipped = set()
    for counter in range(12):
        for segment in clips.sample(counter)["segments"]:
            hr, lr = (segment[k].permute(1, 2, 3, 0).numpy() for k in ("hr", "lr"))
            plain, mirrored = np.array_equal(lr, hr[:, ::4, ::4]), np.array_equal(lr, hr[:, ::4, 3::4])
            assert plain or mirrored  # a mirrored crop keeps the fourth pixels from the right
            flipped.add(mirrored)
    assert flipped == {True, False}


def test_short_clips_and_strides_keep_the_sides_together(folder, sources):
    clips = open_dataset(config(folder, strides=(3,), flip=False, latents_per_clip=1), 1)
    for counter in range(6):
        (segment,) = clips.sample(counter)["segments"]
        hr, lr = (segment[k].permute(1, 2, 3, 0).numpy() for k in ("hr", "lr"))
        assert hr.shape[0] == 5 and np.array_equal(lr, hr[:, ::4, ::4])


def test_held_out_pairs(folder, sources):
    first = open_dataset(config(folder), 1).source.splits
    assert len(first["val"]) == 1 and len(first["train"]) == 3
    for side in ("HR", "LR"):
        pixels = moving(7, 9, 64, 64)
        path = folder / "val" / side / "kept.mkv"
        path.parent.mkdir(parents=True)
        write_clip(path, pixels if side == "HR" else lr_of(pixels))
    splits = open_dataset(config(folder), 1).source.splits
    assert [s.key for s in splits["val"]] == ["val/kept"] and len(splits["train"]) == 4
    assert open_dataset(config(folder, split="val"), 1).sample(0)["segments"][0]["lr"].shape == (3, 9, 8, 8)


def test_pairs_that_do_not_fit_are_refused(folder, sources):
    write_clip(folder / "LR" / "walk.mp4", lr_of(sources["walk"])[:-1])
    with pytest.raises(UserError, match="^pair 'walk': HR has 12 frames, LR 11; they must have as many$"):
        open_dataset(config(folder), 1)
    write_clip(folder / "LR" / "walk.mp4", lr_of(sources["walk"])[:, :12])
    with pytest.raises(UserError, match="^pair 'walk': HR is 96x64, LR 24x12; .*exactly scale=4 apart$"):
        open_dataset(config(folder), 1)
    (folder / "LR" / "walk.mp4").unlink()
    with pytest.raises(UserError, match=r"HR/walk' has no partner in '.*LR': add or remove it$"):
        open_dataset(config(folder), 1)


@pytest.mark.parametrize("change", [{"short_side": 64}, {"variants": 2, "slots": 2}])
def test_options_without_effect_are_refused(folder, change):
    with pytest.raises(UserError, match=f"{next(iter(change))}=.* has no effect on given pairs"):
        open_dataset(config(folder, **change), 1)


def test_a_damaged_side_is_replaced(folder):
    path = folder / "LR" / "a" / "run.mp4"
    clips = open_dataset(config(folder, flip=False), 1)
    before = [clips.sample(c) for c in range(6)]
    data = path.read_bytes()
    path.write_bytes(data[:40] + bytes(len(data) - 40))
    after = [clips.sample(c) for c in range(6)]
    assert any("run.mp4" in reason for sample in after for reason in sample["damaged"])
    assert not any(sample["damaged"] for sample in before)
    for sample in after:
        hr, lr = (sample["segments"][0][k] for k in ("hr", "lr"))
        assert np.array_equal(lr.numpy(), hr.numpy()[:, :, ::4, ::4])
