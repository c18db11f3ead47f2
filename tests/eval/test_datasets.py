"""Test sets are found in the folders people have, and refused with the clip's name when sides do not fit."""

import shutil

import numpy as np
import pytest
from PIL import Image

from eval.datasets import open_test_set, parse_set, window
from eval.prepare import write_frames
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import VideoWriter


@pytest.fixture
def folder(test_folder, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(test_folder, tmp_path / "set")


def layout(folder, places):
    """Two-frame clips: path -> side length; returns the folder."""
    for place, side in places.items():
        write_frames(folder / place, np.full((2, side, side, 3), side, np.uint8))
    return folder


def test_clips_scale_and_frames(test_folder, hr_clips):
    test_set = open_test_set(test_folder)
    assert [(c.name, c.frames, c.height, c.width) for c in test_set.clips] == [
        ("alpha", 5, 96, 128),
        ("beta", 11, 96, 128),
    ]
    assert (test_set.scale, test_set.has_gt, test_set.prepared) == (4, True, {})
    clip = open_test_set(test_folder, frames=3).clips[1]
    assert (clip.frames, clip.total) == (3, 11)
    assert np.array_equal(np.stack(list(clip.read_gt())), hr_clips["beta"][:3])
    assert len(list(clip.read_lq())) == 3


def test_a_side_may_be_a_video_file(folder, hr_clips):
    shutil.rmtree(folder / "GT" / "beta")
    with VideoWriter(folder / "GT" / "beta.mkv", 25, 96, 128, lossless=True) as writer:
        writer.write(hr_clips["beta"])
    beta = open_test_set(folder).clips[1]
    assert beta.total == 11
    assert np.array_equal(np.stack(list(beta.read_gt())), hr_clips["beta"])


@pytest.mark.parametrize(
    "places, layout_words, clips, scale, has_gt",
    [
        # official REDS folders, DOVE's pack (frames before videos), UDM10 and SPMCS as published
        ({"val_sharp/000": 32, "val_sharp_bicubic/X4/000": 8}, "LQ in val_sharp_bicubic/X4", "000", 4, True),
        ({"GT/a": 32, "LQ/a": 8, "GT-Video/a": 16, "LQ-Video/a": 16}, "LQ in LQ, GT in GT", "a", 4, True),
        ({"udm/archpeople/truth": 32, "udm/archpeople/blur4": 8}, "each clip's", "archpeople", 4, True),
        ({"hr/a": 32, "lr/a": 8}, "LQ in lr, GT in hr", "a", 4, True),
        # RealVSR and MVSR4x: LQ has GT's size; VideoLQ: no GT
        ({"GT_test/a": 16, "LQ_test/a": 16}, "LQ in LQ_test, GT in GT_test", "a", 1, True),
        ({"Input/000": 8}, "LQ in Input, no GT", "000", 4, False),
        ({"000": 8}, "clips without GT", "000", 4, False),
    ],
)
def test_the_folders_of_the_usual_sets(tmp_path, places, layout_words, clips, scale, has_gt):
    layout(tmp_path, places)
    root = tmp_path / "udm" if (tmp_path / "udm").exists() else tmp_path
    test_set = open_test_set(root)
    assert layout_words in test_set.layout
    assert [c.name for c in test_set.clips] == [clips]
    assert (test_set.scale, test_set.has_gt) == (scale, has_gt)


def test_two_kinds_of_lq_must_be_chosen_from(tmp_path):
    layout(tmp_path, {"GT/a": 32, "BDx4/a": 8, "BIx4/a": 8})
    with pytest.raises(UserError, match="several LQ folders: BDx4, BIx4; choose with lq=FOLDER"):
        open_test_set(tmp_path)
    assert parse_set(f"UDM10={tmp_path},lq=BIx4").clips[0].lq == tmp_path / "BIx4" / "a"


def test_reds4_is_four_clips_of_the_training_set(tmp_path):
    names = ["000", "001", "011", "015", "020"]
    layout(tmp_path, {f"GT/{n}": 32 for n in names} | {f"LQ/{n}": 8 for n in names})
    assert [c.name for c in parse_set(f"REDS4={tmp_path}").clips] == ["000", "011", "015", "020"]
    assert [c.name for c in parse_set(f"mine={tmp_path},clips=001+020").clips] == ["001", "020"]
    with pytest.raises(UserError, match="no clip '999'"):
        parse_set(f"mine={tmp_path},clips=999")


def test_what_does_not_fit_names_the_clip(folder, hr_clips):
    with pytest.raises(UserError, match="'alpha' has only 5 frames, not 6"):
        open_test_set(folder, frames=6)
    (folder / "LQ" / "beta" / "frame-000010.png").unlink()
    with pytest.raises(UserError, match="'beta' has 10 LQ frames but 11 GT frames.*--align first"):
        open_test_set(folder)
    shutil.rmtree(folder / "LQ" / "beta")
    with pytest.raises(UserError, match="'beta' is only under GT"):
        open_test_set(folder)
    write_frames(folder / "LQ" / "beta", hr_clips["beta"][:, :20, :30])
    with pytest.raises(UserError, match="'beta' is 128x96 in GT and 30x20 in LQ.*--align top-left"):
        open_test_set(folder)
    shutil.rmtree(folder / "LQ" / "beta")
    write_frames(folder / "LQ" / "beta", hr_clips["beta"][:, ::2, ::2])
    with pytest.raises(UserError, match=r"mixes scales: x4 \(alpha\), x2 \(beta\)"):
        open_test_set(folder)


def test_align_cuts_what_it_says(folder, hr_clips):
    (folder / "LQ" / "beta" / "frame-000010.png").unlink()
    beta = open_test_set(folder, align="first").clips[1]
    assert (beta.frames, beta.note) == (10, "first 10 frames of 10 LQ and 11 GT")
    shutil.rmtree(folder / "GT" / "alpha")
    write_frames(folder / "GT" / "alpha", np.pad(hr_clips["alpha"], ((0, 0), (1, 2), (0, 0), (0, 0))))
    with pytest.raises(UserError, match="'alpha' is 128x99"):
        open_test_set(folder, align="first")
    for align, top in (("top-left", 0), ("center", 1)):
        alpha = open_test_set(folder, align=align).clips[0]
        assert (alpha.height, alpha.width, alpha.note) == (96, 128, f"GT 128x99 cut to 128x96, {align}")
        padded = np.pad(hr_clips["alpha"][0], ((1, 2), (0, 0), (0, 0)))
        assert np.array_equal(next(alpha.read_gt()), padded[top : top + 96])


def test_window_takes_the_corner_or_the_middle():
    frame = np.arange(5 * 7 * 3).reshape(5, 7, 3)
    assert np.array_equal(window(frame, 2, 3, "top-left"), frame[:2, :3])
    assert np.array_equal(window(frame, 2, 3, "center"), frame[1:3, 2:5])


def test_grey_alpha_and_16_bit_pictures_follow_the_stated_rule(tmp_path):
    """Grey is repeated, alpha dropped, of 16 bits the upper 8 are kept."""
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    pictures = {
        "grey": Image.fromarray(grey),
        "alpha": Image.fromarray(np.dstack([grey, grey, grey, np.zeros_like(grey)]), "RGBA"),
        "deep": Image.fromarray(grey.astype(np.uint16) * 256 + 255),
    }
    for name, picture in pictures.items():
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "frame-000000.png")
    for clip in open_test_set(tmp_path).clips:
        assert np.array_equal(next(clip.read_lq()), np.dstack([grey] * 3)), clip.name


def test_empty_or_absent_sets_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="eval prepare SRC"):
        open_test_set(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no video"):
        open_test_set(tmp_path)
    (tmp_path / "GT").mkdir()
    with pytest.raises(UserError, match="GT in GT but no LQ"):
        open_test_set(tmp_path)
    (tmp_path / "LQ").mkdir()
    with pytest.raises(UserError, match="GT holds no video"):
        open_test_set(tmp_path)


@pytest.mark.parametrize("text", ["a=,lq=x", "a/b=c", "here,nonsense", "here,scale=0", "here,colour=red"])
def test_unreadable_sets_list_the_valid_forms_or_the_setting(text):
    with pytest.raises(UserError, match="valid forms|scale must be|does not exist"):
        parse_set(text)
