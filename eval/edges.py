"""`python -m eval.edges RUN`: how much frames change, by their place in a chunk.

Latent 0 is frame 0, latent i frames 4i-3 ... 4i; two latents are a chunk. A seam between chunks is a larger
change from frame 8c+4 to 8c+5 than elsewhere, and than HR's there; where the change between the latents of
one chunk (8c to 8c+1) is as large, it is the decoder's and not the model's. HR is a method like any other:
`--method HR=SET/GT`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from eval.results import read_evaluation
from flashvsr.base import charts
from flashvsr.base.cli import UserError, run
from flashvsr.base.page import Page

PERIOD, CHUNK_EDGE = 8, 4
PLACES = {"inside a latent": (1, 2, 3, 5, 6, 7), "between latents": (0,), "between chunks": (CHUNK_EDGE,)}


def main(argv: list[str]) -> None:
    """Print and draw the change between neighbouring frames by place, of a finished evaluation."""
    parser = argparse.ArgumentParser(prog="python -m eval.edges", description=main.__doc__)
    parser.add_argument("run", help="folder of `python -m eval --metrics chunk_edge,...`")
    folder = Path(parser.parse_args(argv).run)
    profiles = {
        name: profile(clips) for name, clips in changes(read_evaluation(folder / "eval.json")).items()
    }
    width = max(len(name) for name in ("method", *profiles))
    print("method".ljust(width), *PLACES, sep="  ")
    for name, by_place in profiles.items():
        cells = [sum(by_place[p] for p in places) / len(places) for places in PLACES.values()]
        texts = [f"{x:.3f}".rjust(len(title)) for title, x in zip(PLACES, cells, strict=True)]
        print(name.ljust(width), *texts, sep="  ")
    page = Page("Change from frame to frame, by place in the chunk")
    page.text(
        "Mean change between frames 8c+p and 8c+p+1 over the mean of all that are inside chunks, by p. "
        "Chunks meet at p = 4, the two latents of a chunk at p = 0."
    )
    series = {name: (list(range(PERIOD)), by_place) for name, by_place in profiles.items()}
    page.charts([("", charts.lines(series, "place p in the chunk", "change", whole=True))], list(series))
    page.save(folder / "edges.html")
    print(folder / "edges.html")


def changes(evaluation: dict[str, Any]) -> dict[str, list[list[float | None]]]:
    """Of each method, for each clip: the change between frames t and t+1 over its mean inside chunks."""
    if "chunk_edge" not in {metric["key"] for metric in evaluation["metrics"]}:
        raise UserError("this evaluation has no chunk_edge: run it again with --metrics chunk_edge,...")
    clips: dict[str, list[list[float | None]]] = {method["name"]: [] for method in evaluation["methods"]}
    for score in evaluation["scores"]:
        clips[score["method"]].append(score["per_frame"]["chunk_edge"][1:])  # nothing comes before frame 0
    return clips


def profile(clips: list[list[float | None]]) -> list[float]:
    """Means over clips and chunks at each of the 8 places; NaN where no clip has it."""
    means = []
    for place in range(PERIOD):
        values = [x for clip in clips for x in clip[place::PERIOD] if x is not None]
        means.append(sum(values) / len(values) if values else math.nan)
    return means


if __name__ == "__main__":
    run(main)
