"""An evaluation of format 2 with numbers chosen by hand, and the frames it names."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.published import published
from eval.results import interval
from flashvsr.base.measure import machine

METHODS = ["bicubic", "ours", "theirs <b>"]
METRICS = [
    {"key": "psnr", "title": "PSNR", "higher": True, "digits": 2, "description": "dB", "needs_gt": True},
    {"key": "tlp", "title": "tLP", "higher": False, "digits": 4, "description": "change", "needs_gt": True},
    {"key": "niqe", "title": "NIQE", "higher": False, "digits": 3, "description": "own", "needs_gt": False},
    {"key": "edge", "title": "edge", "higher": None, "digits": 3, "description": "ratio", "needs_gt": True},
]
CLIPS = {"lab": {"alpha": 8, "beta": 5}, "field": {"gamma": 8}}
HEIGHT, WIDTH, SCALE = 64, 96, 4
# dataset, clip -> metric -> a value per method; None: not defined
NUMBERS: dict[tuple[str, str], dict[str, list[float | None]]] = {
    ("lab", "alpha"): {
        "psnr": [25.0, 24.0, 24.5],
        "tlp": [0.5, 0.25, 0.25],
        "niqe": [7.0, 5.0, 6.0],
        "edge": [1.0, 1.2, None],
    },
    ("lab", "beta"): {
        "psnr": [27.0, 26.0, 30.0],
        "tlp": [0.3, 0.35, 0.35],
        "niqe": [8.0, 4.0, 5.0],
        "edge": [1.0, 1.1, 1.3],
    },
    ("field", "gamma"): {"niqe": [9.0, 6.5, 7.5]},
}
SECONDS = {"bicubic": 0.002, "ours": 0.4, "theirs <b>": None}


def picture(seed: int, frame: int) -> np.ndarray:
    """uint8 `64 96 3`: flat, with a busy place of 16x16 at row 32 and column 48 that changes every frame."""
    pixels = np.full((HEIGHT, WIDTH, 3), 60 + 10 * seed, np.uint8)
    pixels[32:48, 48:64] = np.random.default_rng([seed, frame]).integers(0, 256, (16, 16, 3))
    return pixels


def write_clip(folder: Path, seed: int, frames: int, every: int = 1) -> str:
    folder.mkdir(parents=True)
    for i in range(frames):
        Image.fromarray(picture(seed, i)[::every, ::every]).save(folder / f"frame-{i:06d}.png")
    return str(folder)


def make_up(folder: Path) -> dict[str, Any]:
    """The value of an eval.json whose frames lie under `folder`."""
    datasets, scores = [], []
    for dataset, clips in CLIPS.items():
        listed = []
        for clip, frames in clips.items():
            place = folder / dataset
            listed.append(
                {"name": clip, "frames": frames, "height": HEIGHT, "width": WIDTH, "align": "refuse",
                 "lq": write_clip(place / "LQ" / clip, 0, frames, SCALE),
                 "gt": write_clip(place / "GT" / clip, 0, frames) if dataset == "lab" else None,
                 "note": None}
            )  # fmt: skip
            for i, method in enumerate(METHODS):
                scores.append(_score(place, i, method, dataset, clip, frames))
        datasets.append(
            {"name": dataset, "folder": dataset, "layout": "GT and LQ", "scale": SCALE,
             "lq_preset": "realbasicvsr" if dataset == "lab" else None, "lq_seed": 3,
             "has_gt": dataset == "lab", "clips": listed}
        )  # fmt: skip
    protocol = {
        "frames": None, "border_crop": 0, "align": "refuse", "pixels": "8-bit RGB", "time": "wall time",
        "intervals": "95 % bootstrap intervals", "metrics": {m["key"]: m["description"] for m in METRICS},
        "device": "cpu", "dtype": "float32", "workers": 1,
    }  # fmt: skip
    return {
        "format": 2,
        "run": "made up",
        "date": "2026-01-02T03:04:05+00:00",
        "machine": machine(),
        "protocol": protocol,
        "datasets": datasets,
        "methods": [
            {"name": m, "spec": m, "kind": "bicubic" if m == "bicubic" else "model", "settings": {},
             "in_use": {"bicubic": {}, "ours": {"decoder": "vae"}}.get(m, {"weights": "random (seed 0)"}),
             "fingerprint": None}
            for m in METHODS
        ],
        "metrics": METRICS,
        "means": [_mean(scores, m, d) for d in CLIPS for m in METHODS],
        "scores": scores,
        "published": published("REDS4"),
    }  # fmt: skip


def _score(place: Path, i: int, method: str, dataset: str, clip: str, frames: int) -> dict[str, Any]:
    values = {key: row[i] for key, row in NUMBERS[dataset, clip].items()}
    per_frame = {"psnr": [values["psnr"] + k for k in range(frames)]} if "psnr" in values else {}
    if "tlp" in values:
        per_frame["tlp"] = [None, *(values["tlp"] * k for k in range(1, frames))]
    return {
        "method": method, "dataset": dataset, "clip": clip, "frames": frames, "height": HEIGHT,
        "width": WIDTH, "align": "refuse", "note": None, "values": values, "per_frame": per_frame,
        "reasons": {key: "the clip stands still" for key, value in values.items() if value is None},
        "seconds_per_frame": SECONDS[method], "first_output_seconds": SECONDS[method], "cached": False,
        "timed_on": "here", "output": write_clip(place / f"out{i}" / clip, i + 1, frames),
    }  # fmt: skip


def _mean(scores: list[dict[str, Any]], method: str, dataset: str) -> dict[str, Any]:
    own = [s for s in scores if s["method"] == method and s["dataset"] == dataset]
    values = {}
    for key in own[0]["values"]:
        known = [s["values"][key] for s in own if s["values"][key] is not None]
        values[key] = {**interval(known), "clips": len(known)}
    return {
        "method": method, "dataset": dataset, "clips": len(own), "frames": sum(s["frames"] for s in own),
        "values": values, "seconds_per_frame": SECONDS[method], "first_output_seconds": SECONDS[method],
        "cached": False,
    }  # fmt: skip
