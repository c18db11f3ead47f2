"""The Triton backend without a GPU: its kernels in Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashvsr.attention import Selection
from flashvsr.attention.backends import why_not
from flashvsr.commands import kernels as command
from tests.flashvsr.attention_cases import CASES

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
# Parts of the largest value: a few roundings of the dtype; of float32, at scores of several hundred, more.
ALLOWED = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.2e-2, "sharp": 5e-5}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What `triton_interpreted.py` printed."""
    done = subprocess.run(
        [sys.executable, HERE / "triton_interpreted.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parents[1])},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_kernels_equal_float64(interpreted):
    """Forward and backward: ragged, empty and long rows, all tiles, padded heads, strides, dtypes."""
    assert len(interpreted["errors"]) == len(CASES) + 3
    for case, found in interpreted["errors"].items():
        allowed = max(x for name, x in ALLOWED.items() if name in ("float32", *case.split("-")))
        assert max(found) < allowed, f"{case}: out, dq, dk, dv {found}"


def test_kernels_repeat_bit_for_bit(interpreted):
    assert len(interpreted["repeats"]) == 2
    assert all(all(same) for same in interpreted["repeats"].values()), interpreted["repeats"]


def test_output_is_laid_out_as_the_queries(interpreted):
    assert interpreted["as q"] is True


@pytest.mark.parametrize("kernel", ["forward", "query_gradient", "key_gradient"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_and_fits(kernel, arch):
    built = command.build(kernel, arch, torch.bfloat16, 128, 128)
    assert 0 < built.shared <= command.SHARED[arch] and built.cubin > 0


class PretendedDriver:
    """A Hopper card, as far as Triton asks before it would start a kernel."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them for real")
def test_launches_bind_and_compile_once(monkeypatch):
    """All that a real launch does but start: as many programs as tiles, one binary whatever the selection."""
    from triton.runtime import driver

    from flashvsr.attention.backends import triton, triton_kernels

    started: dict[str, list[tuple[int, str]]] = {}

    class Compiled:
        def __init__(self, function):
            self.function = function

        def __getitem__(self, grid):
            def launch(*args, **options):
                binary = self.function.warmup(*args, grid=grid, **options)
                started.setdefault(self.function.__name__, []).append((grid[0], binary.hash))

            return launch

    for name in (*command.KERNELS, "row_products"):
        monkeypatch.setattr(triton_kernels, name, Compiled(getattr(triton_kernels, name)))
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(driver, "_active", PretendedDriver())
    for heads, queries, keys in ((12, 6, 9), (1, 1, 1), (5, 32, 48)):
        selection = Selection.from_mask(torch.rand(1, heads, queries, keys) < 0.5, 128)
        q, k, v = (torch.zeros(1, n * 128, heads, 128, dtype=torch.bfloat16) for n in (queries, keys, keys))
        leaves = [x.transpose(1, 2).requires_grad_() for x in (q, k, v)]
        triton.attention(*leaves, selection).sum().backward()
    programs = {name: [n for n, _ in calls] for name, calls in started.items()}
    assert programs == {
        "forward": [72, 1, 160], "query_gradient": [72, 1, 160], "key_gradient": [108, 1, 240],
        "row_products": [144, 2, 320],
    }  # fmt: skip
    for name, calls in started.items():
        assert len({binary for _, binary in calls}) == 1, name


@pytest.mark.slow
@pytest.mark.parametrize("arch", command.SHARED)
def test_compiles_and_fits_in_every_form(arch):
    for kernel, dtype, head_dim, block in command.forms():
        built = command.build(kernel, arch, dtype, head_dim, block)
        assert built.shared <= command.SHARED[arch], (kernel, dtype, head_dim, block)


@pytest.mark.parametrize("few", [0, 1000])
def test_programs_start_with_long_rows(few, monkeypatch):
    """Every row once; by falling count, of all rows or head by head."""
    from flashvsr.attention.backends import triton

    monkeypatch.setattr(triton, "FEW_ROWS", few)
    counts = torch.tensor([[[3, 0, 5], [1, 9, 9]]], dtype=torch.int32)
    order = triton._long_rows_first(Selection(counts, torch.zeros(27, dtype=torch.int16), 9, 32))
    assert order.dtype == torch.int32
    assert order.tolist() == ([4, 5, 2, 0, 3, 1] if few else [2, 0, 1, 4, 5, 3])


def test_says_why_not():
    cpu = torch.device("cpu")
    assert "needs an NVIDIA GPU, not cpu" in why_not("triton", cpu, torch.bfloat16, 128, 128)
    assert "float64" in why_not("triton", cpu, torch.float64, 128, 128)
    assert "up to 128, not 160" in why_not("triton", cpu, torch.bfloat16, 160, 128)
    assert "not 48" in why_not("triton", cpu, torch.bfloat16, 64, 48)


def test_says_why_not_of_an_old_card(monkeypatch):
    from flashvsr.attention.backends import triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or newer" in triton.why_not(torch.device("cuda"), torch.float16, 64, 128)


def test_command_prints_a_table(capsys):
    assert command.main(["--arch", "90", "--dtype", "bfloat16", "--head-dim", "128"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[:2] == ["forward", "90"] for line in lines) == 1
