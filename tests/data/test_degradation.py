"""The whole degradation of a clip: ranges, smoothness, wrap-around only where it belongs, the same bytes
everywhere."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

from data.degradation import PRESETS, degrade, pipeline, plain, stats
from data.degradation.blur import draw_beta
from data.degradation.presets import REALBASICVSR
from data.degradation.steps import Blur, Codec, Grain, Jpeg, Noise, Resize, Shuffled, Walk
from flashvsr.base.cli import UserError
from flashvsr.base.draws import numpy_rng
from tests.data.conftest import moving

NAMES = sorted(PRESETS)


def drawn(seed: int, name: str = "realbasicvsr", frames: int = 30, side: int = 256) -> list[dict]:
    return pipeline.draw(PRESETS[name], frames, side, side, 4, np.random.default_rng(seed))["steps"]


def steps_of(name: str) -> list:
    return list(stats._flat(PRESETS[name]))


def walks_of(config, step: dict) -> list[tuple[list, Walk]]:
    """Every walked value of a drawn step with its walk."""
    match config:
        case Resize():
            return [(step["scale"], config.scale)]
        case Noise():
            return [(step["strength"], config.sigma if step["kind"] == "gaussian" else config.scale)]
        case Grain():
            return [(step["strength"], config.strength), (step["size"], config.size)]
        case Jpeg():
            return [(step["quality"], config.quality)]
        case Blur() if step["shape"] == "sinc":
            return [(step["omega"], config.omega_small if step["size"] < 13 else config.omega_large)]
        case Blur():
            beta = config.beta_plateau if step["shape"].startswith("plateau") else config.beta_gaussian
            sigma = config.sigma
            known = {"sigma_x": sigma, "sigma_y": sigma, "rotation": config.rotation, "beta": beta}
            return [(step[key], walk) for key, walk in known.items() if key in step]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_drawn_values_keep_to_ranges_and_steps(name):
    checked = 0
    for seed in range(60):
        for config in steps_of(name):
            drawing = pipeline._Drawing(30, (256, 256), 4, np.random.default_rng(seed))
            step = drawing._draw(config)[1]
            if step is None:
                continue
            assert json.loads(json.dumps(step)) == step
            for values, walk in walks_of(config, step):
                checked += 1
                assert len(values) == 30
                assert min(values) >= walk.low - 1e-12 and max(values) <= walk.high + 1e-12
                if step.get("beta") is values and name.endswith("legacy"):
                    continue
                # quality is rounded to whole numbers after the walk
                more = 1 if isinstance(config, Jpeg) else 1e-9
                assert np.abs(np.diff(values)).max() <= walk.step + more
    assert checked > 200


def _is_last_sinc(step: dict, clip: list[dict]) -> bool:
    """Whether this blur is the one beside the resize to LR."""
    place = next(i for i, s in enumerate(clip) if s["op"] == "to_lr")
    return step["op"] == "blur" and place + 1 < len(clip) and clip[place + 1] is step


def test_kinds_come_as_often_as_published():
    clips = [drawn(seed, frames=1) for seed in range(1500)]

    def share(test):
        return sum(map(test, clips)) / len(clips)

    def place(clip, op):
        return next(i for i, s in enumerate(clip) if s["op"] == op)

    def nth(clip, op, n):
        return [s for s in clip if s["op"] == op][n]

    for found, expected in (
        (share(lambda c: c[1]["op"] == "blur"), 1.0),
        (share(lambda c: c[6]["op"] == "blur"), 0.8),
        (share(lambda c: c[1]["shape"] == "iso"), 0.405),
        (share(lambda c: c[1]["shape"] == "sinc"), 0.1),
        (share(lambda c: nth(c, "resize", 0)["direction"] == "down"), 0.7),
        (share(lambda c: nth(c, "resize", 1)["direction"] == "keep"), 0.3),
        (share(lambda c: nth(c, "resize", 1)["filter"] == "area"), 1 / 3),
        (share(lambda c: nth(c, "noise", 0)["kind"] == "poisson"), 0.5),
        (share(lambda c: nth(c, "noise", 0)["gray"]), 0.4),
        (share(lambda c: nth(c, "codec", 1)["codec"] == "mpeg4"), 1 / 3),
        (share(lambda c: c[-1]["op"] == "codec"), 0.5),
        (share(lambda c: _is_last_sinc(c[min(place(c, "to_lr") + 1, len(c) - 1)], c)), 0.8),
    ):
        assert abs(found - expected) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_draws_agree_with_what_the_preset_says(name):
    for what, found, wanted in stats.draws(name, clips=150, frames=4):
        if "largest step" in what:
            assert found <= wanted + 1e-9
        else:
            assert abs(found - wanted) < 0.15, what


def test_the_published_parameters_have_not_moved():
    """Runs made before the presets were lists drew these."""
    params = pipeline.draw(REALBASICVSR, 4, 256, 256, 4, np.random.default_rng(0))
    # The seed is drawn last: it moves when anything before it draws more or less.
    assert params["noise_seed"] == 3629850259773422483
    assert params["steps"][1]["sigma_x"][3] == pytest.approx(0.2795838431696885)
    assert params["steps"][3]["strength"][1] == pytest.approx(2.1992401231743606)


@pytest.mark.parametrize("name", NAMES)
def test_lr_size_is_exact_for_odd_sizes_and_single_frames(name):
    frames = moving(0, 5, 36, 52)
    lr, _ = degrade(frames, 4, name, np.random.default_rng(1))
    assert lr.shape == (5, 9, 13, 3) and lr.dtype == np.uint8
    lr, params = degrade(frames[:1], 2, name, np.random.default_rng(9))
    assert lr.shape == (1, 18, 26, 3)
    walked = [v for s in params["steps"] for k, v in s.items() if k in ("scale", "quality", "sigma_x")]
    assert walked and {len(v) for v in walked} == {1}


def test_white_stays_bright_and_black_dark_but_not_in_legacy():
    """Overshoot of bicubic and sinc next to a hard edge is clipped; the published code lets it wrap."""
    frames = np.zeros((3, 96, 128, 3), np.uint8)
    frames[:, :, 64:] = 255
    wrapped = 0
    for name in ("realbasicvsr", "realbasicvsr-legacy"):
        for seed in range(10):
            params = pipeline.draw(PRESETS[name], 3, 96, 128, 4, np.random.default_rng(seed))
            for step in params["steps"]:  # without noise, and with the overshooting filter
                match step["op"]:
                    case "noise":
                        step |= {"kind": "gaussian", "strength": [0.0] * 3}
                    case "resize" | "to_lr":
                        step["filter"] = "bicubic"
                    case "jpeg":
                        step["quality"] = [95] * 3
                    case "codec":
                        step["bits_per_frame"] = 200_000
            to_lr, codec = (
                next(s for s in params["steps"][::-1] if s["op"] == op) for op in ("to_lr", "codec")
            )
            sinc = {"op": "blur", "shape": "sinc", "size": 13, "omega": [1.3] * 3, "clip": to_lr["clip"]}
            params["steps"] = params["steps"][:10] + [to_lr, sinc, codec]
            lr = pipeline.apply(frames, params)
            fine = lr[:, :, :12].max() < 60 and lr[:, :, 20:].min() > 195
            if name == "realbasicvsr":
                assert fine, seed
            wrapped += not fine
    assert wrapped >= 1


def test_legacy_differs_where_the_table_says_and_nowhere_else():
    ours, legacy = steps_of("realbasicvsr"), steps_of("realbasicvsr-legacy")
    allowed = {
        Blur: {"beta", "clip"},
        Resize: {"clip"},
        Noise: {"clip"},
        Jpeg: {"whole_steps", "swapped"},
        Codec: {"scaled", "wrap"},
    }
    for a, b in zip(ours, legacy, strict=True):
        assert type(a) is type(b)
        other = {f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)}
        assert other == (allowed.get(type(a), {"clip"} if "clip" in vars(a) else set())), type(a)


def test_legacy_draws_beta_anew_in_every_frame():
    """Between 1 and where the walk is: mean 1.63 over all clips, where the smooth walk has 2.25."""
    means = {}
    for name in ("realbasicvsr", "realbasicvsr-legacy"):
        step = next(s for s in steps_of(name) if isinstance(s, Blur))
        rows = [draw_beta(step, "generalized_iso", 20, np.random.default_rng(s)) for s in range(800)]
        means[name] = np.mean(rows)
        largest = np.abs(np.diff(rows, axis=1)).max()
        assert (largest > 1) == name.endswith("legacy")
    assert abs(means["realbasicvsr"] - 2.25) < 0.1 and abs(means["realbasicvsr-legacy"] - 1.63) < 0.06


def test_dove_holds_all_but_the_quality_for_a_clip():
    for seed in range(10):
        for step in drawn(seed, "dove", frames=8):
            for key in ("sigma_x", "sigma_y", "rotation", "beta", "omega", "scale", "strength"):
                assert len(set(step.get(key, [0]))) == 1
    qualities = [s["quality"] for i in range(5) for s in drawn(i, "dove", frames=8) if s["op"] == "jpeg"]
    assert all(len(set(q)) > 1 for q in qualities)
    assert not any(s["op"] == "sharpen" for s in drawn(0, "dove"))


def test_real_esrgans_second_resize_is_of_the_lr_size():
    for seed in range(10):
        first, second = (s for s in drawn(seed, "realesrgan") if s["op"] == "resize")
        assert first["of"] == [256, 256] and second["of"] == [64, 64]
    shares = np.mean(
        [
            s["beta"][0] < 1
            for i in range(3000)
            for s in drawn(i, "realesrgan", frames=1)
            if s["op"] == "blur" and s["shape"].startswith("generalized")
        ]
    )
    assert abs(shares - 0.5) < 0.05


def test_modern_has_generations_of_both_codecs_and_says_when_one_is_replaced():
    large = [s for i in range(60) for s in drawn(i, "modern", 2, 1024) if s["op"] == "codec"]
    assert {s["codec"] for s in large} == {"libx264", "libx265"}
    assert not any("instead_of" in s for s in large)
    counts = {sum(s["op"] == "codec" for s in drawn(i, "modern", 2)) for i in range(30)}
    assert counts == {2, 3}
    small = [s for i in range(20) for s in drawn(i, "modern", 2, 48) if s["op"] == "codec"]
    assert {s["codec"] for s in small} == {"libx264"} and any("instead_of" in s for s in small)


def test_bits_grow_with_the_area_except_in_legacy():
    for name, factor in (("realbasicvsr", 4), ("realbasicvsr-legacy", 1)):
        small, large = (
            [s["bits_per_frame"] for s in drawn(5, name, 3, side) if s["op"] == "codec"]
            for side in (256, 512)
        )
        assert [factor * bits for bits in small] == large
        assert min(small) >= 10_000 and max(small) <= 100_000


def test_content_stays_in_place():
    """The centre of a bright disc lands where plain shrinking puts it."""
    y, x = np.mgrid[0:128, 0:128]
    disc = ((x - 50) ** 2 + (y - 72) ** 2 < 24**2) * 200 + 20
    frames = np.repeat(np.repeat(disc[None, ..., None], 2, 0), 3, 3).astype(np.uint8)
    for name in ("realbasicvsr", "realesrgan", "modern"):
        shifts = []
        for seed in range(6):
            lr, _ = degrade(frames, 4, name, np.random.default_rng(seed))
            weight = (lr.mean((0, 3)) - 20).clip(60, None) - 60  # above noise
            v, u = np.mgrid[0:32, 0:32] * 4 + 1.5
            shifts.append([(weight * u).sum() / weight.sum() - 50, (weight * v).sum() / weight.sum() - 72])
        assert np.abs(np.mean(shifts, 0)).max() < 0.7 and np.abs(shifts).max() < 2


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_real_and_differs_between_seeds(name):
    frames = moving(1, 4, 64, 64)
    small = frames.reshape(4, 16, 4, 16, 4, 3).mean((2, 4))
    results = [degrade(frames, 4, name, np.random.default_rng(s))[0] for s in range(3)]
    for i, lr in enumerate(results):
        assert np.abs(lr - small).mean() > 1
        assert not any(np.array_equal(lr, other) for other in results[:i])


@pytest.mark.parametrize("name", NAMES)
def test_drawn_parameters_give_the_same_bytes_again(name):
    frames = moving(2, 5, 48, 64)
    lr, params = degrade(frames, 4, name, np.random.default_rng(4))
    stored = json.loads(json.dumps(params))
    assert np.array_equal(pipeline.apply(frames, stored), lr)
    assert np.array_equal(np.stack(list(pipeline.stream(iter(frames), stored))), lr)


def test_a_long_clip_passes_in_little_memory():
    """As many frames are in flight as encoders look ahead, however long the clip is."""
    count, alive, most = 400, 0, 0
    params = pipeline.draw(PRESETS["dove"], count, 16, 16, 4, np.random.default_rng(1))
    params["steps"] = [s for s in params["steps"] if s["op"] in ("codec", "to_lr")]

    def source():
        nonlocal alive, most
        for frame in moving(0, count, 16, 16):
            alive += 1
            most = max(most, alive)
            yield frame

    for _ in pipeline.stream(source(), params):
        alive -= 1
    assert alive == 0 and most < 150


CHILD = """
import hashlib, sys, numpy as np
from data.degradation import degrade
from flashvsr.base.draws import numpy_rng
from tests.data.conftest import moving
for name in sys.argv[1:]:
    lr, params = degrade(moving(4, 6, 96, 256), 4, name, numpy_rng("degrade", 7))
    print(hashlib.sha256(lr.tobytes() + repr(params).encode()).hexdigest())
"""


def test_another_process_with_other_threads_gives_the_same_bytes():
    here = []
    for name in NAMES:
        lr, params = degrade(moving(4, 6, 96, 256), 4, name, numpy_rng("degrade", 7))
        here.append(hashlib.sha256(lr.tobytes() + repr(params).encode()).hexdigest())
    env = {**os.environ, "OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *NAMES], capture_output=True, text=True, env=env, check=True
    )
    assert child.stdout.split() == here


def test_the_plain_form_does_the_same_to_a_clip():
    """Same parameters, without noise (other samples) and codecs (they make much of little): what is left
    differs by rounding and what JPEG makes of it."""
    pytest.importorskip("cv2")
    frames = moving(5, 3, 128, 160)
    for seed in range(6):
        params = pipeline.draw(REALBASICVSR, 3, 128, 160, 4, np.random.default_rng(seed))
        params["steps"] = [s for s in params["steps"] if s["op"] not in ("noise", "codec")]
        error = np.abs(pipeline.apply(frames, params).astype(int) - plain.apply(frames, params))
        assert (error <= 1).mean() > 0.85 and error.mean() < 1, seed


def test_wrong_requests_are_refused_in_a_sentence():
    with pytest.raises(UserError, match="realbasicvrs.*choose one of dove, modern, realbasicvsr"):
        degrade(moving(0, 1, 32, 32), 4, "realbasicvrs", np.random.default_rng(0))
    with pytest.raises(UserError, match="34x32 by 4"):
        degrade(moving(0, 1, 32, 34), 4, "realbasicvsr", np.random.default_rng(0))
    with pytest.raises(UserError, match="without frames"):
        degrade(np.empty((0, 32, 32, 3), np.uint8), 4, "dove", np.random.default_rng(0))
    for params in (
        {"format": 1, "noise_seed": 0},
        [],
        {"format": 2, "noise_seed": 1, "steps": [{"op": "x"}]},
    ):
        with pytest.raises(UserError, match="draw"):
            list(pipeline.stream([], params))
    assert isinstance(PRESETS["modern"][-1], Shuffled)
