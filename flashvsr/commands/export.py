"""`python -m flashvsr export runs/NAME`: a run's finished parts as one model folder, verified."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m flashvsr export",
        description="Gather a run's finished parts (DiT and projector from stage 3, else 2, else 1) into one "
        "folder with the release's file names, load it back and compare it with the run.",
    )
    p.add_argument("run", metavar="runs/NAME", help="run folder, as `python -m train` leaves it")
    p.add_argument("--out", metavar="DIR", help="folder to write (default: runs/NAME/export)")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return p


def main(argv: list[str]) -> None:
    """Exports and prints where every part came from."""
    from flashvsr.weights.export import export
    from flashvsr.weights.folder import read_info
    from flashvsr.weights.names import CALLED, FILES

    given = parser().parse_args(argv)
    out = Path(given.out) if given.out else Path(given.run) / "export"
    parts = export(given.run, out, given.quiet)
    if given.quiet:
        return
    rows = [("part", "file", "from", "MB", "difference")]
    for e in parts:
        rows.append((CALLED[e.part], e.name, str(e.source), f"{e.size / 1e6:.1f}", f"{e.difference:.0e}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    missing = [CALLED[part] for part in FILES if part not in {e.part for e in parts}]
    if missing:
        print(f"not in this run: {', '.join(missing)}")
    print(f"{out}: a model of kind {read_info(out).info.kind}")
