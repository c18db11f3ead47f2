"""Test sets are found, matched by name, and refused with the clip's name when the two sides do not fit."""

import shutil

import numpy as np
import pytest

from eval.datasets import open_test_set
from eval.prepare import write_frames
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import VideoWriter


@pytest.fixture
def folder(test_folder, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(test_folder, tmp_path / "set")


def test_pairs_scale_and_frames(test_folder, hr_clips):
    test_set = open_test_set(test_folder)
    assert [(p.name, p.frames, p.height, p.width) for p in test_set.pairs] == [
        ("alpha", 5, 96, 128),
        ("beta", 11, 96, 128),
    ]
    assert test_set.scale == 4 and test_set.prepared == {}
    pair = open_test_set(test_folder, frames=3).pairs[1]
    assert (pair.frames, pair.total) == (3, 11)
    assert np.array_equal(np.stack(list(pair.read_gt())), hr_clips["beta"][:3])
    assert [len(stack) for stack in pair.read_lq(2)] == [2, 1]


def test_a_side_may_be_a_video_file(folder, hr_clips):
    shutil.rmtree(folder / "GT" / "beta")
    with VideoWriter(folder / "GT" / "beta.mkv", 25, 96, 128, lossless=True) as writer:
        writer.write(hr_clips["beta"])
    beta = open_test_set(folder).pairs[1]
    assert beta.total == 11
    assert np.array_equal(np.stack(list(beta.read_gt())), hr_clips["beta"])


def test_what_does_not_fit_names_the_clip(folder, tmp_path, hr_clips):
    with pytest.raises(UserError, match="'alpha' has only 5 frames, not 6"):
        open_test_set(folder, frames=6)
    (folder / "LQ" / "beta" / "frame-000010.png").unlink()
    with pytest.raises(UserError, match="'beta' has 10 LQ frames but 11 GT frames"):
        open_test_set(folder)
    shutil.rmtree(folder / "LQ" / "beta")
    with pytest.raises(UserError, match="'beta' is only under GT"):
        open_test_set(folder)
    write_frames(folder / "LQ" / "beta", hr_clips["beta"][:, :20, :30])
    with pytest.raises(UserError, match="'beta' is 128x96 in GT and 30x20 in LQ"):
        open_test_set(folder)
    shutil.rmtree(folder / "LQ" / "beta")
    write_frames(folder / "LQ" / "beta", hr_clips["beta"][:, ::2, ::2])
    with pytest.raises(UserError, match=r"mixes scales: x4 \(alpha\), x2 \(beta\)"):
        open_test_set(folder)


def test_empty_or_absent_sets_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="eval prepare SRC"):
        open_test_set(tmp_path / "nowhere")
    (tmp_path / "GT").mkdir()
    (tmp_path / "LQ").mkdir()
    with pytest.raises(UserError, match="GT holds no video"):
        open_test_set(tmp_path)
