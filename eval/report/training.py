"""The page's training section: what became of the held-out loss and quality of each stage, and its curves."""

from collections.abc import Sequence
from typing import Any

from eval.results import show
from eval.training_log import StageLog
from flashvsr.base.page import Page


def training(page: Page, logs: Sequence[StageLog], missing: Sequence[str]) -> None:
    """What `eval.training_log.read_run` found, and what it missed."""
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
    digits = 2 if metric == "psnr" else 4
    return "{} → {} ({})".format(*(show(value, digits) for value in values))
