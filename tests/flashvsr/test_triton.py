"""The Triton backend without a GPU: its kernels in Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashvsr.attention.backends import why_not
from flashvsr.commands import kernels as command

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
# Parts of the largest value: a few roundings of the dtype; of float32, at scores of several hundred, more.
ALLOWED = {"float16": 2e-3, "bfloat16": 1.2e-2, "scores": 2e-5}
CASES = (
    "ragged", "several tiles to a block", "padded head", "odd head", "single", "all", "none", "slack",
    "strided", "expanded", "large scores", "wide block, float16", "wide block, bfloat16",
    "small block, bfloat16",
)  # fmt: skip


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """What `triton_interpreted.py` printed."""
    done = subprocess.run(
        [sys.executable, HERE / "triton_interpreted.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parents[1])},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(interpreted, case):
    found = interpreted[case]
    allowed = ALLOWED.get(case.rpartition(" ")[2], 2e-6)
    for what in ("out", "dq", "dk", "dv"):
        assert found[what] < allowed, what
    for what in ("repeats", "zeros", "layout"):
        assert found[what], what


def test_every_case_is_looked_at(interpreted):
    assert set(interpreted) == set(CASES)


@pytest.mark.parametrize("kernel", ["forward", "query_gradient", "key_gradient"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_and_fits(kernel, arch):
    built = command.build(kernel, arch, torch.bfloat16, 128, 128)
    assert 0 < built.shared <= command.SHARED[arch] and built.cubin > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", command.SHARED)
def test_compiles_and_fits_in_every_form(arch):
    for kernel, dtype, head_dim, block in command.forms():
        built = command.build(kernel, arch, dtype, head_dim, block)
        assert built.shared <= command.SHARED[arch], (kernel, dtype, head_dim, block)


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
    assert command.main(["--arch", "90", "--dtype", "bfloat16", "--head-dim", "64", "--block", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[:2] == ["forward", "90"] for line in lines) == 1
