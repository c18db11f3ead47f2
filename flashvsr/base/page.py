"""One self-contained HTML page: text, tables, pictures side by side, charts. No network, light and dark.

The same parts give the same bytes. How it looks and moves stands in `page_shell`, charts in `charts`.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flashvsr.base import charts
from flashvsr.base.files import atomic
from flashvsr.base.page_shell import SCRIPT, SHELL, STYLE, VIEWER

Crop = tuple[int, int, int, int]


@dataclass(frozen=True)
class Embedded:
    """A picture as it stands in a page: a data URI, and its size in pixels."""

    uri: str
    height: int
    width: int


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

    def protocol(self, sentences: Sequence[str]) -> None:
        """Small print under a table: how its numbers came about, a line each; `backticks` as in `text`."""
        self._add(
            '<div class="protocol">{% for line in lines %}<div>{% for word in line %}'
            "{% if loop.index0 % 2 %}<code>{{ word }}</code>{% else %}{{ word }}{% endif %}"
            "{% endfor %}</div>{% endfor %}</div>",
            lines=[sentence.split("`") for sentence in sentences],
        )

    @contextmanager
    def fold(self, summary: str) -> Iterator[None]:
        """What is added inside is shown after a click on `summary`."""
        self._add("<details><summary>{{ summary }}</summary>", summary=summary)
        yield
        self._add("</details>")

    def table(
        self,
        rows: Sequence[Mapping[str, Any]],
        columns: Sequence[tuple[str, str, str | None]],
        ranks: Mapping[str, Sequence[int | None]] | None = None,
        under: Mapping[str, str] | None = None,
    ) -> None:
        """A table with columns (key, title, format), a format being a spec such as ".2f" or None.

        `ranks` holds, for a column, a rank per row: 1 is marked as the best, 2 underlined as the second.
        `under` names for a column the key of a text that stands small under its value. A value that a row
        lacks is shown as a dash.
        """
        marks = {
            key: [{1: "best", 2: "second"}.get(r, "") for r in own] for key, own in (ranks or {}).items()
        }
        head = [
            (title, key in marks or any(_is_number(row.get(key)) for row in rows))
            for key, title, _ in columns
        ]
        body = [
            [
                (
                    _formatted(row.get(key), spec),
                    row.get((under or {}).get(key, "")),
                    f"{'num' if numeric else ''} {marks[key][i] if key in marks else ''}".strip(),
                )
                for (key, _, spec), (_, numeric) in zip(columns, head, strict=True)
            ]
            for i, row in enumerate(rows)
        ]
        self._add(
            '<div class="scroll"><table><thead><tr>{% for title, numeric in head %}'
            '<th{% if numeric %} class="num"{% endif %}>{{ title }}</th>{% endfor %}</tr></thead><tbody>'
            "{% for row in body %}<tr>{% for text, small, classes in row %}"
            '<td class="{{ classes }}">'
            '{% if "second" in classes %}<u>{{ text }}</u>{% else %}{{ text }}{% endif %}'
            "{% if small %}<small>{{ small }}</small>{% endif %}</td>{% endfor %}"
            "</tr>{% endfor %}</tbody></table></div>",
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
            '<div class="panels bars">{% for title, bars, marks, line in panels %}<figure>'
            '<figcaption>{{ title }}</figcaption><svg viewBox="0 0 300 120">'
            '{% for x, y, w, h, n in bars %}<rect x="{{ x }}" y="{{ y }}" width="{{ w }}" '
            'height="{{ h }}"><title>{{ n }}</title></rect>{% endfor %}'
            '{% if line is not none %}<line x1="{{ line }}" x2="{{ line }}" y1="0" y2="100"/>{% endif %}'
            '{% for x, anchor, text in marks %}<text x="{{ x }}" y="114" text-anchor="{{ anchor }}">'
            "{{ text }}</text>{% endfor %}"
            "</svg></figure>{% endfor %}</div>",
            panels=[_histogram(*panel) for panel in panels],
        )

    def viewer(
        self,
        choices: Sequence[tuple[str, Mapping[str, Embedded]]],
        crop: Crop | None = None,
        strips: int = 0,
    ) -> None:
        """Pictures side by side that are moved and enlarged together, one choice (a frame, say) at a time.

        choices: (label, {pane: picture}), all with the same panes, of which the last is the reference: all
        panes have its shape, smaller pictures are enlarged by repeating pixels. crop: (top, left, height,
        width) in pixels of the reference, what is seen first (default: all). strips: panes stand below each
        other, drawn so many times as high as their pixels ask for.
        """
        names = list(choices[0][1])
        if any(list(pictures) != names for _, pictures in choices):
            raise ValueError("every choice of a viewer needs the same pictures in the same order")
        reference = choices[0][1][names[-1]]
        zoom, left, top = 1.0, 0.0, 0.0
        if crop is not None:
            zoom = max(1.0, min(reference.height / crop[2], reference.width / crop[3]))
            left = min(crop[1] / reference.width, 1 - 1 / zoom)
            top = min(crop[0] / reference.height, 1 - 1 / zoom)
        self._add(
            VIEWER,
            choices=choices,
            names=names,
            strips=strips,
            crop=crop is not None,
            columns=1 if strips else _columns(len(names)),
            ratio=f"{reference.width} / {reference.height * max(strips, 1)}",
            view=f"{zoom:.4f} {left:.5f} {top:.5f}",
            zoom=f"{zoom:.4f}",
            x=f"{100 * left:.3f}",
            y=f"{100 * top:.3f}",
        )

    def charts(self, drawn: Sequence[tuple[str, str]], names: Sequence[str] = ()) -> None:
        """Charts (title, SVG of `flashvsr.base.charts`) in rows, above them the key of their series."""
        from markupsafe import Markup

        self._add(
            '{{ key }}<div class="charts">{% for title, svg in drawn %}<figure>'
            "{% if title %}<figcaption>{{ title }}</figcaption>{% endif %}{{ svg }}</figure>"
            "{% endfor %}</div>",
            key=Markup(charts.legend(names)) if names else "",
            drawn=[(title, Markup(svg)) for title, svg in drawn],
        )

    def curves(
        self,
        series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        ylabel: str,
        xlabel: str = "step",
        log: bool = False,
    ) -> None:
        """Lines {name: (xs, ys)} in one plot; `log` takes a logarithmic y axis."""
        self.charts([("", charts.lines(series, xlabel, ylabel, log))], list(series))

    def save(self, path: str | Path) -> None:
        """Write the page, atomically."""
        from markupsafe import Markup

        shell = {"style": Markup(STYLE), "script": Markup(SCRIPT)}
        html = _render(SHELL, title=self.title, parts=self._parts, **shell)
        with atomic(path) as part:
            part.write_text(str(html), encoding="utf-8")


def embed(picture: np.ndarray, quality: int | None = None) -> Embedded:
    """uint8 [H, W, 3] for a viewer: as PNG, or as JPEG of `quality` with its colours at full size."""
    picture = _pixels(picture)
    uri = _png_uri(picture) if quality is None else _jpeg_uri(picture, quality, subsampling=0)
    return Embedded(uri, picture.shape[0], picture.shape[1])


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


def _jpeg_uri(picture: np.ndarray, quality: int = 82, subsampling: int = 2) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=quality, subsampling=subsampling)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _columns(panes: int) -> int:
    """Of a viewer: one row for up to three panes, else two rows or more."""
    return panes if panes <= 3 else max(2, min(4, -(-panes // 2)))


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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _formatted(value: Any, spec: str | None) -> str:
    if value is None:
        return "–"
    if _is_number(value) and math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return format(value, spec) if spec and _is_number(value) else str(value)


def _render(template: str, **values: Any) -> Any:
    from jinja2 import Environment
    from markupsafe import Markup

    return Markup(Environment(autoescape=True).from_string(template).render(**values))
