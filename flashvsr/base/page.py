"""One self-contained HTML page: text, tables, pictures side by side, curves. No network, light and dark."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flashvsr.base.files import atomic

Crop = tuple[int, int, int, int]

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6672; --paper: #fff; --line: #d9dee3;
  --band: #f4f6f8; --best: #0a6b3d; --bestband: #e3f4ea; --mark: #e5484d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b1; --paper: #14181c;
  --line: #303840; --band: #1c2228; --best: #7fdcaa; --bestband: #17392a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1400px;
  color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1.25rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p { max-width: 46rem; margin: .6rem 0; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; background: var(--band); padding: .1em .3em;
  border-radius: 4px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: .875rem; }
.num { text-align: right; }
tbody tr:hover { background: var(--band); }
td.best { color: var(--best); background: var(--bestband); font-weight: 700; }
figure { margin: 1rem 0; min-width: 0; }
figcaption { color: var(--soft); font-size: .875rem; margin: .35rem 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.compare { display: grid; gap: .75rem; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); }
.compare figure { margin: 0; }
.compare figcaption { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
.compare img { width: 100%; image-rendering: pixelated; cursor: zoom-in; }
.compare .whole { position: relative; margin-bottom: .5rem; }
.compare .whole img { image-rendering: auto; }
.compare .whole i { position: absolute; border: 2px solid var(--mark); border-radius: 2px;
  pointer-events: none; }
@media (max-width: 800px) { .compare { grid-template-columns: repeat(min(var(--n), 2), minmax(0, 1fr)); } }
.gallery { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
.gallery figure { margin: 0; }
.gallery figcaption { overflow-wrap: anywhere; line-height: 1.35; }
.gallery img { width: 100%; }
.panels { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); }
.panels figure { margin: 0; }
.panels figcaption { color: var(--ink); font-weight: 600; }
.panels svg { width: 100%; overflow: visible; border-bottom: 0; }
.panels rect { fill: #4b8bbe; }
.panels line { stroke: var(--mark); stroke-width: 1.5; }
.panels text { fill: var(--soft); font-size: 10px; }
#big { position: fixed; inset: 0; display: none; place-items: center; background: #000d; cursor: zoom-out; }
#big.open { display: grid; }
#big img { width: 96vw; height: 88vh; object-fit: contain; image-rendering: pixelated; }
#big b { color: #fff; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for part in parts %}{{ part }}
{% endfor %}
<div id="big"><b></b><img alt=""></div>
<script>
// A click enlarges a picture; the arrow keys go through its row, in place.
const big = document.getElementById("big");
let row = [], at = 0;
function show(i) {
  at = (i + row.length) % row.length;
  big.querySelector("img").src = row[at].src;
  big.querySelector("b").textContent = row[at].alt;
}
document.querySelectorAll(".compare img").forEach(img => img.addEventListener("click", () => {
  const kind = img.closest(".whole") ? ".whole img" : ".zoom img";
  row = [...img.closest(".compare").querySelectorAll(kind)];
  big.classList.add("open"); show(row.indexOf(img));
}));
big.addEventListener("click", () => big.classList.remove("open"));
document.addEventListener("keydown", e => {
  if (!big.classList.contains("open")) return;
  if (e.key === "Escape") big.classList.remove("open");
  if (e.key === "ArrowRight") show(at + 1);
  if (e.key === "ArrowLeft") show(at - 1);
});
</script>
</body>
</html>
"""


class Page:
    """A report put together from top to bottom; `save` writes it as one file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[Any] = []

    def _add(self, template: str, **values: Any) -> None:
        self._parts.append(_render(template, **values))

    def heading(self, text: str, level: int = 2) -> None:
        """A heading; level 2 opens a section, level 3 a part of one."""
        if level not in (2, 3):
            raise ValueError(f"level={level} must be 2 or 3; the title is level 1")
        self._add(f"<h{level}>{{{{ text }}}}</h{level}>", text=text)

    def text(self, text: str) -> None:
        """Paragraphs, parted by empty lines; `words between backticks` are set as code."""
        paragraphs = [p.split("`") for p in text.split("\n\n") if p.strip()]
        self._add(
            "{% for p in paragraphs %}<p>{% for word in p %}"
            "{% if loop.index0 % 2 %}<code>{{ word }}</code>{% else %}{{ word }}{% endif %}"
            "{% endfor %}</p>{% endfor %}",
            paragraphs=paragraphs,
        )

    def table(
        self,
        rows: Sequence[Mapping[str, Any]],
        columns: Sequence[tuple[str, str, str | None]],
        best: Mapping[str, Literal["max", "min"]] | None = None,
    ) -> None:
        """A table with columns (key, title, format), a format being a spec such as ".2f" or None.

        `best` marks the largest or smallest value of a column, ties included. A value that a row lacks is
        shown as a dash.
        """
        extremes = {}
        for key, kind in (best or {}).items():
            values = [row[key] for row in rows if _is_number(row.get(key)) and math.isfinite(row[key])]
            if values:
                extremes[key] = {"max": max, "min": min}[kind](values)
        head = [(title, any(_is_number(row.get(key)) for row in rows)) for key, title, _ in columns]
        body = [
            [
                (_formatted(row.get(key), spec), numeric, key in extremes and row.get(key) == extremes[key])
                for (key, _, spec), (_, numeric) in zip(columns, head, strict=True)
            ]
            for row in rows
        ]
        self._add(
            '<div class="scroll"><table><thead><tr>{% for title, numeric in head %}'
            '<th{% if numeric %} class="num"{% endif %}>{{ title }}</th>{% endfor %}</tr></thead><tbody>'
            "{% for row in body %}<tr>{% for text, numeric, best in row %}"
            "<td class=\"{{ 'num ' if numeric }}{{ 'best' if best }}\">{{ text }}</td>"
            "{% endfor %}</tr>{% endfor %}</tbody></table></div>",
            head=head,
            body=body,
        )

    def figure(self, picture: bytes | np.ndarray, caption: str = "") -> None:
        """A picture: PNG bytes, or uint8 [H, W, 3] or [H, W]."""
        self._add(
            '<figure><img src="{{ uri }}" alt="{{ caption }}">'
            "<figcaption>{{ caption }}</figcaption></figure>",
            uri=_png_uri(picture),
            caption=caption,
        )

    def compare(
        self,
        pictures: Sequence[tuple[str, np.ndarray]],
        crop: Crop | Literal["auto"] | None = "auto",
        caption: str = "",
    ) -> None:
        """Pictures (label, uint8 [H, W, 3]) side by side, each with an enlarged crop beneath it.

        `crop` = (top, left, height, width) in pixels of the last picture, which is the reference; pictures
        of another size are cropped at the same place. "auto" takes the busiest place, an eighth of the
        reference's sides (at least 32 pixels); None shows no crops. Crops are enlarged by repeating pixels.
        """
        if not pictures:
            raise ValueError("compare needs at least one picture")
        reference = _pixels(pictures[-1][1])
        if crop == "auto":
            height, width = (max(side // 8, min(side, 32)) for side in reference.shape[:2])
            crop = busiest_crop(reference, height, width)
        shown = []
        for label, picture in pictures:
            picture = _pixels(picture)
            zoom = mark = None
            if crop is not None:
                top, left, bottom, right = _scaled_crop(crop, reference.shape, picture.shape)
                zoom = _png_uri(picture[top:bottom, left:right])
                h, w = picture.shape[:2]
                edges = {"top": top / h, "left": left / w, "height": (bottom - top) / h}
                edges["width"] = (right - left) / w
                mark = "; ".join(f"{name}: {100 * value:.3f}%" for name, value in edges.items())
            shown.append((label, _png_uri(picture), zoom, mark))
        self._add(
            '<div class="compare" style="--n: {{ shown|length }}">{% for label, whole, zoom, mark in shown %}'
            '<figure><figcaption>{{ label }}</figcaption><div class="whole"><img src="{{ whole }}" '
            'alt="{{ label }}">{% if mark %}<i style="{{ mark }}"></i>{% endif %}</div>'
            '{% if zoom %}<div class="zoom"><img src="{{ zoom }}" alt="{{ label }}"></div>{% endif %}'
            "</figure>{% endfor %}</div>{% if caption %}<p><small>{{ caption }}</small></p>{% endif %}",
            shown=shown,
            caption=caption,
        )

    def gallery(self, pictures: Sequence[tuple[str, np.ndarray]]) -> None:
        """Many small pictures (caption, uint8 [H, W, 3]) in rows, compressed; a caption may have lines."""
        shown = [(caption.split("\n"), _jpeg_uri(_pixels(picture))) for caption, picture in pictures]
        self._add(
            '<div class="gallery">{% for lines, uri in shown %}<figure><img src="{{ uri }}" '
            'alt="{{ lines[0] }}"><figcaption>{% for line in lines %}<div>{{ line }}</div>{% endfor %}'
            "</figcaption></figure>{% endfor %}</div>",
            shown=shown,
        )

    def histograms(self, panels: Sequence[tuple[str, Sequence[float], float | None]]) -> None:
        """How values are distributed: panels (title, values, where to draw a line or None)."""
        self._add(
            '<div class="panels">{% for title, bars, marks, line in panels %}<figure>'
            '<figcaption>{{ title }}</figcaption><svg viewBox="0 0 300 120">'
            '{% for x, y, w, h, n in bars %}<rect x="{{ x }}" y="{{ y }}" width="{{ w }}" '
            'height="{{ h }}"><title>{{ n }}</title></rect>{% endfor %}'
            '{% if line is not none %}<line x1="{{ line }}" x2="{{ line }}" y1="0" y2="100"/>{% endif %}'
            '{% for x, anchor, text in marks %}<text x="{{ x }}" y="114" text-anchor="{{ anchor }}">'
            "{{ text }}</text>{% endfor %}"
            "</svg></figure>{% endfor %}</div>",
            panels=[_histogram(*panel) for panel in panels],
        )

    def curves(
        self,
        series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        ylabel: str,
        xlabel: str = "step",
        caption: str = "",
        log: bool = False,
    ) -> None:
        """Lines {name: (xs, ys)} in one plot; `log` takes a logarithmic y axis."""
        light, dark = (_plot(series, xlabel, ylabel, log, ink) for ink in ("#1d2329", "#e4e8ec"))
        self._add(
            '<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{{ dark }}">'
            '<img src="{{ light }}" alt="{{ ylabel }}"></picture>'
            "<figcaption>{{ caption }}</figcaption></figure>",
            light=light,
            dark=dark,
            ylabel=ylabel,
            caption=caption,
        )

    def save(self, path: str | Path) -> None:
        """Write the page, atomically."""
        html = _render(_TEMPLATE, title=self.title, parts=self._parts)
        with atomic(path) as part:
            part.write_text(str(html), encoding="utf-8")


def busiest_crop(image: np.ndarray, height: int, width: int) -> Crop:
    """(top, left, height, width): the window of uint8 [H, W, 3] with the largest sum of gradients (ours)."""
    grey = image.astype(np.float64).mean(-1)
    detail = np.zeros_like(grey)
    detail[:, 1:] += np.abs(np.diff(grey, axis=1))
    detail[1:] += np.abs(np.diff(grey, axis=0))
    total = np.pad(detail.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    rows = total[height:] - total[:-height]
    window = rows[:, width:] - rows[:, :-width]
    top, left = np.unravel_index(int(window.argmax()), window.shape)
    return int(top), int(left), height, width


def _scaled_crop(crop: Crop, reference: tuple[int, ...], shape: tuple[int, ...]) -> Crop:
    """(top, left, bottom, right) of the same place in a picture of another size, at least one pixel."""
    top, left, height, width = crop
    inside = min(top, left) >= 0 and top + height <= reference[0] and left + width <= reference[1]
    if not inside or min(height, width) < 1:
        raise ValueError(f"crop={crop} does not lie inside the reference of {reference[0]}x{reference[1]}")
    up, across = shape[0] / reference[0], shape[1] / reference[1]
    y0, x0 = min(round(top * up), shape[0] - 1), min(round(left * across), shape[1] - 1)
    y1, x1 = round((top + height) * up), round((left + width) * across)
    return y0, x0, max(y0 + 1, y1), max(x0 + 1, x1)


def _pixels(picture: Any) -> np.ndarray:
    picture = np.asarray(picture)
    if picture.ndim == 2:
        picture = picture[..., None].repeat(3, -1)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}")
    return picture


def _png_uri(picture: bytes | np.ndarray) -> str:
    if not isinstance(picture, bytes):
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(_pixels(picture)).save(buffer, "png", optimize=True)
        picture = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _jpeg_uri(picture: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _histogram(title: str, values: Sequence[float], mark: float | None) -> tuple:
    """What a panel draws in its field of 300x100: bars (x, y, width, height, tooltip), axis marks, line."""
    known = np.asarray(values, np.float64)
    least, most = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if mark is not None:
        least, most = min(least, mark), max(most, mark)
    most = most if most > least else least + 1
    counts, edges = np.histogram(known, bins=min(30, max(8, len(set(values)))), range=(least, most))
    width = 300 / len(counts)
    tallest = max(int(counts.max()), 1)
    bars = []
    for k, n in enumerate(counts.tolist()):
        height = round(95 * n / tallest, 1)
        bars.append(
            (round(k * width, 1), 100 - height, round(width - 1, 1), height, f"{n} from {edges[k]:.4g}")
        )
    ends = ((0, "start"), (150, "middle"), (300, "end"))
    marks = [(x, anchor, f"{least + x / 300 * (most - least):.4g}") for x, anchor in ends]
    line = None if mark is None else round(300 * (mark - least) / (most - least), 1)
    return f"{title} ({len(known):,})", bars, marks, line


def _plot(series: Mapping[str, tuple], xlabel: str, ylabel: str, log: bool, ink: str) -> str:
    # Figure without pyplot: no global state and no window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, (xs, ys) in series.items():
        axes.plot(xs, ys, label=name, linewidth=1.6, marker="o" if len(xs) < 2 else None)
    axes.set_xlabel(xlabel, color=ink)
    axes.set_ylabel(ylabel, color=ink)
    if log:
        axes.set_yscale("log")
    axes.tick_params(colors=ink, which="both")
    axes.grid(alpha=0.25)
    for side, spine in axes.spines.items():
        spine.set_color(ink)
        spine.set_visible(side in ("left", "bottom"))
    if series:
        axes.legend(frameon=False, labelcolor=ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _formatted(value: Any, spec: str | None) -> str:
    if value is None:
        return "–"
    return format(value, spec) if spec and _is_number(value) else str(value)


def _render(template: str, **values: Any) -> Any:
    from jinja2 import Environment
    from markupsafe import Markup

    return Markup(Environment(autoescape=True).from_string(template).render(**values))
