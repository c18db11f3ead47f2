"""The page's numbers: tables with their protocol, a verdict, and charts of clips, frames and cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.published import published_table
from eval.results import Row, arrow, protocol_lines, table
from eval.training_log import StageLog
from flashvsr.base import charts
from flashvsr.base.page import Page

_EARLY = "Best marked, second underlined; small: the interval of the mean over clips."


def tables(page: Page, evaluation: dict[str, Any], dataset: dict[str, Any]) -> None:
    """The means of one set, and how they came about."""
    page.heading(dataset["name"])
    _table(page, *table(evaluation, dataset["name"]), "method", _untrained(evaluation))
    page.protocol([_EARLY, *protocol_lines(_only(evaluation, dataset))])


def costs(page: Page, evaluation: dict[str, Any], dataset: dict[str, Any]) -> None:
    """Every metric of a set over seconds per frame; nothing where no method was timed."""
    rows = [row for row in evaluation["means"] if row["dataset"] == dataset["name"]]
    untimed = [row["method"] for row in rows if row["seconds_per_frame"] is None]
    if len(untimed) == len(rows):
        return
    drawn = []
    for metric in evaluation["metrics"]:
        spots = [_spot(row, metric["key"]) for row in rows]
        if any(spots):
            title = metric["title"] + arrow(metric["higher"])
            drawn.append(("", charts.scatter(spots, "seconds per frame", title)))
    if drawn:
        page.heading("Quality and speed", level=3)
        page.charts(drawn, [row["method"] for row in rows])
        if untimed:
            page.text(f"Without a time, so not drawn: {', '.join(untimed)}.")


def published(page: Page, evaluation: dict[str, Any]) -> None:
    """Tables of papers that were asked for, apart from ours."""
    if evaluation["published"]:
        page.heading("Published numbers, not of the same inputs")
    for block in evaluation["published"]:
        page.heading(block["title"], level=3)
        _table(page, *published_table(block), "method")
        page.protocol([block["warning"]])


def charts_of(page: Page, evaluation: dict[str, Any], dataset: dict[str, Any]) -> None:
    """Every clip of a set as a mark per method, and, folded, its table and its metrics over frames."""
    scores = [score for score in evaluation["scores"] if score["dataset"] == dataset["name"]]
    methods = [m["name"] for m in evaluation["methods"]]
    by_clip = {
        clip["name"]: {s["method"]: s for s in scores if s["clip"] == clip["name"]}
        for clip in dataset["clips"]
    }
    page.heading(dataset["name"], level=3)
    drawn = []
    for metric in evaluation["metrics"]:
        rows = {
            name: [own[m]["values"].get(metric["key"]) if m in own else None for m in methods]
            for name, own in by_clip.items()
        }
        if any(value is not None for row in rows.values() for value in row):
            drawn.append(("", charts.dots(rows, methods, metric["title"] + arrow(metric["higher"]))))
    page.charts(drawn, methods)
    for clip in dataset["clips"]:
        with page.fold(f"{clip['name']}, {clip['frames']} frames"):
            numbers = table(evaluation, dataset["name"], clip["name"])
            _table(page, *numbers, clip["name"], _untrained(evaluation))
            _reasons(page, by_clip[clip["name"]], evaluation["metrics"])
            lines = [
                ("", _over_frames(by_clip[clip["name"]], methods, metric)) for metric in evaluation["metrics"]
            ]
            page.charts([(title, svg) for title, svg in lines if svg], methods)


def verdict(evaluation: dict[str, Any], logs: Sequence[StageLog]) -> list[str]:
    """In words, how the methods stand against bicubic in each metric that has a better direction; nothing
    when bicubic was not evaluated."""
    kinds = {method["name"]: method["kind"] for method in evaluation["methods"]}
    metrics = [m for m in evaluation["metrics"] if m["higher"] is not None]
    several = len(evaluation["datasets"]) > 1
    wins: list[tuple[str, list[str], list[str]]] = []  # method and set; metrics won, metrics lost
    for dataset in evaluation["datasets"]:
        rows = {r["method"]: r for r in evaluation["means"] if r["dataset"] == dataset["name"]}
        bicubic = next((rows[name] for name, kind in kinds.items() if kind == "bicubic"), None)
        if bicubic is None:
            return []
        for name, row in rows.items():
            if kinds[name] == "bicubic":
                continue
            judged = [(m["title"], _better(m, row, bicubic)) for m in metrics]
            where = f" on {dataset['name']}" if several else ""
            won = [title for title, better in judged if better]
            wins.append(
                (f"{name} beats bicubic{where} in", won, [t for t, better in judged if better is False])
            )
    titles = dict.fromkeys(title for _, won, lost in wins for title in (*won, *lost))
    titles = [m["title"] for m in metrics if m["title"] in titles]
    never = [title for title in titles if not any(title in won for _, won, _ in wins)]
    sentences = [_lost(_join(never, "or"), logs)] if never else []
    for start, won, lost in wins:
        if won:
            rest = f", not in {_join(lost, 'or')}" if lost else ""
            sentences.append(f"{start} {_join(won)}{rest}.")
    return sentences


def _lost(metrics: str, logs: Sequence[StageLog]) -> str:
    minutes = sum(log.minutes or 0 for log in logs)
    if not minutes:
        return f"None of these methods beats bicubic in {metrics}."
    # A run that made its own VAE from nothing had no weights to start from.
    scratch = " from scratch" if any(log.title == "VAE" and log.init is None for log in logs) else ""
    amount = f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{60 * minutes:.0f} seconds"
    claim = f"{amount} of training{scratch} do not beat bicubic in {metrics}"
    return f"{claim}: this page proves the road, not quality."


def _better(metric: dict[str, Any], row: dict[str, Any], other: dict[str, Any]) -> bool | None:
    """Whether a method's mean beats another's; None where one of them has none."""
    a, b = (r["values"].get(metric["key"], {}).get("mean") for r in (row, other))
    if a is None or b is None:
        return None
    return a > b if metric["higher"] else a < b


def _join(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _only(evaluation: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
    """An evaluation without the other sets, and without metrics that this set cannot have."""
    own = {
        part: [row for row in evaluation[part] if row["dataset"] == dataset["name"]]
        for part in ("means", "scores")
    }
    there = {key for row in own["means"] for key in row["values"]}
    metrics = [m for m in evaluation["metrics"] if m["key"] in there]
    return {**evaluation, **own, "datasets": [dataset], "metrics": metrics}


def _untrained(evaluation: dict[str, Any]) -> dict[str, str]:
    """What must stand beside the name of a method that says its weights were never trained."""
    said = {m["name"]: str(m["in_use"].get("weights", "")) for m in evaluation["methods"]}
    return {name: "random weights" for name, weights in said.items() if weights.startswith("random")}


def _table(
    page: Page,
    heads: Sequence[str],
    rows: Sequence[Row],
    title: str,
    notes: Mapping[str, str] | None = None,
) -> None:
    """What eval.results prints elsewhere, the interval "(low to high)" of a mean beneath it, and a method's
    note beneath its name."""
    shown, ranks = [], {}
    for name, cells in rows:
        row: dict[str, Any] = {"method": name, "note": (notes or {}).get(name)}
        for i, (text, rank) in enumerate(cells):
            row[f"{i}"], _, span = text.partition(" (")
            row[f"{i} span"] = span.removesuffix(")")
            ranks.setdefault(f"{i}", []).append(rank)
        shown.append(row)
    columns = [("method", title, None), *((f"{i}", head, None) for i, head in enumerate(heads))]
    under = {"method": "note", **{f"{i}": f"{i} span" for i in range(len(heads))}}
    page.table(shown, columns, ranks=ranks, under=under)


def _reasons(page: Page, scores: dict[str, dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> None:
    """Why a clip has no value of a metric."""
    titles = {m["key"]: m["title"] for m in metrics}
    lines = [f"{titles[key]} of {m}: {why}" for m, s in scores.items() for key, why in s["reasons"].items()]
    if lines:
        page.protocol(lines)


def _spot(row: dict[str, Any], key: str) -> charts.Spot | None:
    value = row["values"].get(key)
    if row["seconds_per_frame"] is None or value is None or value["mean"] is None:
        return None
    return charts.Spot(row["method"], row["seconds_per_frame"], value["mean"], value["low"], value["high"])


def _over_frames(scores: dict[str, dict[str, Any]], methods: Sequence[str], metric: dict[str, Any]) -> str:
    """A metric over the frames of a clip as SVG; empty where no method has values of frames."""
    series = {}
    for method in methods:
        values = scores[method]["per_frame"].get(metric["key"]) if method in scores else None
        numbers = [math.nan if value is None else value for value in values or []]
        series[method] = (list(range(len(numbers))), numbers)
    if all(len(numbers) < 2 for _, numbers in series.values()):
        return ""
    return charts.lines(series, "frame", metric["title"] + arrow(metric["higher"]), whole=True)
