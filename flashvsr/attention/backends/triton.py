"""Our own Triton kernels: forward and backward, NVIDIA GPUs from compute capability 8.0 on.

The maths and the layout of the work are in `triton_kernels`; this file chooses tile sizes and launches.
Inputs keep their strides as long as the head dimension is contiguous. Results repeat bit for bit. With
`TRITON_INTERPRET=1` in the environment when Triton is first imported, the same kernels run on a CPU, slowly:
that is how they are tested without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashvsr.attention.backends import triton_kernels as kernels
from flashvsr.attention.selection import Selection

LEAST, WIDEST = 16, 128  # tokens of a block and of a tile; head dimensions
FEW_ROWS = 1024  # up to here the last rows to end weigh more than the cache: eight turns on 132 processors
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """Queries and keys a program handles in one step, its warps, and the depth of its pipeline of loads."""

    m: int
    n: int
    warps: int
    stages: int


# By kernel and generation, for 16-bit inputs.
TILES: dict[str, dict[str, Tile]] = {
    "forward": {
        "small": Tile(64, 32, 4, 3),
        "sm80": Tile(128, 64, 8, 3),
        "sm90": Tile(128, 128, 8, 3),
        "sm100": Tile(128, 128, 8, 3),
    },
    "query_gradient": {
        "small": Tile(64, 32, 4, 2),
        "sm80": Tile(128, 64, 8, 2),
        "sm90": Tile(128, 64, 8, 3),
        "sm100": Tile(128, 64, 8, 2),
    },
    "key_gradient": {
        "small": Tile(32, 64, 4, 2),
        "sm80": Tile(64, 128, 8, 2),
        "sm90": Tile(64, 128, 8, 2),
        "sm100": Tile(64, 128, 8, 2),
    },
}
EXACT = Tile(32, 32, 4, 2)  # float32: exact products, without tensor cores, for checks rather than speed


def generation(capability: tuple[int, int]) -> str:
    """The column of `TILES` for a compute capability; "small" has 99 KiB of shared memory a program."""
    if capability in ((8, 0), (8, 7)):
        return "sm80"
    return {9: "sm90", 10: "sm100"}.get(capability[0], "small")


def tiles_for(capability: tuple[int, int], dtype: torch.dtype, block_tokens: int) -> dict[str, Tile]:
    """Each kernel's tile, no larger than a block."""

    def fit(tile: Tile) -> Tile:
        m, n = min(tile.m, block_tokens), min(tile.n, block_tokens)
        return Tile(m, n, tile.warps if max(m, n) > 64 else 4, tile.stages)

    column = generation(capability)
    return {name: fit(EXACT if dtype == torch.float32 else row[column]) for name, row in TILES.items()}


def constants(tile: Tile, head_dim: int, block_tokens: int) -> dict[str, Any]:
    """The compile-time arguments of a kernel that walks lists."""
    return {
        "BLOCK": block_tokens,
        **padding(head_dim),
        "M": tile.m,
        "N": tile.n,
        "STAGES": tile.stages,
        "PRECISION": "ieee",
    }


def padding(head_dim: int) -> dict[str, Any]:
    """The width of a tile in memory, and whether it exceeds the head dimension."""
    width = max(LEAST, 1 << (head_dim - 1).bit_length())
    return {"WIDTH": width, "PADDED": width != head_dim}


def interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1."""
    return not isinstance(kernels.forward, triton.JITFunction)


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, block_tokens: int) -> str | None:
    """None on NVIDIA GPUs from 8.0 on, for 16- and 32-bit floats, heads up to 128, blocks of 2^n >= 16."""
    if dtype not in DTYPES:
        return f"does not compute in {dtype}"
    if head_dim > WIDEST:
        return f"takes head dimensions up to {WIDEST}, not {head_dim}"
    if block_tokens < LEAST or block_tokens & (block_tokens - 1):
        return f"takes blocks of a power of two from {LEAST} tokens on, not {block_tokens}"
    if interpreted():
        return "Triton's interpreter does not multiply bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"needs compute capability 8.0 or newer, not {capability}"


def attention(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, tiles: Mapping[str, Tile] | None = None
) -> Tensor:
    """See `sparse_attention`. `tiles` replaces the choice of `tiles_for`, to measure others."""
    assert q.dtype == k.dtype == v.dtype, "the caller projects them alike"
    if not q.numel():
        return q * 0
    if tiles is None:
        capability = (0, 0) if interpreted() else torch.cuda.get_device_capability(q.device)
        tiles = tiles_for(capability, q.dtype, selection.block_tokens)
    return _Attention.apply(q, k, v, selection, tiles)


def _long_rows_first(selection: Selection) -> Tensor:
    """The rows in the order in which programs start, int32: long ones first, so that the last are short.

    Few rows are sorted together; of many only those of a head, so that the programs at work at one time read
    the same keys from the L2 cache.
    """
    counts = selection.counts.flatten(0, 1)
    if counts.numel() <= FEW_ROWS:
        counts = counts.reshape(1, -1)
    order = counts.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(0, counts.numel(), counts.shape[1], device=counts.device)
    return (order + first[:, None]).int().flatten()


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _walk(
    kernel: str, tile: Tile, selection: Selection, order: Tensor, tensors: list[Tensor], sums: list[Tensor]
) -> None:
    """Launches one program per tile of every row of the selection.

    tensors: the kernel's arguments `B heads T d`, inputs and then outputs; sums: those `B heads T`.
    """
    q, n = tensors[0], selection.block_tokens
    heads, d = q.shape[1], q.shape[-1]
    sizes = [d, heads, selection.counts.shape[2]]
    programs = order.numel() * (n // tile.m)
    if kernel == "key_gradient":
        sizes.append(selection.key_blocks)
        programs = order.numel() * (n // tile.n)
    with torch.cuda.device_of(q):
        getattr(kernels, kernel)[(programs,)](
            *tensors, *sums, order, selection.offsets, selection.columns, math.log2(math.e) / math.sqrt(d),
            *sizes, *_strides(*tensors), **constants(tile, d, n),
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip


def _row_products(out: Tensor, do: Tensor, tile: int) -> Tensor:
    b, heads, tokens, d = out.shape
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    with torch.cuda.device_of(out):
        kernels.row_products[(delta.numel() // tile,)](
            out, do, delta, d, heads, tokens, *_strides(out, do), **padding(d), M=tile,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return delta


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, selection: Selection, tiles: Mapping[str, Tile]
    ) -> Tensor:
        q, k, v = (_readable(x) for x in (q, k, v))
        ctx.selection, ctx.tiles, ctx.order = selection, tiles, _long_rows_first(selection)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        _walk("forward", tiles["forward"], selection, ctx.order, [q, k, v, out], [lse])
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        do = _readable(do)
        sums = [lse, _row_products(out, do, min(ctx.selection.block_tokens, 64))]
        dq = dk = dv = None
        if ctx.needs_input_grad[0]:
            dq = torch.empty_like(q)
            tile = ctx.tiles["query_gradient"]
            _walk("query_gradient", tile, ctx.selection, ctx.order, [q, k, v, do, dq], sums)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dk, dv = torch.empty_like(k), torch.empty_like(v)
            turned, tile = ctx.selection.transposed(), ctx.tiles["key_gradient"]
            _walk("key_gradient", tile, turned, _long_rows_first(turned), [q, k, v, do, dk, dv], sums)
        return dq, dk, dv, None, None
