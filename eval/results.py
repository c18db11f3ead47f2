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
    means       [{method, dataset, clips, frames, values: {key: {mean, low, high, clips}}, seconds_per_frame,
                  first_output_seconds, cached}]; low and high are null for one clip; a metric that a set
                  cannot have (no GT) is absent from values
    published   [block of eval.published]: numbers of papers, on other inputs
    scores      [{method, dataset, clip, frames, height, width, align, note, values: {key: number or null},
                  per_frame: {key: [number or null]}, reasons: {key: sentence}, seconds_per_frame,
                  first_output_seconds, cached, timed_on, output}]; a value is null where the metric is not
                  defined (`reasons` says why); per_frame has null for frames without a value; times are null
                  for finished outputs; `cached`: made by an earlier command, on the machine `timed_on`;
                  `output`: path of the frames

The frames themselves: `eval.outputs.Outputs(evaluation).read(method, dataset, clip)`, `.gt`, `.lq`.
The page: `eval.report.write_report(run_folder, evaluation) -> path`, called with the value of eval.json.
"""

import csv
import datetime
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from eval.datasets import TestSet
from eval.methods import Method
from eval.metrics.scoring import Metric
from eval.published import published_table
from eval.runner import Outcome, Score
from eval.units import Job
from flashvsr.base.cli import UserError
from flashvsr.base.files import atomic, read_json, write_json
from flashvsr.base.measure import machine

Row = tuple[str, list[tuple[str, int | None]]]  # a method's name; its cells: text, rank 1, 2 or None
RESAMPLES, BOOTSTRAP_SEED = 2000, 0
# What is measured besides quality: title, decimals; lower is better.
COSTS = {"seconds_per_frame": ("s/frame", 4), "first_output_seconds": ("first output, s", 3)}
ALIGN_WORDS = {
    "refuse": "counts and sizes must agree",
    "first": "where frame counts differ, the first frames both have",
    "top-left": "where counts or sizes differ, the first frames and the top left part both have",
    "center": "where counts or sizes differ, the first frames and the middle both have",
}


def collect(
    run: str,
    test_sets: Sequence[TestSet],
    methods: Sequence[Method],
    metrics: Sequence[Metric],
    outcome: Outcome,
    job: Job,
    *,
    frames: int | None = None,
    devices: Sequence[str] = ("cpu",),
    published: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """All there is to know about an evaluation, as the value of eval.json."""
    protocol = {
        "frames": frames,
        "border_crop": job.choice.crop,
        "align": job.align,
        "pixels": "8-bit RGB from lossless frames; grey repeated, alpha dropped, of 16 bits the upper 8",
        "time": "wall time of push and flush over frames, loading excluded, no warm-up; "
        "`python -m eval.benchmark` measures speed",
        "intervals": f"95 % bootstrap intervals of the mean over clips, {RESAMPLES} resamples, "
        f"seed {BOOTSTRAP_SEED}",
        "metrics": {m.key: m.description for m in metrics},
        "device": ", ".join(dict.fromkeys(devices)),
        "dtype": str(job.dtype).removeprefix("torch."),
        "workers": len(devices),
    }
    return {
        "format": 2,
        "run": run,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(),
        "protocol": protocol,
        "datasets": [_dataset(test_set) for test_set in test_sets],
        "methods": [
            {
                "name": m.name,
                "spec": m.spec,
                "kind": m.kind,
                "settings": m.settings,
                "in_use": outcome.in_use.get(m.name, {}),
                "fingerprint": outcome.fingerprints.get(m.name),
            }
            for m in methods
        ],
        "metrics": [
            {
                "key": m.key,
                "title": m.title,
                "higher": m.higher,
                "digits": m.digits,
                "description": m.description,
                "needs_gt": m.needs_gt,
            }
            for m in metrics
        ],
        "published": list(published),
        "means": [mean_of(outcome.scores, m.name, s.name) for s in test_sets for m in methods],
        "scores": [asdict(score) for score in outcome.scores],
    }


def _dataset(test_set: TestSet) -> dict[str, Any]:
    settings = test_set.prepared.get("settings", {})  # of `eval prepare`
    return {
        "name": test_set.name,
        "folder": str(test_set.folder),
        "layout": test_set.layout,
        "scale": test_set.scale,
        "lq_preset": settings.get("preset"),
        "lq_seed": settings.get("seed"),
        "has_gt": test_set.has_gt,
        "clips": [
            {
                "name": clip.name,
                "frames": clip.frames,
                "height": clip.height,
                "width": clip.width,
                "align": clip.align,
                "lq": str(clip.lq),
                "gt": None if clip.gt is None else str(clip.gt),
                "note": clip.note or None,
            }
            for clip in test_set.clips
        ],
    }


def mean_of(scores: Sequence[Score], method: str, dataset: str) -> dict[str, Any]:
    """Means over the clips of a set, each clip counting once; times over all frames."""
    own = [score for score in scores if score.method == method and score.dataset == dataset]
    keys = dict.fromkeys(key for score in own for key in score.values)
    values = {}
    for key in keys:
        defined = [v for score in own if (v := score.values.get(key)) is not None]
        values[key] = {**interval(defined), "clips": len(defined)}
    frames = sum(score.frames for score in own)
    timed = all(score.seconds_per_frame is not None for score in own)
    return {
        "method": method,
        "dataset": dataset,
        "clips": len(own),
        "frames": frames,
        "values": values,
        "seconds_per_frame": sum(s.seconds_per_frame * s.frames for s in own) / frames if timed else None,
        "first_output_seconds": float(np.mean([s.first_output_seconds for s in own])) if timed else None,
        "cached": any(score.cached for score in own),
    }


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean of clip values and its 95 % percentile bootstrap interval (Efron); None for fewer than two
    clips, and where a value is infinite."""
    if not values:
        return {"mean": None, "low": None, "high": None}
    mean = float(np.mean(values))
    if len(values) < 2 or not math.isfinite(mean):
        return {"mean": mean, "low": None, "high": None}
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values)[draws].mean(axis=1), [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high)}


def ranks(values: Sequence[float | None], higher: bool | None) -> list[int | None]:
    """1 for the best, 2 for the second best, else None; equal values share a rank. All None where there are
    fewer than two values or neither direction is better."""
    there = sorted({v for v in values if v is not None}, reverse=bool(higher))
    if higher is None or sum(v is not None for v in values) < 2:
        return [None] * len(values)
    places = {v: i + 1 for i, v in enumerate(there[:2])}
    return [None if v is None else places.get(v) for v in values]


def show(value: float | None, digits: int) -> str:
    """A number as tables print it; PSNR of equal clips is infinite."""
    if value is None:
        return "–"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def arrow(higher: bool | None) -> str:
    return "" if higher is None else " ↑" if higher else " ↓"


def method_line(method: dict[str, Any]) -> str:
    """What a method was and what it says was in use, in one line."""
    words = [f"`{method['spec']}`", *(f"{k.replace('_', ' ')} {v}" for k, v in method["in_use"].items())]
    return f"{method['name']}: {'; '.join(words)}"


def dataset_line(dataset: dict[str, Any]) -> str:
    """What a set was, in one sentence."""
    clips = dataset["clips"]
    sizes = sorted({f"{c['width']}x{c['height']}" for c in clips})
    counts = sorted({c["frames"] for c in clips})
    frames = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    made = "LQ as found (no prepare.json)"
    if dataset["lq_preset"] is not None:
        made = f"LQ by preset {dataset['lq_preset']}, seed {dataset['lq_seed']}"
    names = ", ".join(c["name"] for c in clips[:4]) + (", ..." if len(clips) > 4 else "")
    truth = "" if dataset["has_gt"] else "; no GT, so no full-reference metric"
    cut = [f"{c['name']}: {c['note']}" for c in clips if c["note"]]
    cuts = f"; cut: {'; '.join(cut)}" if cut else ""
    return (
        f"{dataset['name']}: {len(clips)} clips ({names}), {frames} frames each, {', '.join(sizes)}, "
        f"x{dataset['scale']}; {dataset['layout']}; {made}{truth}{cuts}."
    )


def metric_line(metric: dict[str, Any]) -> str:
    """What a metric is; most descriptions begin with its name."""
    title, text = metric["title"], metric["description"]
    return f"{text}." if text.startswith(title) else f"{title}: {text}."


def protocol_lines(evaluation: dict[str, Any]) -> list[str]:
    """The protocol in sentences, printed with every table."""
    p = evaluation["protocol"]
    which = "all frames" if p["frames"] is None else f"the first {p['frames']} frames of each clip"
    lines = [dataset_line(dataset) for dataset in evaluation["datasets"]]
    lines += [
        f"Scored: {which}, border crop {p['border_crop']}; {ALIGN_WORDS[p['align']]}; {p['pixels']}.",
        *(metric_line(m) for m in evaluation["metrics"]),
        f"Means over clips with {p['intervals']}.",
        f"Time on {p['device']} in {p['dtype']}, units at a time: {p['workers']}; {p['time']}.",
    ]
    if any(row["cached"] for row in evaluation["means"]):
        lines.append("Times marked * were taken when the frames were made, by an earlier command.")
    notes = {
        f"{s['method']}, {s['clip']}: {note}."
        for s in evaluation["scores"]
        for note in (s["note"], *s["reasons"].values())
        if note
    }
    return [*lines, *sorted(notes)]


def table(evaluation: dict[str, Any], dataset: str, clip: str | None = None) -> tuple[list[str], list[Row]]:
    """A table of one set (or one of its clips): headings, and a row per method. Metrics that the set cannot
    have are left out."""
    kind = "means" if clip is None else "scores"
    rows = [r for r in evaluation[kind] if r["dataset"] == dataset and (clip is None or r["clip"] == clip)]
    metrics = [m for m in evaluation["metrics"] if any(m["key"] in row["values"] for row in rows)]
    heads = [m["title"] + arrow(m["higher"]) for m in metrics]
    columns = [_column(rows, m) for m in metrics]
    for key, (title, digits) in COSTS.items():
        values = [row[key] for row in rows]
        if any(value is not None for value in values):
            heads.append(f"{title} ↓")
            marks = ["*" if row["cached"] and row[key] is not None else "" for row in rows]
            texts = [show(value, digits) + mark for value, mark in zip(values, marks, strict=True)]
            columns.append(list(zip(texts, ranks(values, higher=False), strict=True)))
    cells = list(zip(*columns, strict=True)) if columns else [()] * len(rows)
    return heads, [(row["method"], list(own)) for row, own in zip(rows, cells, strict=True)]


def _column(rows: Sequence[dict[str, Any]], metric: dict[str, Any]) -> list[tuple[str, int | None]]:
    key, digits = metric["key"], metric["digits"]
    values = [row["values"].get(key) for row in rows]
    if rows and "clip" not in rows[0]:
        numbers = [value and value["mean"] for value in values]
        spans = [value and value["low"] is not None for value in values]
        texts = [
            show(value["mean"], digits)
            + (f" ({show(value['low'], digits)} to {show(value['high'], digits)})" if span else "")
            if value
            else "–"
            for value, span in zip(values, spans, strict=True)
        ]
    else:
        numbers, texts = values, [show(value, digits) for value in values]
    return list(zip(texts, ranks(numbers, metric["higher"]), strict=True))


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """The value of an eval.json of format 2; UserError for another format."""
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != 2:
        raise UserError(f"{path} is no eval.json of format 2; run `python -m eval` again")
    return _mapped(
        value, lambda x: {"inf": math.inf, "-inf": -math.inf}.get(x, x) if isinstance(x, str) else x
    )


def write_results(out: Path, evaluation: dict[str, Any]) -> None:
    """Write eval.json, results.csv and results.md into `out`; an infinite value is "inf" in JSON."""
    finite = _mapped(evaluation, lambda x: str(x) if isinstance(x, float) and not math.isfinite(x) else x)
    write_json(out / "eval.json", finite)
    with atomic(out / "results.csv") as part:
        part.write_text(_csv(evaluation), encoding="utf-8")
    with atomic(out / "results.md") as part:
        part.write_text(_markdown(evaluation), encoding="utf-8")


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value)


def _csv(evaluation: dict[str, Any]) -> str:
    """One row per set and method (clip "mean"), then one per clip; full precision, empty where there is no
    value."""
    keys = [m["key"] for m in evaluation["metrics"]]
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    spans = [f"{key}_{end}" for key in keys for end in ("low", "high")]
    writer.writerow(["dataset", "method", "clip", "frames", *keys, *COSTS, "timed_earlier", *spans])
    for row in (*evaluation["means"], *evaluation["scores"]):
        values = row["values"]
        numbers, ends = [values.get(key) for key in keys], [None] * len(spans)
        if "clip" not in row:
            numbers = [value and value["mean"] for value in numbers]
            ends = [values[key][end] if key in values else None for key in keys for end in ("low", "high")]
        head = [row["dataset"], row["method"], row.get("clip", "mean"), row["frames"]]
        writer.writerow([*head, *numbers, *(row[cost] for cost in COSTS), row["cached"], *ends])
    return file.getvalue()


def _markdown(evaluation: dict[str, Any]) -> str:
    """Tables with the best value bold and the second underlined, the protocol under each set's."""
    lines = [f"# {evaluation['run']}", "", "Best **bold**, second <u>underlined</u>.", ""]
    protocol = [*(f"- {line}" for line in protocol_lines(evaluation)), ""]
    for dataset in evaluation["datasets"]:
        lines += [f"## {dataset['name']}", "", *markdown_table(*table(evaluation, dataset["name"])), ""]
        lines += protocol
    lines += ["## Methods", "", *(f"- {method_line(method)}" for method in evaluation["methods"]), ""]
    lines += ["## Clip by clip", ""]
    for dataset in evaluation["datasets"]:
        for clip in dataset["clips"]:
            title = f"{dataset['name']}, {clip['name']}, {clip['frames']} frames"
            heads, rows = table(evaluation, dataset["name"], clip["name"])
            lines += [*markdown_table(heads, rows, title), ""]
    for block in evaluation["published"]:
        lines += [f"## {block['title']}", "", block["warning"], ""]
        heads, rows = published_table(block)
        lines += [*markdown_table(heads, rows), ""]
    return "\n".join(lines)


def markdown_table(heads: Sequence[str], rows: Sequence[Row], title: str = "method") -> list[str]:
    """Lines of a Markdown table from headings and (name, [(text, rank)])."""
    marks = {1: "**{}**", 2: "<u>{}</u>", None: "{}"}
    lines = [f"| {' | '.join([title, *heads])} |", "|---|" + "---:|" * len(heads)]
    for name, cells in rows:
        lines.append(f"| {' | '.join([name, *(marks[rank].format(text) for text, rank in cells)])} |")
    return lines
