"""The whole degradation of a clip: ranges, smoothness, no wrap-around, the same bytes everywhere."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from data.degradation import degrade, pipeline
from data.degradation.presets import REALBASICVSR
from flashvsr.base.cli import UserError
from flashvsr.base.draws import numpy_rng
from tests.data.conftest import moving

CONFIG = REALBASICVSR


def drawn(seed: int, frames: int = 30) -> dict:
    return pipeline.draw(CONFIG, frames, 256, 256, np.random.default_rng(seed))


def test_drawn_values_keep_to_the_published_ranges_and_steps():
    for seed in range(60):
        params = drawn(seed)
        assert json.loads(json.dumps(params)) == params
        walks = []
        for name, stage in (("first", CONFIG.first), ("second", CONFIG.second)):
            p = params[name]
            walks.append((p["resize"]["scale"], stage.resize.scale))
            walks.append((p["noise"]["strength"], getattr(stage.noise, _strength(p["noise"]["kind"]))))
            walks.append((p["jpeg"]["quality"], stage.jpeg.quality))
            blur = p["blur"]
            if blur is not None and blur["shape"] != "sinc":
                walks.append((blur["sigma_x"], stage.blur.sigma))
                walks += [(blur[k], w) for k, w in _extras(blur, stage.blur)]
        for values, walk in walks:
            assert walk.low <= min(values) and max(values) <= walk.high
            # quality is rounded to whole numbers after the walk
            assert np.abs(np.diff(values)).max() <= walk.step + (1 if walk.high == 95 else 1e-9)


def _strength(kind: str) -> str:
    return "sigma" if kind == "gaussian" else "scale"


def _extras(blur, config):
    beta = config.beta_plateau if blur["shape"].startswith("plateau") else config.beta_gaussian
    known = {"sigma_y": config.sigma, "rotation": config.rotation, "beta": beta}
    return [(k, w) for k, w in known.items() if k in blur]


def test_kinds_come_as_often_as_published():
    params = [drawn(seed, 1) for seed in range(1500)]

    def share(test):
        return sum(map(test, params)) / len(params)

    for found, expected in (
        (share(lambda p: p["first"]["blur"] is not None), 1.0),
        (share(lambda p: p["second"]["blur"] is not None), 0.8),
        (share(lambda p: p["first"]["blur"]["shape"] == "iso"), 0.405),
        (share(lambda p: p["first"]["blur"]["shape"] == "sinc"), 0.1),
        (share(lambda p: p["first"]["resize"]["direction"] == "down"), 0.7),
        (share(lambda p: p["second"]["resize"]["direction"] == "keep"), 0.3),
        (share(lambda p: p["second"]["resize"]["filter"] == "area"), 1 / 3),
        (share(lambda p: p["first"]["noise"]["kind"] == "poisson"), 0.5),
        (share(lambda p: p["first"]["noise"]["gray"]), 0.4),
        (share(lambda p: p["second"]["codec"]["codec"] == "mpeg4"), 1 / 3),
        (share(lambda p: p["final"]["codec_first"]), 0.5),
        (share(lambda p: p["final"]["sinc"] is not None), 0.8),
    ):
        assert abs(found - expected) < 0.05


def test_lr_size_is_exact_for_odd_sizes_and_single_frames():
    frames = moving(0, 6, 36, 52)
    for seed in range(4):
        lr, _ = degrade(frames, 4, "realbasicvsr", np.random.default_rng(seed))
        assert lr.shape == (6, 9, 13, 3) and lr.dtype == np.uint8
    lr, params = degrade(frames[:1], 2, "realbasicvsr", np.random.default_rng(9))
    assert lr.shape == (1, 18, 26, 3) and len(params["first"]["jpeg"]["quality"]) == 1


def test_white_stays_bright_and_black_dark():
    """Overshoot of bicubic and sinc next to a hard edge must be clipped, not wrapped around."""
    frames = np.zeros((3, 96, 128, 3), np.uint8)
    frames[:, :, 64:] = 255
    for seed in range(12):
        params = pipeline.draw(CONFIG, 3, 96, 128, np.random.default_rng(seed))
        for stage in ("first", "second"):  # without noise, and with the overshooting filter
            params[stage]["noise"] = {"kind": "gaussian", "gray": True, "strength": [0.0] * 3}
            params[stage]["resize"]["filter"] = "bicubic"
            params[stage]["jpeg"]["quality"] = [95] * 3
            params[stage]["codec"]["bits_per_frame"] = 200_000
        params["final"] |= {"filter": "bicubic", "sinc": {"shape": "sinc", "size": 13, "omega": [1.3] * 3}}
        lr = pipeline.apply(frames, 4, CONFIG, params)
        assert lr[:, :, :12].max() < 60 and lr[:, :, 20:].min() > 195, seed


def test_content_stays_in_place():
    """The centre of a bright disc lands where plain shrinking puts it."""
    y, x = np.mgrid[0:128, 0:128]
    disc = ((x - 50) ** 2 + (y - 72) ** 2 < 24**2) * 200 + 20
    frames = np.repeat(np.repeat(disc[None, ..., None], 2, 0), 3, 3).astype(np.uint8)
    shifts = []
    for seed in range(8):
        lr, _ = degrade(frames, 4, "realbasicvsr", np.random.default_rng(seed))
        weight = (lr.mean((0, 3)) - 20).clip(60, None) - 60  # above noise
        v, u = np.mgrid[0:32, 0:32] * 4 + 1.5
        shifts.append([(weight * u).sum() / weight.sum() - 50, (weight * v).sum() / weight.sum() - 72])
    assert np.abs(np.mean(shifts, 0)).max() < 0.7 and np.abs(shifts).max() < 2


def test_damage_is_real_and_differs_between_seeds():
    frames = moving(1, 4, 64, 64)
    small = frames.reshape(4, 16, 4, 16, 4, 3).mean((2, 4))
    results = [degrade(frames, 4, "realbasicvsr", np.random.default_rng(s))[0] for s in range(4)]
    for i, lr in enumerate(results):
        assert np.abs(lr - small).mean() > 1
        assert not any(np.array_equal(lr, other) for other in results[:i])


CHILD = """
import hashlib, numpy as np
from data.degradation import degrade
from flashvsr.base.draws import numpy_rng
from tests.data.conftest import moving
lr, params = degrade(moving(4, 9, 64, 96), 4, "realbasicvsr", numpy_rng("degrade", 7))
print(hashlib.sha256(lr.tobytes() + repr(params).encode()).hexdigest())
"""


def test_another_process_with_other_threads_gives_the_same_bytes():
    lr, params = degrade(moving(4, 9, 64, 96), 4, "realbasicvsr", numpy_rng("degrade", 7))
    here = hashlib.sha256(lr.tobytes() + repr(params).encode()).hexdigest()
    env = {**os.environ, "OMP_NUM_THREADS": "3"}
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, env=env, check=True)
    assert child.stdout.strip() == here


def test_wrong_requests_are_refused_in_a_sentence():
    with pytest.raises(UserError, match="realbasicvrs.*choose one of realbasicvsr"):
        degrade(moving(0, 1, 32, 32), 4, "realbasicvrs", np.random.default_rng(0))
    with pytest.raises(UserError, match="34x32 by 4"):
        degrade(moving(0, 1, 32, 34), 4, "realbasicvsr", np.random.default_rng(0))
