"""Which check a file takes, told by the tensors in it, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flashvsr.base.cli import UserError
from tests.golden.file import Golden, Row
from tests.golden.parts import (
    MISC,
    check_baseline,
    check_misc,
    check_projector,
    check_tc_decoder,
    check_vae,
)
from tests.golden.stream import check_dit_stream, check_pipeline


@dataclass(frozen=True)
class Report:
    """Rows of one file."""

    path: Path
    meta: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]


def _checker(golden: Golden) -> Callable[[Golden], Iterator[Row]]:
    present = golden.tensors
    for mark, check_file in (
        ("lq_uint8_CFHW", check_pipeline),
        ("chunk0.x", check_dit_stream),
        ("chunk0.latent_NTCHW", check_tc_decoder),
        ("input_BNCHW", check_baseline),
    ):
        if mark in present:
            return check_file
    for prefixes, check_file in (("lr_proj.", check_projector), ("vae.", check_vae), (MISC, check_misc)):
        if any(name.startswith(prefixes) for name in present):
            return check_file
    held = ", ".join(sorted(present)[:3]) or "nothing"
    raise UserError(f"{golden.path} is not a golden file this code knows (it holds {held})")


@torch.no_grad()
def check(path: str | Path) -> Report:
    """Compares one file. UserError for one that cannot be read, is none of these, or lacks what is needed."""
    golden = Golden(path)
    rows = list(_checker(golden)(golden))
    if not rows:
        raise UserError(f"{path} holds no output to compare with")
    unused = golden.unused()
    if unused:
        more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
        golden.notes.append(f"not used, unknown here: {', '.join(unused[:4])}{more}")
    return Report(golden.path, golden.meta, rows, golden.notes)
