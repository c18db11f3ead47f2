"""The numbers of an evaluation: eval.json, results.csv and results.md.

eval.json, format 2 (infinite numbers are the text "inf"; `read_evaluation` gives them back as numbers):

    format      2
    run, date   name of the run folder; ISO date with zone
    machine     of flashvsr.base.measure.machine
    protocol    {frames: int or null, border_crop: int, align: str, pixels: str, time: str, intervals: str,
                 metrics: {key: sentence}, device, dtype, workers}; `protocol_lines` says it in words
    datasets    [{name, folder, layout, scale, lq_preset, lq_seed, has_gt, clips: [clip]}]
                clip: {name, frames, height, width, align, lq, gt, note}: as evaluated (of GT; of the output
                where there is none); lq, gt: paths, gt null without GT; note: what was cut, or null
    methods     [{name, spec, kind, settings, in_use, fingerprint}]
    metrics     [{key, title, higher, digits, description, needs_gt}], in the order of columns; higher is
                true, false, or null where neither direction is better
    means       [{method, dataset, clips, frames, values: {key: {mean, low, high}}, seconds_per_frame,
                  first_output_seconds}]; low and high are null for one clip; a metric that a set cannot have
                  (no GT) is absent from values
    scores      [{method, dataset, clip, frames, height, width, align, note, values: {key: number},
                  per_frame: {key: [number]}, seconds_per_frame, first_output_seconds, cached, timed_on,
                  output}]; per_frame may lack a key; times are null for finished outputs; `cached`: made by
                  an earlier command, on the machine `timed_on`; `output`: path of the frames

The frames themselves: `eval.outputs.Outputs(evaluation).read(method, dataset, clip)`, `.gt`, `.lq`.
The page: `eval.report.write_report(run_folder, evaluation) -> path`, called with the value of eval.json.
"""

import csv
import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.datasets import TestSet
from eval.methods import Method
from eval.metrics import Lpips
from eval.runner import Outcome, Score
from flashvsr.base.files import atomic, write_json
from flashvsr.base.measure import machine

HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False, "seconds_per_frame": False}


def collect(
    run: str,
    test_set: TestSet,
    methods: Sequence[Method],
    outcome: Outcome,
    lpips: Lpips,
    device: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All there is to know about an evaluation, as the value of eval.json."""
    settings = test_set.prepared.get("settings", {})  # of `eval prepare`
    protocol = {
        "data": str(test_set.folder),
        "clips": [
            {"name": p.name, "frames": p.frames, "height": p.height, "width": p.width} for p in test_set.pairs
        ],
        "scale": test_set.scale,
        "colour_space": "RGB",
        "border_crop": 0,
        "psnr": "dB, mean over frames",
        "ssim": "Gaussian window 11, sigma 1.5, mean over channels and frames",
        "lpips_name": lpips.name,
        "lpips": lpips.description,
        "lq_preset": settings.get("preset"),
        "lq_seed": settings.get("seed"),
        "time": "wall time of push and flush over frames, loading excluded, no warm-up",
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return {
        "format": 1,
        "run": run,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(),
        "protocol": protocol,
        "methods": [
            {
                "name": m.name,
                "spec": m.spec,
                "kind": m.kind,
                "settings": m.settings,
                "in_use": outcome.in_use.get(m.name, {}),
            }
            for m in methods
        ],
        "means": [asdict(mean_score(m.name, outcome.scores)) for m in methods],
        "scores": [asdict(score) for score in outcome.scores],
    }


def mean_score(method: str, scores: Sequence[Score]) -> Score:
    """Mean over clips, each clip counting once; seconds per frame over all frames."""
    own = [score for score in scores if score.method == method]
    frames = sum(s.frames for s in own)
    timed = all(s.seconds_per_frame is not None for s in own)
    seconds = sum(s.seconds_per_frame * s.frames for s in own) / frames if timed else None
    means = {name: float(np.mean([getattr(s, name) for s in own])) for name in ("psnr", "ssim", "lpips")}
    return Score(method, "mean", frames, **means, seconds_per_frame=seconds)


def best(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """The best value of a column, or None when fewer than two rows have one."""
    values = [row[key] for row in rows if row[key] is not None]
    return None if len(values) < 2 else (max if HIGHER_IS_BETTER[key] else min)(values)


def show(key: str, value: float | None) -> str:
    """A number as tables print it; PSNR of equal clips is infinite."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if key == "psnr" else f"{value:.4f}"


def method_line(method: dict[str, Any]) -> str:
    """What a method was and what it says was in use, in one line."""
    words = [f"`{method['spec']}`", *(f"{k.replace('_', ' ')} {v}" for k, v in method["in_use"].items())]
    return f"{method['name']}: {'; '.join(words)}"


def protocol_line(protocol: dict[str, Any]) -> str:
    """The protocol in one sentence, printed with every table."""
    clips = protocol["clips"]
    sizes = sorted({f"{c['width']}x{c['height']}" for c in clips})
    counts = sorted({c["frames"] for c in clips})
    frames = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    made = "LQ as found (no prepare.json)"
    if protocol["lq_preset"] is not None:
        made = f"LQ by preset {protocol['lq_preset']}, seed {protocol['lq_seed']}"
    names = ", ".join(c["name"] for c in clips)
    return (
        f"{len(clips)} clips ({names}), {frames} frames each, {', '.join(sizes)}, "
        f"x{protocol['scale']}; {made}; {protocol['colour_space']}, border crop {protocol['border_crop']}; "
        f"PSNR {protocol['psnr']}; SSIM {protocol['ssim']}; {protocol['lpips']}; "
        f"on {protocol['device']} in {protocol['dtype']}, {protocol['time']}."
    )


def write_results(out: Path, evaluation: dict[str, Any]) -> None:
    """Write eval.json, results.csv and results.md into `out`; an infinite value is "inf" in JSON."""
    write_json(out / "eval.json", _finite(evaluation))
    lpips_name = evaluation["protocol"]["lpips_name"]
    columns = ["method", "clip", "frames", "psnr", "ssim", "lpips", "seconds_per_frame"]
    rows = [*evaluation["means"], *evaluation["scores"]]
    with atomic(out / "results.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([lpips_name if c == "lpips" else c for c in columns])
        writer.writerows([row[c] for c in columns] for row in rows)
    with atomic(out / "results.md") as part:
        part.write_text(_markdown(evaluation, lpips_name), encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(evaluation: dict[str, Any], lpips_name: str) -> str:
    head = f"PSNR ↑ | SSIM ↑ | {lpips_name} ↓ | s/frame ↓ |"
    lines = [f"# {evaluation['run']}", "", protocol_line(evaluation["protocol"]), ""]
    lines += [*(f"- {method_line(method)}" for method in evaluation["methods"]), ""]
    for title, rows in (("", evaluation["means"]), (" clip |", evaluation["scores"])):
        lines += [f"| method |{title} {head}", "|---|" + "---|" * (5 if title else 4)]
        for row in rows:
            peers = [other for other in rows if other["clip"] == row["clip"]]
            cells = [row["method"], row["clip"]] if title else [row["method"]]
            for key in HIGHER_IS_BETTER:
                text = show(key, row[key])
                cells.append(f"**{text}**" if row[key] is not None and row[key] == best(peers, key) else text)
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
