"""The report: one self-contained page with numbers, pictures and the training behind them."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from eval.results import HIGHER_IS_BETTER, best, method_line, protocol_line, show
from eval.runner import Panel
from eval.training_log import StageLog, read_run
from flashvsr.base.page import Page, busiest_crop

_NEAR = 4  # a crop shows this fraction of a picture's sides


def write_report(run: Path, evaluation: dict[str, Any], panels: Sequence[Panel]) -> Path:
    """Write `run`/report.html from an evaluation (the value of eval.json), its panels and the run's logs.

    What the run folder does not have is left out and named on the page. Returns the page's path.
    """
    logs, missing = read_run(run)
    page = Page(f"Evaluation of {evaluation['run']}")
    page.text(_where(evaluation))
    _results(page, evaluation, logs)
    _pictures(page, panels)
    _training(page, logs, missing)
    page.save(run / "report.html")
    return run / "report.html"


def _where(evaluation: dict[str, Any]) -> str:
    machine = evaluation["machine"]
    gpu = machine["gpu"] or "no GPU"
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    hardware = f"{machine['cpu']}, {machine['cores']} cores ({threads}), {gpu}"
    date = datetime.fromisoformat(evaluation["date"]).strftime("%Y-%m-%d %H:%M %Z")
    return f"{date} · {hardware} · torch {machine['torch']}"


def _results(page: Page, evaluation: dict[str, Any], logs: Sequence[StageLog]) -> None:
    page.heading("Methods")
    for sentence in verdict(evaluation, logs):
        page.text(sentence)
    numbers = [
        ("psnr", "PSNR ↑", ".2f"),
        ("ssim", "SSIM ↑", ".4f"),
        ("lpips", f"{evaluation['protocol']['lpips_name']} ↓", ".4f"),
        ("seconds_per_frame", "seconds per frame ↓", ".4f"),
    ]
    means = evaluation["means"]
    page.table(means, [("method", "method", None), *numbers], best=_marks(means))
    page.text(f"Protocol: {protocol_line(evaluation['protocol'])}")
    for method in evaluation["methods"]:
        page.text(method_line(method))
    page.heading("Clip by clip", level=3)
    for clip in evaluation["protocol"]["clips"]:
        rows = [row for row in evaluation["scores"] if row["clip"] == clip["name"]]
        columns = [("method", f"{clip['name']}, {clip['frames']} frames", None), *numbers]
        page.table(rows, columns, best=_marks(rows))


def _marks(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Which columns have a best value worth marking: those where at least two rows have one."""
    return {k: "max" if up else "min" for k, up in HIGHER_IS_BETTER.items() if best(rows, k) is not None}


def verdict(evaluation: dict[str, Any], logs: Sequence[StageLog]) -> list[str]:
    """In words, how the methods stand against bicubic; nothing when bicubic was not evaluated."""
    kinds = {method["name"]: method["kind"] for method in evaluation["methods"]}
    rows = {row["method"]: row for row in evaluation["means"]}
    bicubic = next((rows[name] for name, kind in kinds.items() if kind == "bicubic"), None)
    others = [row for name, row in rows.items() if kinds[name] != "bicubic"]
    if bicubic is None or not others:
        return []
    titles = {"psnr": "PSNR", "ssim": "SSIM", "lpips": evaluation["protocol"]["lpips_name"]}
    wins = {row["method"]: [t for key, t in titles.items() if _better(key, row, bicubic)] for row in others}
    never = [title for title in titles.values() if not any(title in won for won in wins.values())]
    sentences = []
    if never:
        sentences.append(_lost(_join(never, "or"), logs))
    for name, won in wins.items():
        lost = [title for title in titles.values() if title not in won]
        if won and lost:
            sentences.append(f"{name} beats bicubic in {_join(won)}, not in {_join(lost, 'or')}.")
        elif won:
            sentences.append(f"{name} beats bicubic in {_join(won)}.")
    return sentences


def _lost(metrics: str, logs: Sequence[StageLog]) -> str:
    minutes = sum(log.minutes or 0 for log in logs)
    if not minutes:
        return f"None of these methods beats bicubic in {metrics}."
    # A run that trained its own VAE had no released weights to start from.
    scratch = " from scratch" if any(log.title == "VAE" for log in logs) else ""
    amount = f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{60 * minutes:.0f} seconds"
    claim = f"{amount} of training{scratch} do not beat bicubic in {metrics}"
    return f"{claim}: this page proves the road, not quality."


def _better(key: str, row: dict[str, Any], other: dict[str, Any]) -> bool:
    return row[key] > other[key] if HIGHER_IS_BETTER[key] else row[key] < other[key]


def _join(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _pictures(page: Page, panels: Sequence[Panel]) -> None:
    page.heading("Side by side")
    if not panels:
        page.text("No pictures were kept.")
        return
    page.text(
        "The box marks the busiest place of the HR frame, enlarged below. Click a picture to enlarge it."
    )
    for panel in panels:
        page.heading(f"{panel.clip}, frame {panel.frame}", level=3)
        height, width = panel.pictures["HR"].shape[:2]
        crop = busiest_crop(panel.pictures["HR"], max(1, height // _NEAR), max(1, width // _NEAR))
        page.compare(list(panel.pictures.items()), crop=crop)


def _training(page: Page, logs: Sequence[StageLog], missing: Sequence[str]) -> None:
    page.heading("Training")
    if not logs:
        page.text("This folder holds no training record: no stage folder with a metrics.jsonl.")
        return
    page.table(
        [_held_out_row(log) for log in logs],
        [
            ("stage", "stage", None),
            ("steps", "steps", "d"),
            ("minutes", "minutes", ".1f"),
            ("start", "held-out loss at start", ".4g"),
            ("end", "at the end", ".4g"),
            ("ratio", "end / start", ".3f"),
            ("expect", "expected at most", ".3g"),
            ("met", "as expected", None),
        ],
    )
    _validation_table(page, logs)
    if missing:
        page.text(f"Not found: {'; '.join(missing)}.")
    for log in logs:
        curves = {name: points for name, points in log.curves().items() if points[0]}
        if curves:
            page.heading(log.title, level=3)
            positive = all(value > 0 for _, values in curves.values() for value in values)
            page.curves(curves, ylabel="loss", log=positive)


def _held_out_row(log: StageLog) -> dict[str, Any]:
    start, end = log.first("val/loss"), log.last("val/loss")
    ratio = end / start if start and end is not None else None
    judged = ratio is not None and log.expect is not None
    return {
        "stage": log.title,
        "steps": log.steps,
        "minutes": log.minutes,
        "start": start,
        "end": end,
        "ratio": ratio,
        "expect": log.expect,
        "met": ("yes" if ratio <= log.expect else "no") if judged else None,
    }


def _validation_table(page: Page, logs: Sequence[StageLog]) -> None:
    """Quality on the stage's own held-out clips at the start and at the end, beside bicubic's."""
    found = {key.removeprefix("val/") for log in logs for record in log.val.values() for key in record}
    metrics = [m for m in ("psnr", "ssim", "lpips", "lpips-random") if m in found]
    if not metrics:
        return
    titles = {"psnr": "PSNR", "ssim": "SSIM"}
    columns = [(m, f"{titles.get(m, m)}: start → end (bicubic)", None) for m in metrics]
    rows = [{"stage": log.title, **{m: _from_to(log, m) for m in metrics}} for log in logs]
    page.heading("Quality on each stage's held-out clips", level=3)
    page.table(rows, [("stage", "stage", None), *columns])


def _from_to(log: StageLog, metric: str) -> str | None:
    values = (log.first(f"val/{metric}"), log.last(f"val/{metric}"), log.last(f"bicubic/{metric}"))
    if values[0] is None:
        return None
    return "{} → {} ({})".format(*(show(metric.partition("-")[0], value) for value in values))
