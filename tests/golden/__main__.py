"""Prints, for every golden tensor, the largest absolute error beside its tolerance.

Exit code 0 when all are within, 1 when one is above, 2 when a file cannot be compared at all.
"""

from __future__ import annotations

import argparse
import json
import sys

from flashvsr.base.cli import UserError, run
from tests.golden import Report, check


def table(report: Report) -> str:
    lines = [f"{report.path.name}  {json.dumps(report.meta, sort_keys=True)}"]
    lines.append(f"  {'tensor':44s} {'max error':>9s}    {'tolerance':>9s}")
    for row in report.rows:
        line = f"  {row.name:44s} {row.error:9.2e} <= {row.tolerance:9.0e}  {row.verdict:4s} {row.note}"
        lines.append(line.rstrip() if row.passed else line.replace("<=", "> ", 1).rstrip())
    lines += [f"  note: {note}" for note in report.notes]
    return "\n".join(lines)


def summary(reports: list[Report], unreadable: int) -> str:
    rows = [(report, row) for report in reports for row in report.rows]
    failed, ties = sum(not row.passed for _, row in rows), sum(row.ties for _, row in rows)
    parts = [f"{len(rows)} compared, {len(rows) - failed} ok, {failed} FAIL, {ties} ties"]
    measured = [(row.error / row.tolerance, report, row) for report, row in rows if row.tolerance]
    if measured:
        share, report, row = max(measured, key=lambda m: m[0])
        parts.append(f"nearest its tolerance: {report.path.name} {row.name} {row.error:.1e} ({share:.0%})")
    if unreadable:
        parts.append(f"{unreadable} could not be compared")
    return "; ".join(parts)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE")
    reports, unreadable = [], 0
    for path in parser.parse_args(argv).files:
        try:
            reports.append(check(path))
        except UserError as error:
            unreadable += 1
            print(f"error: {error}", file=sys.stderr)
            continue
        print(table(reports[-1]), flush=True)
    print(summary(reports, unreadable))
    return 2 if unreadable else 1 if any(report.failed for report in reports) else 0


if __name__ == "__main__":
    run(main)
