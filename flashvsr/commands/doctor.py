"""`python -m flashvsr doctor`: machine, versions, every attention backend against float64."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flashvsr.attention import Selection

PACKAGES = (
    "flashvsr", "torch", "numpy", "safetensors", "av", "einops", "hydra-core", "webdataset", "lpips",
    "accelerate", "deepspeed", "triton",
)  # fmt: skip
# Largest errors of outputs of order 1, and of the gradients of their product with noise.
TOLERANCE = {"float32": (2e-5, 2e-4), "bfloat16": (3e-2, 1e-1), "float16": (4e-3, 2e-2)}
HEADS, HEAD_DIM, BLOCK_TOKENS, QUERIES, KEYS = 2, 64, 128, 8, 12
REPEATS = 3


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m flashvsr doctor",
        description="Show machine and versions, and check the attention backends against the reference.",
    )
    p.add_argument("--device", help="cpu, cuda ... (default: cuda where there is one)")
    p.add_argument("--quiet", action="store_true", help="print only what failed")
    return p


def main(argv: list[str]) -> int:
    """Prints; exit code 1 when a usable backend is wrong."""
    import torch

    from flashvsr.base.measure import machine

    given = parser().parse_args(argv)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not given.quiet:
        for name, value in machine().items():
            print(f"{name:12s} {value}")
        for package in PACKAGES:
            print(f"{package:12s} {version(package)}")
        print_auto(device)
    failed = False
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        results = check_backends(device, dtype)
        wrong = [r for r in results if r.reason is None and not r.passed]
        print_table(wrong if given.quiet else results, device, dtype)
        failed |= bool(wrong)
    return 1 if failed else 0


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def print_auto(device: torch.device) -> None:
    """What `auto` stands for, at the head width and block size of the 1.3B model."""
    import torch

    from flashvsr.attention.backends import describe

    print()
    for place in dict.fromkeys((device, torch.device("cpu"))):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            print(f"attention on {place} in {name:9s} {describe('auto', place, dtype, 128, 128)}")


@dataclass
class Conformance:
    """A backend on one random selection (ragged rows, an empty one): why it cannot run, or its largest
    errors against float64, whether it repeats bit for bit, seconds, and what went wrong."""

    backend: str
    reason: str | None
    tolerance: tuple[float, float]
    forward: float = float("nan")
    backward: float = float("nan")
    repeats: bool = False
    forward_s: float = float("nan")
    both_s: float = float("nan")
    crash: str = ""

    @property
    def passed(self) -> bool:
        return self.forward <= self.tolerance[0] and self.backward <= self.tolerance[1]


@dataclass
class Problem:
    """One random selection with inputs and the gradient that comes back."""

    selection: Selection
    inputs: list[Tensor]
    gradient: Tensor

    def run(self, attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Output, dq, dk, dv."""
        import torch

        leaves = [x.to(dtype).requires_grad_() for x in self.inputs]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.gradient.to(dtype))]


def problem(device: torch.device, dtype: torch.dtype) -> Problem:
    """Ragged rows and an empty one; inputs rounded to `dtype`, so that the truth starts from the same."""
    import torch

    from flashvsr.attention import Selection
    from flashvsr.base.draws import generator

    draw = generator(0, "doctor")
    density = torch.rand(1, HEADS, QUERIES, 1, generator=draw)
    mask = torch.rand(1, HEADS, QUERIES, KEYS, generator=draw) < density
    mask[0, 0, 3] = False
    shapes = [(1, HEADS, n * BLOCK_TOKENS, HEAD_DIM) for n in (QUERIES, KEYS, KEYS, QUERIES)]
    *inputs, gradient = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
    return Problem(Selection.from_mask(mask.to(device), BLOCK_TOKENS), inputs, gradient)


def check_backends(device: torch.device, dtype: torch.dtype) -> list[Conformance]:
    """Every backend, and torch's dense attention over all keys as the measure of speed."""
    import torch
    import torch.nn.functional as F

    from flashvsr.attention.backends import available, sparse_attention
    from flashvsr.base.measure import interleaved

    task = problem(device, dtype)
    tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
    usable = available(device, dtype, HEAD_DIM, BLOCK_TOKENS)
    results = {name: Conformance(name, reason, tolerance) for name, reason in usable.items()}
    attend = {"all keys": F.scaled_dot_product_attention}
    truth = task.run(lambda *x: sparse_attention(*x, task.selection, backend="reference"), torch.float64)
    for name, result in results.items():
        if result.reason is not None:
            continue
        call = lambda *x, name=name: sparse_attention(*x, task.selection, backend=name)  # noqa: E731
        try:
            ours, again = task.run(call, dtype), task.run(call, dtype)
        except Exception as error:  # a compiler's or driver's own: the table says which
            result.crash = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        errors = [(a.double() - b).abs().max().item() for a, b in zip(ours, truth, strict=True)]
        result.forward, result.backward = errors[0], max(errors[1:])
        result.repeats = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        attend[name] = call
    with torch.no_grad():
        forward = interleaved({n: lambda f=f: f(*task.inputs) for n, f in attend.items()}, REPEATS)
    both = interleaved({n: lambda f=f: task.run(f, dtype) for n, f in attend.items()}, REPEATS)
    for name in attend.keys() & results.keys():
        results[name].forward_s, results[name].both_s = forward[name], both[name]
    alone = Conformance("all keys", None, tolerance, 0.0, 0.0, True, forward["all keys"], both["all keys"])
    return [*results.values(), alone]


def print_table(results: list[Conformance], device: torch.device, dtype: torch.dtype) -> None:
    """One line each; times also as a share of torch's dense attention over all keys."""
    if not results:
        return
    print(
        f"\nattention on {device} in {str(dtype).removeprefix('torch.')}, {HEADS} heads of {HEAD_DIM}, "
        f"{QUERIES}x{KEYS} blocks of {BLOCK_TOKENS} tokens, about half of them chosen; errors against float64"
    )
    print(
        f"{'backend':18s} {'forward':>8s} {'backward':>8s} {'bits':>7s} {'forward us':>16s} "
        f"{'with backward us':>17s}"
    )
    base = next((r for r in results if r.backend == "all keys"), None)
    for r in results:
        if r.reason is not None:
            print(f"{r.backend:18s} not usable: {r.reason}")
        elif r.crash:
            print(f"{r.backend:18s} FAILED {r.crash}")
        else:
            share = [""] * 2
            if base is not None:
                share = [
                    f" ({a / b:.2f}x)" for a, b in ((r.forward_s, base.forward_s), (r.both_s, base.both_s))
                ]
            times = f"{r.forward_s * 1e6:8.0f}{share[0]:8s} {r.both_s * 1e6:9.0f}{share[1]:8s}"
            if r.backend == "all keys":
                print(f"{'dense, all keys':18s} {'':26s}{times}")
                continue
            bits = "same" if r.repeats else "differ"
            verdict = "ok" if r.passed else "FAILED"
            print(f"{r.backend:18s} {r.forward:8.0e} {r.backward:8.0e} {bits:>7s} {times}  {verdict}")
