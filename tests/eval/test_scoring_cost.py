"""What scoring costs beside its slowest metric, and that memory does not grow with the clip."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval.cache import FrameSink, Output
from eval.datasets import Clip
from eval.metrics.scoring import Suite
from eval.units import Fit, MetricChoice, Unit
from eval.worker import score
from flashvsr.base.measure import interleaved

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def clip_of(folder, frames, height, width):
    """A textured clip that moves, its noisy copy as an output: the unit and the output."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 240, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with FrameSink(folder / "gt.mkv") as gt, FrameSink(folder / "sr.mkv") as sr:
        for i in range(frames):
            frame = np.roll(texture, 3 * i, axis=1)
            gt.write(frame[None])
            sr.write((frame + rng.integers(0, 12, frame.shape, dtype=np.uint8))[None])
    output = Output(sr.path, frames, height, width, sr.pixels)
    return Unit(None, None, Clip("c", gt.path, gt.path, frames, frames, height, width), ("", "")), output


def test_three_metrics_cost_at_most_half_more_than_the_slowest_alone(tmp_path, capsys):
    """PSNR, SSIM and LPIPS over 100 frames of 720p, in turns, each run decoding both sides."""
    unit, output = clip_of(tmp_path, 100, 720, 1280)
    suite, fit = MetricChoice(("psnr", "ssim", "lpips")).suite(), Fit(100, 720, 1280, "")

    def run(*metrics):
        return lambda: score(unit, output, fit, Suite(metrics), lambda n: None)

    seconds = interleaved({m.key: run(m) for m in suite.metrics} | {"all": run(*suite.metrics)}, 1, 0)
    slowest = max(value for key, value in seconds.items() if key != "all")
    with capsys.disabled():
        print(f"\nscoring 100 frames of 720p: {json.dumps(seconds)}, ratio {seconds['all'] / slowest:.2f}")
    assert seconds["all"] <= 1.5 * slowest


def test_memory_at_4k_does_not_grow_with_the_clip(tmp_path):
    """Peak memory of a process that scores 8 and one that scores 24 frames."""
    code = """
import sys
from pathlib import Path
from eval.units import Fit, MetricChoice
from eval.worker import score
from flashvsr.base.measure import peak_rss_bytes
from tests.eval.test_scoring_cost import clip_of
frames = int(sys.argv[2])
unit, output = clip_of(Path(sys.argv[1]), frames, 2160, 3840)
score(unit, output, Fit(frames, 2160, 3840, ""), MetricChoice(("psnr", "ssim")).suite(), lambda n: None)
print(peak_rss_bytes())
"""
    peaks = []
    for frames in (8, 24):
        folder = tmp_path / str(frames)
        folder.mkdir()
        command = [sys.executable, "-c", code, str(folder), str(frames)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    print(f"peak MiB: {[peak >> 20 for peak in peaks]}")
    assert peaks[1] <= 1.15 * peaks[0]
