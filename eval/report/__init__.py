"""The report: one self-contained page with numbers, charts, pictures and the training behind them."""

from datetime import datetime
from pathlib import Path
from typing import Any

from eval.report.numbers import charts_of, costs, published, tables, verdict
from eval.report.pictures import Budget, side_by_side
from eval.report.training import training
from eval.results import method_line
from eval.training_log import read_run
from flashvsr.base.page import Page


def write_report(run: Path, evaluation: dict[str, Any], quiet: bool = False) -> Path:
    """Write `run`/report.html from the value of an eval.json (eval.results), the frames it names and the
    run's training logs. The same inputs give the same bytes.

    What is missing, or left out to keep the page small, is named on it. Returns the page's path.
    """
    logs, missing = read_run(run)
    page = Page(f"Evaluation of {evaluation['run']}")
    page.text(_where(evaluation))
    for sentence in verdict(evaluation, logs):
        page.text(sentence)
    for dataset in evaluation["datasets"]:
        tables(page, evaluation, dataset)
        costs(page, evaluation, dataset)
    page.heading("Methods")
    for method in evaluation["methods"]:
        page.text(method_line(method))
    published(page, evaluation)
    side_by_side(page, evaluation, Budget(), quiet)
    page.heading("Clip by clip")
    for dataset in evaluation["datasets"]:
        charts_of(page, evaluation, dataset)
    training(page, logs, missing)
    page.save(run / "report.html")
    return run / "report.html"


def _where(evaluation: dict[str, Any]) -> str:
    machine = evaluation["machine"]
    gpu = machine["gpu"] or "no GPU"
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    hardware = f"{machine['cpu']}, {machine['cores']} cores ({threads}), {gpu}"
    date = datetime.fromisoformat(evaluation["date"]).strftime("%Y-%m-%d %H:%M %Z")
    return f"{date} · {hardware} · torch {machine['torch']}"
