"""Frames of an evaluation, read again from where it left them: what a method made, GT and LQ of a clip."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eval.datasets import window
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import read_frames


class Outputs:
    """The pictures behind an eval.json of format 2 (see eval.results); all paths are those it names."""

    def __init__(self, evaluation: dict[str, Any]):
        self._clips = {(d["name"], c["name"]): c for d in evaluation["datasets"] for c in d["clips"]}
        self._scores = {(s["method"], s["dataset"], s["clip"]): s for s in evaluation["scores"]}

    def read(
        self, method: str, dataset: str, clip: str, start: int = 0, count: int | None = None
    ) -> Iterator[np.ndarray]:
        """Frames `start`, ... (`count` of them, or to the end) of an output as they were scored: uint8
        `H W 3` of the score's `frames`, `height` and `width`. UserError when the file is gone."""
        score = self._scores[method, dataset, clip]
        return self._window(score["output"], score, start, count)

    def gt(self, dataset: str, clip: str, start: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
        """The same of the HR clip; UserError when the set has no GT."""
        entry = self._clips[dataset, clip]
        if entry["gt"] is None:
            raise UserError(f"{dataset} has no GT of clip {clip!r}")
        return self._window(entry["gt"], entry, start, count)

    def lq(self, dataset: str, clip: str, start: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
        """The LR frames, at their own size."""
        entry = self._clips[dataset, clip]
        count = min(entry["frames"] - start, entry["frames"] if count is None else count)
        return read_frames(Path(entry["lq"]), start, count)

    def _window(self, path: str, size: dict[str, Any], start: int, count: int | None) -> Iterator[np.ndarray]:
        """Frames of a file, cut to the size that was scored."""
        count = min(size["frames"] - start, size["frames"] if count is None else count)
        for frame in read_frames(Path(path), start, count):
            yield window(frame, size["height"], size["width"], size["align"])
