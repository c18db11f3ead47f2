"""`python -m flashvsr kernels`: compiles the Triton kernels, for GPUs that need not be there, and prints what
they take: shared memory, code size, registers, spills."""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from flashvsr.base.cli import Progress, UserError

KERNELS = ("forward", "query_gradient", "key_gradient")
# Bytes of shared memory a program may have, by compute capability. Source: CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability".
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEAD_DIMS = (32, 64, 96, 128)
BLOCKS = (32, 64, 128)
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Built(NamedTuple):
    """A compiled kernel. `registers` and `spilled` (bytes of local memory) are per thread, None where the
    tool that reads them is missing."""

    shared: int
    cubin: int
    registers: int | None
    spilled: int | None


def forms() -> Iterator[tuple[str, torch.dtype, int, int]]:
    """Kernel, dtype, head dimension and block tokens: every size in bfloat16, the extremes in the others."""
    yield from itertools.product(KERNELS, [torch.bfloat16], HEAD_DIMS, BLOCKS)
    yield from itertools.product(KERNELS, [torch.float16, torch.float32], [32, 128], [32, 128])


def signature(function, dtype: torch.dtype) -> tuple[dict[str, str], dict[tuple[int], list]]:
    """Argument types as a launch would find them, and which are multiples of 16."""
    special = {"columns": "*i16", "scale": "fp32", "order": "*i32", "offsets": "*i32"}
    special |= dict.fromkeys(("lse", "delta"), "*fp32")
    special |= dict.fromkeys(("q", "k", "v", "out", "do", "dq", "dk", "dv"), POINTERS[dtype])
    types, multiples = {}, {}
    for i, name in enumerate(function.arg_names):
        types[name] = "constexpr" if name.isupper() else special.get(name, "i32")
        if types[name].startswith("*") or name == "d" or name.endswith(("_b", "_h", "_t")):
            multiples[(i,)] = [["tt.divisibility", 16]]
    return types, multiples


def build(kernel: str, arch: int, dtype: torch.dtype, head_dim: int, block_tokens: int, tile=None) -> Built:
    """Compiles a kernel as the backend would launch it (or with another `Tile`)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flashvsr.attention.backends import triton as backend
    from flashvsr.attention.backends import triton_kernels

    if backend.interpreted():
        raise UserError("TRITON_INTERPRET is set, so that nothing can be compiled; unset it")
    tile = tile or backend.tiles_for(divmod(arch, 10), dtype, block_tokens)[kernel]
    function = getattr(triton_kernels, kernel)
    types, multiples = signature(function, dtype)
    source = ASTSource(function, types, backend.constants(tile, head_dim, block_tokens), multiples)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = compiled.asm["cubin"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return Built(compiled.metadata.shared, len(cubin), *registers(cubin, tool))


def registers(cubin: bytes, tool: Path) -> tuple[int | None, int | None]:
    """Registers and bytes of local memory of a thread, as `cuobjdump` reads them."""
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (None, None)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m flashvsr kernels",
        description="Compile the Triton attention kernels for GPUs, present or not; print what they take.",
    )
    p.add_argument("--arch", type=int, nargs="+", choices=SHARED, default=[80, 90, 100])
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    p.add_argument("--head-dim", type=int, nargs="+", default=[64, 128], help="up to 128")
    p.add_argument("--block", type=int, nargs="+", choices=BLOCKS, default=[128], help="tokens of a block")
    return p


def main(argv: list[str]) -> int:
    """Prints a table; exit code 1 when a kernel asks for more shared memory than the GPU has."""
    given = parser().parse_args(argv)
    try:
        import triton
    except ImportError:
        raise UserError("Triton is not installed; pip install triton") from None

    from flashvsr.attention.backends.triton import tiles_for

    asked = list(itertools.product(KERNELS, given.arch, given.dtype, given.head_dim, given.block))
    lines, fits = [], True
    with Progress(len(asked), "kernels", "kernel") as progress:
        for kernel, arch, name, head_dim, block in asked:
            dtype = DTYPES[name]
            built = build(kernel, arch, dtype, head_dim, block)
            tile = tiles_for(divmod(arch, 10), dtype, block)[kernel]
            fits &= built.shared <= SHARED[arch]
            lines.append(line(kernel, arch, name, head_dim, block, tile, built))
            progress.update()
    print(f"Triton {triton.__version__}; tile: queries x keys, warps, stages; spilled: bytes a thread")
    print(
        f"{'kernel':15s} {'sm':>3s} {'dtype':9s} {'head':>4s} {'block':>5s} {'tile':>13s} {'shared':>7s} "
        f"{'of':>7s} {'cubin':>7s} {'regs':>5s} {'spilled':>7s}"
    )
    print("\n".join(lines))
    return 0 if fits else 1


def line(kernel: str, arch: int, dtype: str, head_dim: int, block: int, tile, built: Built) -> str:
    """One row of the table."""
    shape = f"{tile.m}x{tile.n} {tile.warps} {tile.stages}"
    known = ["?" if x is None else str(x) for x in (built.registers, built.spilled)]
    verdict = "" if built.shared <= SHARED[arch] else "  TOO MUCH"
    return (
        f"{kernel:15s} {arch:3d} {dtype:9s} {head_dim:4d} {block:5d} {shape:>13s} {built.shared:7d} "
        f"{SHARED[arch]:7d} {built.cubin:7d} {known[0]:>5s} {known[1]:>7s}{verdict}"
    )
