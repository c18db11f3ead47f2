"""Results of a measurement as a table for people and as JSON: time, useful work, memory, against what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from flashvsr.base import measure

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One measured thing. work: useful operations; peak: bytes; dense: seconds of dense attention on the
    same inputs in the same run; note: what the numbers do not say."""

    name: str
    seconds: float
    work: int | None = None
    peak: int | None = None
    dense: float | None = None
    note: str = ""


@dataclass
class Report:
    """Rows measured on one device and dtype, beside the matrix-product rate measured in the same run."""

    title: str
    facts: dict[str, Any]
    ceiling: float  # operations per second
    rows: list[Row] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        head = ["", "ms", "TFLOP/s", "of matmul", "vs dense", "peak MiB", ""]
        lines = [head, *(self._cells(row) for row in self.rows)]
        wide = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [self.title, ", ".join(f"{name} {value}" for name, value in self.facts.items())]
        text.append(f"matrix products reach {self.ceiling / 1e12:.3g} TFLOP/s here")
        for line in lines:
            first = line[0].ljust(wide[0])
            middle = "  ".join(cell.rjust(w) for cell, w in zip(line[1:-1], wide[1:-1], strict=True))
            text.append(f"{first}  {middle}  {line[-1]}".rstrip())
        return "\n".join(text)

    def _cells(self, row: Row) -> list[str]:
        rate = None if row.work is None else row.work / row.seconds
        return [
            row.name,
            f"{row.seconds * 1e3:.2f}",
            "" if rate is None else f"{rate / 1e12:.3g}",
            "" if rate is None else f"{rate / self.ceiling:.0%}",
            "" if row.dense is None else f"{row.dense / row.seconds:.2f}x",
            "" if row.peak is None else f"{row.peak / MIB:.0f}",
            row.note,
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds, operations and bytes, and what the machine was."""
        rows = []
        for row in self.rows:
            rate = None if row.work is None else row.work / row.seconds
            vs_dense = None if row.dense is None else row.dense / row.seconds
            share = None if rate is None else rate / self.ceiling
            rows.append({**asdict(row), "work_per_second": rate, "of_matmul": share, "vs_dense": vs_dense})
        return {
            "title": self.title,
            "machine": measure.machine(),
            "facts": {k: str(v) for k, v in self.facts.items()},
            "matmul_per_second": self.ceiling,
            "rows": rows,
            **self.extra,
        }


def begin(title: str, device: torch.device, dtype: torch.dtype, **facts: Any) -> Report:
    """A report without rows; measures the ceiling."""
    named = {"device": device, "dtype": name_of(dtype), **facts}
    return Report(title, named, measure.matmul_rate(device, dtype))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shares_text(shares: Mapping[str, float], others: Mapping[str, float]) -> str:
    """One line per kind of operation, then the largest of the others."""
    lines = [f"{share:6.1%}  {kind}" for kind, share in shares.items()]
    lines += [f"{share:6.1%}    of it {name}" for name, share in others.items()]
    return "\n".join(lines)


def json_of(reports: Sequence[Report]) -> dict[str, Any]:
    return {"reports": [report.as_dict() for report in reports]}
