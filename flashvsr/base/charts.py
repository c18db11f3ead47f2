"""Charts as inline SVG in the page's own colours: lines, dots in rows, scattered points. No library.

Every chart is a string for a page; series are told apart by colour and by mark, in the order given, so the
same name must stand at the same place in every chart of a group (`legend` draws their key once).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 44
_ROW = 26  # height of a row of dots
_COLOURS = 8  # of the page's style sheet: .s0 to .s7
_MARKS = (  # around 0,0: circle, square, diamond, triangle
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-5l5 5l-5 5l-5-5z",
    "M0-4.8l4.8 8.4h-9.6z",
)

Points = tuple[Sequence[float], Sequence[float]]


def colour(index: int) -> str:
    """The class that gives series `index` its colour."""
    return f"s{index % _COLOURS}"


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, both finite; `log` needs them above zero."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0 at `low` and 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int = 5) -> list[tuple[float, str]]:
        """Round values within the axis and how they are written."""
        if self.log:
            values = _log_ticks(self.low, self.high)
            return [(v, f"{v:g}") for v in values]
        step = _round_step((self.high - self.low) / about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        if digits > 5 or abs(self.high) >= 1e6:
            return [(k * step, f"{k * step:.4g}") for k in range(first, last + 1)]
        return [(k * step, f"{k * step:.{digits}f}") for k in range(first, last + 1)]


def axis_of(values: Sequence[float], log: bool = False, margin: float = 0.05) -> Axis:
    """An axis around all finite values (all above zero where `log`), with some room at both ends."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not known:
        return Axis(1.0, 10.0, True) if log else Axis(0.0, 1.0)
    low, high = min(known), max(known)
    if log:
        room = max((high / low) ** margin, 1.15)
        return Axis(low / room, high * room, True)
    room = margin * (high - low) or abs(high) * margin or 1.0
    return Axis(low - room, high + room)


def _round_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= step * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 3
    ticks = [k * 10.0**d for d in decades for k in ((1,) if wide else (1, 2, 5))]
    ticks = [t for t in ticks if low <= t <= high]
    return ticks[:: math.ceil(len(ticks) / 8)] if ticks else [low, high]


def legend(names: Sequence[str]) -> str:
    """The key of the series: colour, mark and name."""
    keys = "".join(
        f'<span class="{colour(i)}"><svg viewBox="-6 -6 12 12"><path class="mark" d="{_mark(i)}"/></svg>'
        f"{escape(name)}</span>"
        for i, name in enumerate(names)
    )
    return f'<div class="legend">{keys}</div>'


def lines(
    series: Mapping[str, Points],
    xlabel: str,
    ylabel: str,
    log: bool = False,
    whole: bool = False,
) -> str:
    """Lines {name: (xs, ys)}; a value that is not finite (or, with `log`, not above zero) leaves a gap.

    whole: x counts things, so only whole numbers are ticks.
    """
    across = [x for xs, _ in series.values() for x in xs]
    x_axis = axis_of(across, margin=0.02)
    y_axis = axis_of([y for _, ys in series.values() for y in ys], log)
    parts = [_frame(x_axis, y_axis, xlabel, ylabel, whole)]
    for i, (name, (xs, ys)) in enumerate(series.items()):
        drawn = []
        for run in _runs(xs, ys, log):
            places = [(_x(x_axis.place(x)), _y(y_axis.place(y))) for x, y in run]
            if len(places) == 1:
                drawn.append(f'<path class="mark" d="{_mark(i)}" transform="translate({places[0][0]} '
                             f'{places[0][1]})"/>')  # fmt: skip
            else:
                drawn.append(f'<polyline points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
        parts.append(f'<g class="{colour(i)}"><title>{escape(name)}</title>{"".join(drawn)}</g>')
    return _svg("".join(parts), WIDTH, HEIGHT, ylabel)


def dots(
    rows: Mapping[str, Sequence[float | None]], names: Sequence[str], xlabel: str, log: bool = False
) -> str:
    """A row for each thing of `rows`, in it one mark for each of `names` (None: it has none there).

    A value that is not finite stands at the edge it lies beyond; `log` takes values above zero only.
    """
    values = [v for row in rows.values() for v in row if v is not None]
    axis = axis_of(values, log)
    height = _TOP + _ROW * len(rows) + _BOTTOM
    left = min(170, max(_LEFT, 12 + 7 * max((len(label) for label in rows), default=0)))
    parts, foot = [], height - _BOTTOM
    for value, text in axis.ticks():
        x = _x(axis.place(value), left)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{foot}"/>')
        parts.append(f'<text x="{x}" y="{foot + 16}" text-anchor="middle">{text}</text>')
    for k, (label, row) in enumerate(rows.items()):
        y = _TOP + _ROW * (k + 0.5)
        shown = label if 7 * len(label) <= left - 12 + 7 else label[: (left - 12) // 7 - 1] + "…"
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end"><title>{escape(label)}</title>'
                     f"{escape(shown)}</text>")  # fmt: skip
        for i, value in enumerate(row):
            if value is None or math.isnan(value):
                continue
            x = _x(axis.place(min(max(value, axis.low), axis.high)), left)
            parts.append(f'<path class="mark {colour(i)}" d="{_mark(i)}" transform="translate({x} {y})">'
                         f"<title>{escape(names[i])}: {value:.6g}</title></path>")  # fmt: skip
    parts.append(f'<text x="{(left + WIDTH - _RIGHT) / 2}" y="{height - 6}" text-anchor="middle" '
                 f'class="label">{escape(xlabel)}</text>')  # fmt: skip
    return _svg("".join(parts), WIDTH, height, xlabel)


@dataclass(frozen=True)
class Spot:
    """A point of a scatter; low and high: ends of its interval in y, or None."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def scatter(spots: Sequence[Spot | None], xlabel: str, ylabel: str) -> str:
    """Points with their names and intervals over a logarithmic x; None keeps its place in the colours."""
    there = [(i, s) for i, s in enumerate(spots) if s is not None and math.isfinite(s.y)]
    x_axis = axis_of([s.x for _, s in there], log=True, margin=0.15)
    ends = [v for _, s in there for v in (s.y, s.low, s.high) if v is not None]
    y_axis = axis_of(ends, margin=0.12)
    parts = [_frame(x_axis, y_axis, xlabel, ylabel)]
    taken: list[tuple[float, float, float]] = []
    for i, s in there:
        x, y = _x(x_axis.place(s.x)), _y(y_axis.place(s.y))
        bar = ""
        if s.low is not None and s.high is not None:
            bar = f'<line x1="{x}" x2="{x}" y1="{_y(y_axis.place(s.low))}" y2="{_y(y_axis.place(s.high))}"/>'
        anchor, at, text_y = _label_place(x, y, 7 * len(s.name), taken)
        parts.append(
            f'<g class="{colour(i)}">{bar}<path class="mark" d="{_mark(i)}" transform="translate({x} {y})">'
            f"<title>{escape(s.name)}: {s.x:.4g}, {s.y:.6g}</title></path>"
            f'<text x="{at}" y="{text_y}" text-anchor="{anchor}">{escape(s.name)}</text></g>'
        )
    return _svg("".join(parts), WIDTH, HEIGHT, ylabel)


def _label_place(
    x: float, y: float, width: float, taken: list[tuple[float, float, float]]
) -> tuple[str, float, float]:
    """Beside the point, on the side with room, moved up until it covers no label that is there."""
    right = x + 9 + width < WIDTH
    at = round(x + 9 if right else x - 9, 1)
    left_end = at if right else at - width
    text_y = y + 4
    while any(abs(text_y - other) < 13 and left_end < e and s < left_end + width for s, e, other in taken):
        text_y -= 13
    taken.append((left_end, left_end + width, text_y))
    return ("start" if right else "end"), at, round(text_y, 1)


def _frame(x_axis: Axis, y_axis: Axis, xlabel: str, ylabel: str, whole: bool = False) -> str:
    """Grid, ticks and names of both axes."""
    foot, parts = HEIGHT - _BOTTOM, []
    for value, text in x_axis.ticks():
        if whole and value != int(value):
            continue
        text = str(int(value)) if whole else text
        parts.append(
            f'<text x="{_x(x_axis.place(value))}" y="{foot + 16}" text-anchor="middle">{text}</text>'
        )
    for value, text in y_axis.ticks():
        y = _y(y_axis.place(value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{text}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(xlabel)}</text>'
    )
    across = (_TOP + foot) / 2
    parts.append(f'<text class="label" transform="translate(12 {across}) rotate(-90)" text-anchor="middle">'
                 f"{escape(ylabel)}</text>")  # fmt: skip
    return "".join(parts)


def _runs(xs: Sequence[float], ys: Sequence[float], log: bool) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y) and (y > 0 or not log):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _x(place: float, left: float = _LEFT) -> float:
    return round(left + place * (WIDTH - _RIGHT - left), 1)


def _y(place: float) -> float:
    return round(HEIGHT - _BOTTOM - place * (HEIGHT - _BOTTOM - _TOP), 1)


def _mark(index: int) -> str:
    # Colours and marks turn at different speeds, so that the ninth series differs from the first.
    return _MARKS[(index + index // _COLOURS) % len(_MARKS)]


def _svg(inside: str, width: float, height: float, name: str) -> str:
    size = f'viewBox="0 0 {width} {height}"'
    return f'<svg class="chart" {size} role="img" aria-label="{escape(name)}">{inside}</svg>'
