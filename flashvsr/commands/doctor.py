"""`python -m flashvsr doctor`: machine, versions, and every attention backend against the reference."""

from __future__ import annotations

import argparse
import importlib.metadata
from dataclasses import dataclass

PACKAGES = (
    "flashvsr", "torch", "numpy", "safetensors", "av", "einops", "hydra-core", "webdataset", "lpips",
    "accelerate", "deepspeed", "triton",
)  # fmt: skip
FORWARD, BACKWARD = 2e-5, 2e-4  # largest float32 errors: of outputs of order 1, of gradients of their sum
BLOCKS, BLOCK_TOKENS, HEADS, HEAD_DIM = (24, 32), 32, 2, 64


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m flashvsr doctor",
        description="Show machine and versions, and check the attention backends against the reference.",
    )
    p.add_argument("--device", help="cpu, cuda ... (default: cuda where there is one)")
    p.add_argument("--quiet", action="store_true", help="print only what failed")
    return p


def main(argv: list[str]) -> int:
    """Prints; exit code 1 when a backend disagrees with the reference."""
    import torch

    from flashvsr.base.measure import machine

    given = parser().parse_args(argv)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    results = check_backends(device)
    failed = [r for r in results if not r.passed]
    if not given.quiet:
        for name, value in machine().items():
            print(f"{name:12s} {value}")
        for package in PACKAGES:
            print(f"{package:12s} {version(package)}")
    print_table(failed if given.quiet else results, device)
    return 1 if failed else 0


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Conformance:
    """A backend on one random selection (ragged rows, an empty one): errors against float64, microseconds."""

    backend: str
    forward_error: float
    backward_error: float
    forward_us: float
    both_us: float

    @property
    def passed(self) -> bool:
        return self.forward_error <= FORWARD and self.backward_error <= BACKWARD


def check_backends(device: str = "cpu") -> list[Conformance]:
    """Every backend in float32 against the reference in float64, forward and backward."""
    import torch

    from flashvsr.attention import Selection, sparse_attention
    from flashvsr.attention.backends import available
    from flashvsr.base.draws import generator
    from flashvsr.base.measure import interleaved

    draw = generator(0, "doctor")
    queries, keys = BLOCKS
    mask = torch.rand(1, HEADS, queries, keys, generator=draw) < torch.rand(
        1, HEADS, queries, 1, generator=draw
    )
    mask[0, 0, 3] = False
    selection = Selection.from_mask(mask.to(device), BLOCK_TOKENS)
    shapes = [(1, HEADS, n * BLOCK_TOKENS, HEAD_DIM) for n in (queries, keys, keys)]
    inputs = [torch.randn(shape, generator=draw).to(device) for shape in shapes]
    gradient = torch.randn(shapes[0], generator=draw).to(device)

    def forward(backend: str, dtype: torch.dtype) -> torch.Tensor:
        return sparse_attention(*(x.to(dtype) for x in inputs), selection, backend=backend)

    def both(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = sparse_attention(*leaves, selection, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, gradient.to(dtype))]

    facts = available(torch.device(device), torch.float32, HEAD_DIM, BLOCK_TOKENS)
    names = [name for name, reason in facts.items() if reason is None]
    expected = both("reference", torch.float64)
    with torch.no_grad():
        forward_s = interleaved({name: lambda n=name: forward(n, torch.float32) for name in names}, repeats=3)
    both_s = interleaved({name: lambda n=name: both(n, torch.float32) for name in names}, repeats=3)
    results = []
    for name in names:
        out, *gradients = both(name, torch.float32)
        errors = [
            (a.double() - b).abs().max().item() for a, b in zip([out, *gradients], expected, strict=True)
        ]
        results.append(
            Conformance(name, errors[0], max(errors[1:]), forward_s[name] * 1e6, both_s[name] * 1e6)
        )
    return results


def print_table(results: list[Conformance], device: str) -> None:
    if not results:
        return
    import torch

    from flashvsr.attention.backends import resolve

    queries, keys = BLOCKS
    auto = resolve("auto", torch.device(device), torch.float32, HEAD_DIM, BLOCK_TOKENS)
    print(
        f"\nattention on {device}, {HEADS} heads of {HEAD_DIM}, {queries}x{keys} blocks of {BLOCK_TOKENS} "
        f"tokens, float32 against float64; auto is {auto}"
    )
    print(
        f"{'backend':12s} {'forward error':>14s} {'backward error':>15s} {'forward us':>11s} {'both us':>9s}"
    )
    for r in results:
        print(
            f"{r.backend:12s} {r.forward_error:14.1e} {r.backward_error:15.1e} {r.forward_us:11.0f} "
            f"{r.both_us:9.0f}  {'ok' if r.passed else 'FAILED'}"
        )
