"""The runner's numbers are the metrics' numbers, whatever the method's delay; misfits name the clip."""

import shutil
import time

import numpy as np
import pytest
import torch

import flashvsr
from eval.baselines import Bicubic
from eval.datasets import open_test_set
from eval.methods import Method, parse_method
from eval.metrics import Lpips, psnr, ssim
from eval.prepare import write_frames
from eval.runner import evaluate, run_clip
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import VideoWriter

ANY = Method("any", "any", "model", None, {})


class Delayed:
    """Bicubic that answers three frames late, as streaming does; `extra` frames too many or few."""

    in_use = {"decoder": "fake"}

    def __init__(self, extra: int = 0, pause: float = 0.0):
        self.inner, self.held, self.extra, self.pause = Bicubic(4), [], extra, pause

    def push(self, frames):
        time.sleep(self.pause * len(frames))
        self.held += list(self.inner.push(frames).numpy())
        ready, self.held = self.held[:-3], self.held[-3:]
        return np.stack(ready) if ready else np.empty((0, 384, 512, 3), np.uint8)

    def flush(self):
        rest = self.held + self.held[-1:] * max(self.extra, 0)
        return np.stack(rest[: len(rest) + min(self.extra, 0)])


@pytest.fixture(scope="module")
def lpips():
    return Lpips("alex", "random")


@pytest.fixture(scope="module")
def test_set(test_folder):
    return open_test_set(test_folder)


@pytest.fixture(scope="module")
def enlarged(test_set):
    """Bicubic outputs of every clip, made directly."""
    return {p.name: Bicubic(4).push(next(p.read_lq(99))).numpy() for p in test_set.pairs}


@pytest.fixture
def outputs(tmp_path, enlarged):
    """A folder of finished outputs: one clip as frames, one as a lossless video."""
    write_frames(tmp_path / "sr" / "alpha", enlarged["alpha"])
    with VideoWriter(tmp_path / "sr" / "beta.mkv", 25, 96, 128, lossless=True) as writer:
        writer.write(enlarged["beta"])
    return tmp_path / "sr"


def test_scores_equal_the_metrics_on_whole_clips(test_set, lpips, hr_clips, enlarged, outputs):
    methods = [parse_method("bicubic"), parse_method(f"made before={outputs}")]
    outcome = evaluate(methods, test_set, lpips, panels=1, quiet=True)
    scores = outcome.scores
    assert [(s.method, s.clip, s.frames) for s in scores] == [
        ("bicubic", "alpha", 5),
        ("bicubic", "beta", 11),
        ("made before", "alpha", 5),
        ("made before", "beta", 11),
    ]
    for score in scores:
        sr, hr = enlarged[score.clip], hr_clips[score.clip]
        assert score.psnr == pytest.approx(psnr(sr, hr), abs=1e-9)
        assert score.ssim == pytest.approx(ssim(sr, hr), abs=1e-9)
        assert score.lpips == pytest.approx(lpips.clip(sr, hr), abs=1e-9)
        assert (score.seconds_per_frame is None) == (score.method == "made before")

    (panel,) = outcome.panels
    assert (panel.clip, panel.frame) == ("alpha", 2)
    assert list(panel.pictures) == ["LR", "bicubic", "made before", "HR"]
    assert np.array_equal(panel.pictures["HR"], hr_clips["alpha"][2])
    assert np.array_equal(panel.pictures["made before"], enlarged["alpha"][2])
    assert np.array_equal(panel.pictures["LR"][::4, ::4], next(test_set.pairs[0].read_lq(99))[2])
    assert panel.pictures["LR"].shape == panel.pictures["HR"].shape


def test_a_method_may_answer_late(test_set, lpips, hr_clips, enlarged):
    for pair in test_set.pairs:
        score, picture = run_clip(ANY, Delayed(pause=0.01), pair, lpips)
        assert score.psnr == pytest.approx(psnr(enlarged[pair.name], hr_clips[pair.name]), abs=1e-9)
        assert np.array_equal(picture, enlarged[pair.name][pair.frames // 2])
        assert 0.01 <= score.seconds_per_frame < 0.1


def test_only_the_first_frames_when_asked(test_folder, lpips, hr_clips, enlarged, outputs):
    outcome = evaluate([parse_method(f"x={outputs}")], open_test_set(test_folder, 4), lpips, quiet=True)
    for score in outcome.scores:
        assert score.frames == 4
        assert score.psnr == pytest.approx(psnr(enlarged[score.clip][:4], hr_clips[score.clip][:4]), abs=1e-9)


@pytest.mark.parametrize("extra, words", [(1, "at least 12 output frames"), (-1, "10 output frames")])
def test_a_wrong_number_of_frames_names_method_and_clip(test_set, lpips, extra, words):
    with pytest.raises(UserError, match=f"'any': clip 'beta' has {words}, GT has 11"):
        run_clip(ANY, Delayed(extra), test_set.pairs[1], lpips)


def test_a_wrong_size_names_method_and_clip(test_set, lpips):
    with pytest.raises(UserError, match="'any': clip 'alpha' came out 64x48, GT is 128x96"):
        run_clip(ANY, Bicubic(2), test_set.pairs[0], lpips)


def test_finished_outputs_must_be_there_and_complete(test_set, lpips, outputs):
    method = parse_method(f"x={outputs}")
    (outputs / "alpha" / "frame-000004.png").unlink()
    with pytest.raises(UserError, match="alpha has 4 frames, clip 'alpha' has 5 in GT"):
        evaluate([method], test_set, lpips, quiet=True)
    shutil.rmtree(outputs / "alpha")
    with pytest.raises(UserError, match="no output for clip 'alpha'"):
        evaluate([method], test_set, lpips, quiet=True)


def test_a_mistake_in_the_last_method_stops_before_the_first_runs(test_set, lpips, tmp_path, monkeypatch):
    (tmp_path / "alpha.txt").touch()
    monkeypatch.setattr(Bicubic, "push", lambda *_: pytest.fail("the first method ran"))
    methods = [parse_method("bicubic"), parse_method(f"empty={tmp_path}")]
    with pytest.raises(UserError, match="'empty'.*no output for clip 'alpha'"):
        evaluate(methods, test_set, lpips, quiet=True)


def test_a_model_folder_is_loaded_with_its_settings(test_set, lpips, tmp_path, monkeypatch):
    (tmp_path / "flashvsr.json").write_text("{}")
    calls = []

    def load(path, **settings):
        calls.append(("load", path, settings))
        return "model"

    def make(model, **settings):
        calls.append(("method", model, settings))
        return Delayed()

    monkeypatch.setitem(vars(flashvsr), "load", load)
    monkeypatch.setitem(vars(flashvsr), "method", make)
    method = parse_method(f"ours={tmp_path},decoder=vae,steps=4,sparse_ratio=1.5,tile=none,lr_projector=v1")
    outcome = evaluate([method], test_set, lpips, quiet=True)
    assert outcome.in_use == {"ours": {"decoder": "fake"}}
    loading = {"dtype": torch.float32, "device": "cpu", "lr_projector": "v1"}
    settings = {"decoder": "vae", "steps": 4, "sparse_ratio": 1.5, "tile": None}
    once = [("load", tmp_path, loading)] + [("method", "model", settings)] * 2
    assert calls == once + once  # tried out before anything runs, then run


@pytest.mark.parametrize(
    "text, words",
    [
        ("ours", "valid forms: NAME=bicubic, NAME=FOLDER_OF_OUTPUTS"),
        ("ours=nearest", "no folder or baseline 'nearest'; valid forms"),
        ("runs/demo/export,decoder=vae", "valid forms"),
        ("b=bicubic,steps=4", "settings have no effect"),
        ("here=.,steps", "'steps' is no setting"),
    ],
)
def test_unreadable_methods_list_the_valid_forms(text, words):
    with pytest.raises(UserError, match=words):
        parse_method(text)
