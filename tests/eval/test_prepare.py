"""`eval prepare`: deterministic bytes, settings recorded, kept when repeated, refused when changed."""

import json
import shutil

import numpy as np
import pytest

from data.build import build
from data.degradation import degrade
from eval.prepare import PrepareConfig, check, cut, prepare, write_frames
from flashvsr.base.cli import UserError
from flashvsr.base.draws import numpy_rng
from flashvsr.base.resize import bicubic_8bit
from flashvsr.base.video_io import VideoWriter, read_frames

CONFIG = PrepareConfig(seed=5, frames=3, size=(64, 80))


@pytest.fixture(scope="module")
def source(tmp_path_factory, hr_clips):
    """One video and one folder of frames."""
    folder = tmp_path_factory.mktemp("hr")
    with VideoWriter(folder / "beta.mkv", 25, 96, 128, lossless=True) as writer:
        writer.write(hr_clips["beta"])
    write_frames(folder / "alpha", hr_clips["alpha"])
    return folder


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "set"
    assert prepare(source, out, CONFIG, quiet=True)
    return out


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_gt_is_the_middle_of_the_source_and_lq_its_degradation(prepared, hr_clips):
    for name, frames in hr_clips.items():
        middle = frames[:3, 16:80, 24:104]
        assert np.array_equal(np.stack(list(read_frames(prepared / "GT" / name))), middle)
        expected, parameters = degrade(middle, 4, "realbasicvsr", numpy_rng("eval.prepare", 5, name))
        assert np.array_equal(np.stack(list(read_frames(prepared / "LQ" / name))), expected)
        record = json.loads((prepared / "prepare.json").read_text())
        clip = next(c for c in record["clips"] if c["name"] == name)
        assert clip["degradation"] == parameters
    assert record["settings"]["seed"] == 5 and record["settings"]["preset"] == "realbasicvsr"
    assert {"av", "libavcodec", "libx264", "libx265", "torch", "pillow"} <= record["versions"].keys()
    assert record["versions"]["libx264"][:1].isdigit()


def test_the_same_command_gives_the_same_bytes(source, prepared, tmp_path):
    prepare(source, tmp_path / "again", CONFIG, quiet=True)
    assert tree(tmp_path / "again") == tree(prepared)


def test_check_remakes_lq_and_finds_changed_pixels(prepared, tmp_path):
    assert check(prepared, quiet=True) == []
    folder = shutil.copytree(prepared, tmp_path / "set")
    (folder / "LQ" / "alpha" / "frame-000001.png").write_bytes(b"damaged")
    (folder / "GT" / "beta" / "frame-000002.png").unlink()
    assert check(folder, quiet=True) == [
        "LQ of clip 'alpha' is missing or not what was written",
        "GT of clip 'beta' is missing or not what was written",
    ]


def test_where_this_machine_makes_other_bytes_the_differing_version_is_named(prepared, tmp_path):
    """A record of another machine: another encoder, whose bytes were others."""
    folder = shutil.copytree(prepared, tmp_path / "set")
    record = json.loads((folder / "prepare.json").read_text())
    record["versions"]["libx264"] = "42"
    (folder / "prepare.json").write_text(json.dumps(record))
    assert check(folder, quiet=True) == []  # same bytes: another version is no fault
    pixels = np.zeros((3, 16, 20, 3), np.uint8)
    _, _, record["clips"][0]["lq_sha256"] = write_frames(tmp_path / "other", pixels)
    shutil.rmtree(folder / "LQ" / record["clips"][0]["name"])
    (tmp_path / "other").rename(folder / "LQ" / record["clips"][0]["name"])
    (folder / "prepare.json").write_text(json.dumps(record))
    (sentence,) = check(folder, quiet=True)
    assert sentence.startswith("this machine makes another LQ from the GT of alpha; libx264 was 42, here 1")
    with pytest.raises(UserError, match="has no prepare.json"):
        check(tmp_path)


def test_an_existing_set_is_kept_or_refused_but_never_mixed(source, prepared):
    before = tree(prepared)
    assert not prepare(source, prepared, CONFIG, quiet=True)
    with pytest.raises(UserError, match="prepared with seed 5, not 6; remove it"):
        prepare(source, prepared, PrepareConfig(seed=6, frames=3, size=(64, 80)), quiet=True)
    with pytest.raises(UserError, match="other sources"):
        prepare(source / "alpha", prepared, CONFIG, quiet=True)
    assert tree(prepared) == before


def test_the_held_out_clips_of_a_data_folder(source, tmp_path, hr_clips):
    index = build([source / "alpha"], tmp_path / "data", val=[source / "beta.mkv"], quiet=True)
    prepare(tmp_path / "data", tmp_path / "set", CONFIG, quiet=True)
    key = index.splits["val"][0].key
    frames = np.stack(list(read_frames(tmp_path / "set" / "GT" / key)))
    assert np.array_equal(frames, hr_clips["beta"][:3, 16:80, 24:104])


def test_nothing_is_left_behind_when_a_clip_is_too_small(source, tmp_path):
    with pytest.raises(UserError, match="'alpha' is 128x96, too small for 64x160"):
        prepare(source, tmp_path / "set", PrepareConfig(size=(160, 64)), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_no_clip_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no video"):
        prepare(tmp_path, tmp_path / "set", CONFIG)
    with pytest.raises(UserError, match="is no folder"):
        prepare(tmp_path / "nowhere", tmp_path / "set", CONFIG)
    shutil.rmtree(tmp_path)


def test_cut_reduces_to_the_short_side_and_never_enlarges(hr_clips):
    import torch

    frame = hr_clips["alpha"][0]
    small = bicubic_8bit(torch.from_numpy(frame).permute(2, 0, 1), (60, 80)).permute(1, 2, 0).numpy()
    assert np.array_equal(cut(frame, "alpha", PrepareConfig(short_side=60)), small)
    assert np.array_equal(cut(frame, "alpha", PrepareConfig(short_side=500)), frame)
    assert cut(frame[:95, :126], "alpha", PrepareConfig()).shape == (92, 124, 3)


@pytest.mark.parametrize("values", [{"size": (62, 64)}, {"frames": 0}, {"scale": 0}, {"clips": -1}])
def test_settings_that_cannot_be(values):
    with pytest.raises(UserError):
        PrepareConfig(**values)
