"""The runner's numbers are the metrics' numbers; nothing is made twice; misfits name the clip."""

import json
import shutil
import time
from multiprocessing import Pipe
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval.worker
import flashvsr
from eval.baselines import Bicubic
from eval.cache import Cache, FrameSink
from eval.datasets import open_test_set
from eval.methods import parse_method
from eval.metrics import Lpips, psnr, ssim
from eval.prepare import write_frames
from eval.runner import evaluate
from eval.units import MetricChoice, job_for
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import VideoWriter, read_frames

METRICS = ("psnr", "ssim", "lpips")


class Delayed:
    """Bicubic that answers three frames late, as streaming does; `extra` frames too many or few."""

    in_use = {"decoder": "fake"}

    def __init__(self, extra: int = 0, pause: float = 0.0):
        self.inner, self.held, self.extra, self.pause = Bicubic(4), [], extra, pause

    def push(self, frames):
        time.sleep(self.pause * len(frames))
        self.held += list(self.inner.push(frames).numpy())
        ready, self.held = self.held[:-3], self.held[-3:]
        return np.stack(ready) if ready else np.empty((0, 96, 128, 3), np.uint8)

    def flush(self):
        rest = self.held + self.held[-1:] * max(self.extra, 0)
        return np.stack(rest[: len(rest) + min(self.extra, 0)])


@pytest.fixture(scope="module")
def test_set(test_folder):
    return open_test_set(test_folder, name="set")


@pytest.fixture(scope="module")
def enlarged(test_set):
    """Bicubic outputs of every clip, made directly."""
    return {c.name: Bicubic(4).push(np.stack(list(c.read_lq()))).numpy() for c in test_set.clips}


@pytest.fixture
def outputs(tmp_path, enlarged):
    """A folder of finished outputs: one clip as frames, one as a lossless video."""
    write_frames(tmp_path / "sr" / "alpha", enlarged["alpha"])
    with VideoWriter(tmp_path / "sr" / "beta.mkv", 25, 96, 128, lossless=True) as writer:
        writer.write(enlarged["beta"])
    return tmp_path / "sr"


@pytest.fixture
def go(tmp_path):
    """Evaluates --method texts on sets, in one cache per test."""

    def run(texts, *sets, fresh=False, align="refuse", metrics=("psnr",), devices=("cpu",)):
        cache = Cache(tmp_path / "cache", fresh)
        job, _ = job_for(MetricChoice(metrics, lpips_weights="random"), cache, align, torch.float32, devices)
        return evaluate([parse_method(text) for text in texts], sets, job, devices, quiet=True)

    return run


@pytest.fixture
def method_of_ours(tmp_path, monkeypatch):
    """A model folder whose upscalers `make` gives; returns the folder and the calls."""
    folder, calls = tmp_path / "model", []
    folder.mkdir()
    (folder / "flashvsr.json").write_text("{}")

    def install(make=Delayed):
        monkeypatch.setitem(vars(flashvsr), "load", lambda path, **s: calls.append((path, s)) or "model")
        monkeypatch.setitem(vars(flashvsr), "method", lambda model, **s: calls.append((model, s)) or make())
        return folder, calls

    return install


def test_scores_equal_the_metrics_on_whole_clips(test_set, hr_clips, enlarged, outputs, go):
    outcome = go(["bicubic", f"made before={outputs}"], test_set, metrics=METRICS)
    lpips = Lpips("alex", "random")
    assert [(s.method, s.clip, s.frames) for s in outcome.scores] == [
        ("bicubic", "alpha", 5),
        ("bicubic", "beta", 11),
        ("made before", "alpha", 5),
        ("made before", "beta", 11),
    ]
    for score in outcome.scores:
        sr, hr = enlarged[score.clip], hr_clips[score.clip]
        assert score.values["psnr"] == pytest.approx(psnr(sr, hr), abs=1e-6)
        assert score.values["ssim"] == pytest.approx(ssim(sr, hr), abs=1e-6)
        assert score.values["lpips-random"] == pytest.approx(lpips.clip(sr, hr), abs=1e-6)
        assert np.mean(score.per_frame["psnr"]) == pytest.approx(score.values["psnr"])
        assert len(score.per_frame["psnr"]) == score.frames
        assert (score.seconds_per_frame is None) == (score.method == "made before")
        assert np.array_equal(np.stack(list(read_frames(score.output))), sr)


def test_a_method_may_answer_late_and_is_timed_alone(test_set, enlarged, method_of_ours, go):
    folder, _ = method_of_ours(lambda: Delayed(pause=0.01))
    for score in go([f"late={folder}"], test_set).scores:
        assert 0.01 <= score.seconds_per_frame < 0.1
        # 5 frames: two come with the first push; of 11 frames five do.
        assert 0.01 * min(8, score.frames) <= score.first_output_seconds < 1
        assert np.array_equal(np.stack(list(read_frames(score.output))), enlarged[score.clip])
        assert score.timed_on["device"] == "cpu" and not score.cached


def test_the_same_command_makes_and_scores_nothing_again(test_set, method_of_ours, go, monkeypatch):
    folder, calls = method_of_ours()
    first = go(["bicubic", f"late={folder}"], test_set)
    calls.clear()
    monkeypatch.setattr(Bicubic, "push", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(eval.worker, "score", lambda *_: pytest.fail("scored again"))
    second = go(["bicubic", f"late={folder}"], test_set)
    assert calls == [] and (first.made, second.made) == (4, 0)
    for a, b in zip(first.scores, second.scores, strict=True):
        assert (a.values, a.per_frame, a.seconds_per_frame) == (b.values, b.per_frame, b.seconds_per_frame)
        assert (a.cached, b.cached) == (False, True)
    assert second.in_use == {"bicubic": {}, "late": {"decoder": "fake"}}


def test_what_changed_and_only_that_is_made_again(test_folder, hr_clips, tmp_path, go, method_of_ours):
    folder = shutil.copytree(test_folder, tmp_path / "set")
    model, calls = method_of_ours()
    texts = ["lanczos", f"late={model}"]
    go(texts, open_test_set(folder))
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "outputs").iterdir()}

    def changes(**settings):
        before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.json")}
        outcome = go(settings.pop("texts", texts), open_test_set(folder), **settings)
        after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.json")}
        return outcome.made, len([name for name in after if before.get(name) != after[name]])

    assert changes() == (0, 0)
    assert changes(metrics=("psnr", "ssim")) == (4, 4)  # one score each, no output
    write_frames(folder / "GT" / "alpha", hr_clips["alpha"][::-1].copy())
    assert changes() == (2, 2)  # alpha's scores
    write_frames(folder / "LQ" / "alpha", hr_clips["beta"][:5, ::4, ::4].copy())
    assert changes() == (2, 4)  # alpha's outputs and scores
    (model / "weights.bin").write_text("others")
    assert changes()[0] == 2  # both clips of that method
    assert changes(texts=[f"renamed={model}"]) == (0, 0)
    assert changes(texts=[f"late={model},decoder=vae"])[0] == 2
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "outputs").iterdir()}.items() >= (
        made.items()
    )
    assert changes(fresh=True) == (4, 8)
    assert calls


def test_a_command_killed_at_any_unit_goes_on_where_it_was(test_set, go, tmp_path, monkeypatch):
    whole = go(["bicubic"], test_set)
    shutil.rmtree(tmp_path / "cache")
    write, written = FrameSink.write, []

    def killed(self, frames):
        write(self, frames)
        written.append(self.path)
        if len(set(written)) == 2:
            raise KeyboardInterrupt  # in the middle of the second output

    monkeypatch.setattr(FrameSink, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        go(["bicubic"], test_set)
    monkeypatch.setattr(FrameSink, "write", write)
    assert len(list((tmp_path / "cache" / "outputs").glob("[!.]*.mkv"))) == 1
    again = go(["bicubic"], test_set)
    assert [s.cached for s in again.scores] == [True, False]
    assert [s.values for s in again.scores] == [s.values for s in whole.scores]


def test_half_written_and_changed_entries_do_not_count(test_set, go, tmp_path):
    go(["bicubic"], test_set)
    outputs = tmp_path / "cache" / "outputs"
    records = sorted(outputs.glob("*.json"))
    records[0].unlink()
    records[1].with_suffix(".mkv").write_bytes(b"short")
    assert go(["bicubic"], test_set).made == 2
    # One changed pixel is found when the frames are read for scoring.
    video, record = records[0].with_suffix(".mkv"), json.loads(records[0].read_text())
    frames = np.stack(list(read_frames(video)))
    frames[0, 0, 0, 0] ^= 1
    with FrameSink(video) as sink:
        sink.write(frames)
    records[0].write_text(json.dumps({**record, "bytes": video.stat().st_size}))
    with pytest.raises(UserError, match="does not hold the frames that were written"):
        go(["bicubic"], test_set, metrics=("ssim",))


def test_processes_give_the_same_numbers(test_set, go, tmp_path):
    alone = go(["bicubic"], test_set)
    shutil.rmtree(tmp_path / "cache")
    together = go(["bicubic"], test_set, devices=("cpu", "cpu"))
    assert [s.values for s in together.scores] == [s.values for s in alone.scores]
    assert [s.per_frame for s in together.scores] == [s.per_frame for s in alone.scores]


@pytest.mark.slow
def test_an_error_in_a_process_is_the_users_error(test_folder, go, tmp_path):
    folder = shutil.copytree(test_folder, tmp_path / "set")
    (folder / "LQ" / "beta" / "frame-000007.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="frame-000007.png cannot be read"):
        go(["bicubic"], open_test_set(folder), devices=("cpu", "cpu"))


def test_a_set_without_gt_has_no_full_reference_values(test_set, test_folder, go):
    lq = open_test_set(test_folder / "LQ", name="lq")
    outcome = go(["bicubic"], test_set, lq, metrics=("psnr", "chunk_edge"))
    for score in outcome.scores:
        assert list(score.values) == (["psnr"] if score.dataset == "set" else []) + ["chunk_edge"]
    assert [s.output for s in outcome.scores[:2]] == [s.output for s in outcome.scores[2:]]  # made once


def test_frames_too_small_for_a_metric_say_so(tmp_path, go):
    write_frames(tmp_path / "small" / "a", np.zeros((2, 8, 8, 3), np.uint8))
    (score,) = go(["bicubic"], open_test_set(tmp_path / "small"), metrics=("niqe",)).scores
    assert score.values == {"niqe": None} and score.per_frame == {"niqe": [None, None]}
    assert "two blocks of 96x96" in score.reasons["niqe"]


def test_only_the_first_frames_when_asked(test_folder, hr_clips, enlarged, outputs, go):
    for score in go([f"x={outputs}", "bicubic"], open_test_set(test_folder, 4)).scores:
        assert score.frames == 4
        whole = psnr(enlarged[score.clip][:4], hr_clips[score.clip][:4])
        assert score.values["psnr"] == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("extra, words", [(1, "12 output frames"), (-1, "10 output frames")])
def test_a_wrong_number_of_frames_names_method_and_clip(test_folder, method_of_ours, go, extra, words):
    folder, _ = method_of_ours(lambda: Delayed(extra))
    beta = open_test_set(test_folder, name="set", clips=("beta",))
    with pytest.raises(UserError, match=f"'any': clip 'beta' has {words}, GT has 11"):
        go([f"any={folder}"], beta)


def test_a_wrong_size_names_method_and_clip(test_set, method_of_ours, go, tmp_path):
    folder, _ = method_of_ours(lambda: Bicubic(2))
    with pytest.raises(UserError, match="'any': clip 'alpha' came out 64x48, GT is 128x96"):
        go([f"any={folder}"], test_set)
    assert not list((tmp_path / "cache").rglob("*.mkv"))


def test_align_scores_what_both_have_and_says_so(test_folder, hr_clips, enlarged, tmp_path, go):
    write_frames(tmp_path / "sr" / "alpha", enlarged["alpha"][:3, :90])
    write_frames(tmp_path / "sr" / "beta", enlarged["beta"])
    test_set = open_test_set(test_folder, align="top-left")
    alpha, beta = go([f"x={tmp_path / 'sr'}"], test_set, align="top-left").scores
    assert (alpha.frames, alpha.height, alpha.width, beta.note) == (3, 90, 128, "")
    assert alpha.note == "first 3 of 5 frames; output 128x90 scored on 128x90, top-left"
    whole = psnr(enlarged["alpha"][:3, :90], hr_clips["alpha"][:3, :90])
    assert alpha.values["psnr"] == pytest.approx(whole, abs=1e-6)


def test_finished_outputs_must_be_there_and_complete(test_set, go, outputs):
    (outputs / "alpha" / "frame-000004.png").unlink()
    with pytest.raises(UserError, match="alpha has 4 frames, clip 'alpha' has 5"):
        go([f"x={outputs}"], test_set)
    shutil.rmtree(outputs / "alpha")
    with pytest.raises(UserError, match="no output for clip 'alpha'"):
        go([f"x={outputs}"], test_set)


def test_outputs_of_several_sets_lie_in_folders_of_their_names(test_set, test_folder, outputs, tmp_path, go):
    other = open_test_set(test_folder, name="other", frames=2)
    with pytest.raises(UserError, match="no folder set; with several data sets"):
        go([f"x={outputs}"], test_set, other)
    (tmp_path / "all").mkdir()
    shutil.copytree(outputs, tmp_path / "all" / "set")
    outputs.rename(tmp_path / "all" / "other")
    scores = go([f"x={tmp_path / 'all'}"], test_set, other).scores
    assert [(s.dataset, s.frames) for s in scores] == [("set", 5), ("set", 11), ("other", 2), ("other", 2)]


def test_a_mistake_in_the_last_method_stops_before_the_first_runs(test_set, tmp_path, go, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "alpha.txt").touch()
    monkeypatch.setattr(Bicubic, "push", lambda *_: pytest.fail("the first method ran"))
    with pytest.raises(UserError, match="'empty'.*no output for clip 'alpha'"):
        go(["bicubic", f"empty={tmp_path / 'empty'}"], test_set)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "flashvsr.json").write_text("{}")
    with pytest.raises(UserError):
        go(["bicubic", f"broken={tmp_path / 'model'}"], test_set)


def test_a_model_folder_is_loaded_once_with_its_settings(test_set, method_of_ours, go):
    folder, calls = method_of_ours()
    text = f"ours={folder},decoder=vae,steps=4,sparse_ratio=1.5,tile=none,lr_projector=v1"
    assert go([text], test_set).in_use == {"ours": {"decoder": "fake"}}
    loading = {"dtype": torch.float32, "device": "cpu", "lr_projector": "v1"}
    settings = {"decoder": "vae", "steps": 4, "sparse_ratio": 1.5, "tile": None}
    assert calls == [(folder, loading)] + [("model", settings)] * 2


def test_networks_take_their_weights_and_intervals(test_set, go, tmp_path):
    methods = ["whole=basicvsr,weights=random,interval=none", "cut=basicvsr,weights=random,interval=3"]
    short = open_test_set(test_set.folder, 4, name="set", clips=("alpha",))
    whole, cut = go(methods, short).scores
    assert whole.values["psnr"] != cut.values["psnr"] and whole.values["psnr"] > 10
    with pytest.raises(UserError, match="basicvsr needs weights=FILE"):
        go(["x=basicvsr"], short)
    with pytest.raises(UserError, match="nowhere.pth does not exist"):
        go([f"x=basicvsr,weights={tmp_path}/nowhere.pth"], short)


def test_running_out_of_memory_names_the_clip_and_a_remedy(test_set, method_of_ours, go, monkeypatch):
    class Greedy(Delayed):
        def push(self, frames):
            raise torch.OutOfMemoryError("CUDA out of memory")

    folder, _ = method_of_ours(Greedy)
    with pytest.raises(UserError, match="'big' ran out of memory on clip 'alpha' .128x96.*tile="):
        go([f"big={folder}"], test_set)

    def greedy_score(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(eval.worker, "score", greedy_score)
    with pytest.raises(UserError, match="'bicubic' ran out of memory.*its frames are kept"):
        go(["bicubic"], test_set)


@pytest.mark.parametrize("unread", [False, True])
def test_a_worker_that_is_gone_is_told_by_its_unit(unread):
    """Reading from a process that had not read all it was sent is another error than the end of its file."""
    ours, theirs = Pipe()
    unit = SimpleNamespace(method=SimpleNamespace(name="m"), clip=SimpleNamespace(name="c"))
    if unread:
        ours.send("a unit")
    theirs.close()
    with pytest.raises(UserError, match="'m' on clip 'c' was ended from outside"):
        eval.worker._done(ours, unit, None)
    with pytest.raises(UserError, match="'m' on clip 'c' was ended from outside"):
        eval.worker._hand(ours, [unit])


@pytest.mark.parametrize(
    "text, words",
    [
        ("ours", "valid forms: NAME=bicubic"),
        ("ours=nearest", "no folder or baseline 'nearest'; valid forms"),
        ("runs/demo/export,decoder=vae", "valid forms"),
        ("b=bicubic,steps=4", "settings have no effect"),
        ("here=.,steps", "'steps' is no setting"),
        ("b=basicvsr,weights=random,tiles=3", "basicvsr has no 'tiles'"),
    ],
)
def test_unreadable_methods_list_the_valid_forms(text, words):
    with pytest.raises(UserError, match=words):
        parse_method(text)
