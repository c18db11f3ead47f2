"""Attention alone: every usable backend beside dense attention and the ideal (dense time times density)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashvsr import flops
from flashvsr.attention import Selection, backends, sparse_attention
from flashvsr.attention.selection import causal_chunks, local_window, pool, select
from flashvsr.base import measure
from flashvsr.base.cli import UserError
from flashvsr.base.draws import generator
from flashvsr.bench.report import Report, Row, begin

OF_CUDA = {
    "dense cudnn": SDPBackend.CUDNN_ATTENTION,
    "dense flash": SDPBackend.FLASH_ATTENTION,
}  # fmt: skip
LEFT_OUT = ("reference",)  # is there to be right: it holds all scores
MASK = 2**31  # elements of a token mask that `dense` keeps for its backward: with more it is left out


@dataclass(frozen=True)
class Shape:
    """Chunks of blocks. visible: per query chunk, the key chunks it sees; blocks: rows and columns of blocks
    in a chunk; ratio: of selection (None: all); local_range: of the local window (None: none)."""

    visible: tuple[tuple[int, ...], ...]
    blocks: tuple[int, int]
    ratio: float | None
    block_tokens: int = 128
    heads: int = 12
    head_dim: int = 128
    batch: int = 1
    local_range: int | None = None

    @property
    def per_chunk(self) -> int:
        return self.blocks[0] * self.blocks[1]

    @property
    def key_chunks(self) -> int:
        return 1 + max(chunk for row in self.visible for chunk in row)

    @property
    def tokens(self) -> tuple[int, int]:
        """Of queries and of keys."""
        chunk = self.per_chunk * self.block_tokens
        return len(self.visible) * chunk, self.key_chunks * chunk

    def inputs(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        draw = generator(0, "bench.attention")
        shapes = [(self.batch, self.heads, n, self.head_dim) for n in (self.tokens[0], *2 * self.tokens[1:])]
        return [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]

    def window(self) -> Tensor | None:
        """The local window's allowed pairs."""
        return None if self.local_range is None else local_window(*self.blocks, self.local_range)

    def choose(self, q: Tensor, k: Tensor, local: Tensor | None, allowed: int | None) -> Selection:
        """As a plan does, which keeps the window on the device and knows how many pairs it allows."""
        pooled = pool(k, self.block_tokens).unflatten(2, (-1, self.per_chunk))
        return select(
            pool(q, self.block_tokens),
            lambda chunks: pooled[:, :, list(chunks)].flatten(2, 3),
            self.visible,
            [c * self.per_chunk for c in range(self.key_chunks)],
            key_blocks=self.key_chunks * self.per_chunk,
            per_chunk=self.per_chunk,
            block_tokens=self.block_tokens,
            ratio=self.ratio,
            local=local,
            allowed=allowed,
        )


def of_density(tokens: int, density: float, block_tokens: int, heads: int, head_dim: int) -> Shape:
    """One chunk of `tokens` that sees itself; UserError for sizes that do not go together."""
    blocks = tokens // block_tokens
    if not 0 < density <= 1:
        raise UserError(f"density={density} must be above 0 and at most 1")
    if blocks < 2 or tokens % block_tokens:
        raise UserError(f"tokens={tokens} must be a multiple, two at least, of block={block_tokens}")
    ratio = None if density == 1 else density
    return Shape(((0,),), (1, blocks), ratio, block_tokens, heads, head_dim)


def steady(
    height: int,
    width: int,
    block: tuple[int, int, int] = (2, 8, 8),
    area: int = 768 * 1280,
    **more: int,
) -> Shape:
    """One streaming chunk that sees three past ones, at an output size and the release's settings; `area`:
    pixels of the training size."""
    blocks = (height // (16 * block[1]), width // (16 * block[2]))
    ratio = 2.0 * area / (height * width)
    tokens = block[0] * block[1] * block[2]
    return Shape(((0, 1, 2, 3),), blocks, ratio, tokens, local_range=11, **more)


def whole_clip(
    latents: int, height: int, width: int, block: tuple[int, int, int] = (2, 8, 8), **more: int
) -> Shape:
    """A training clip under the causal plan with all history, at the size it is trained at."""
    seen = causal_chunks(latents // 2, latents // 2)
    visible = tuple(tuple(row.nonzero().flatten().tolist()) for row in seen)
    blocks = (height // (16 * block[1]), width // (16 * block[2]))
    return Shape(visible, blocks, 2.0, block[0] * block[1] * block[2], **more)


def usable(
    shape: Shape, device: torch.device, dtype: torch.dtype, asked: Sequence[str] | None, backward: bool
) -> list[str]:
    """The backends to measure: those asked for (UserError for one that cannot be used), or all usable."""
    facts = (device, dtype, shape.head_dim, shape.block_tokens)
    if asked is not None:
        return [backends.resolve(name, *facts) for name in asked]
    left_out = LEFT_OUT
    if backward and shape.batch * shape.heads * shape.tokens[0] * shape.tokens[1] > MASK:
        left_out += ("dense",)
    found = backends.available(*facts)
    return [name for name, reason in found.items() if reason is None and name not in left_out]


def bench(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    title: str = "attention",
    asked: Sequence[str] | None = None,
    backward: bool = True,
    repeats: int = 5,
) -> Report:
    """Every backend in turns with dense attention, forward and (with `backward`) forward and backward."""
    names = usable(shape, device, dtype, asked, backward)
    q, k, v = shape.inputs(device, dtype)
    window = shape.window()
    given = (None, None) if window is None else (window.to(device), int(window.sum()))
    selection = shape.choose(q, k, *given)
    density = selection.density
    report = begin(
        title, device, dtype, heads=shape.heads, head_dim=shape.head_dim, block=shape.block_tokens,
        queries=shape.tokens[0], keys=shape.tokens[1], density=f"{density:.3f}",
    )  # fmt: skip
    work = flops.attention(flops.selected_pairs(selection), shape.heads * shape.head_dim) * shape.batch
    full = flops.attention(shape.tokens[0] * shape.tokens[1], shape.heads * shape.head_dim) * shape.batch
    ways = {name: partial(sparse_attention, selection=selection, backend=name) for name in names}
    ways, failed = working(ways, (q, k, v), backward)
    references = dense_ways(device, (q, k, v))
    choosing = {"selection": lambda: shape.choose(q, k, *given)}
    with torch.no_grad():
        calls = {name: partial(way, q, k, v) for name, way in (references | ways).items()} | choosing
        times = measure.interleaved(calls, repeats)
        peaks = {name: measure.peak_bytes(call, device) for name, call in calls.items()}
    best = min(times[name] for name in references)
    for name in references:
        report.rows.append(Row(name, times[name], full, peaks[name], best))
    report.rows.append(Row("ideal", best * density, work, None, best, "dense times density"))
    for name in ways:
        report.rows.append(Row(name, times[name], work, peaks[name], best))
    fastest = min((times[name] for name in ways), default=best)
    note = f"{times['selection'] / fastest:.1%} of the fastest backend"
    report.rows.append(Row("selection", times["selection"], None, peaks["selection"], None, note))
    if backward:
        _backward(report, references, ways, (q, k, v), (full, work, density), repeats)
    unused = {
        n: r for n, r in backends.available(device, dtype, shape.head_dim, shape.block_tokens).items() if r
    }
    report.extra = {"density": density, "not_usable": unused, "failed": failed}
    return report


def working(
    ways: dict[str, Callable], inputs: tuple[Tensor, Tensor, Tensor], backward: bool
) -> tuple[dict[str, Callable], dict[str, str]]:
    """Those that run, and the errors of those that do not: one broken kernel must not cost the others'
    numbers. Whoever prints the report prints the errors."""
    good, failed = {}, {}
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    for name, way in ways.items():
        try:
            out = way(*leaves)
            if backward:
                torch.autograd.grad(out.sum(), leaves)
            if out.is_cuda:
                torch.cuda.synchronize(out.device)
            good[name] = way
        except (RuntimeError, UserError) as error:
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return good, failed


def _backward(
    report: Report,
    references: dict[str, Callable],
    ways: dict[str, Callable],
    inputs: tuple[Tensor, Tensor, Tensor],
    sizes: tuple[int, int, float],
    repeats: int,
) -> None:
    """Adds rows of forward and backward together; a backward is twice a forward's useful work."""
    full, work, density = sizes
    leaves = [x.detach().requires_grad_() for x in inputs]
    gradient = torch.randn_like(leaves[0])
    calls = {
        name: lambda way=way: torch.autograd.grad(way(*leaves), leaves, gradient)
        for name, way in (references | ways).items()
    }
    device = leaves[0].device
    times = measure.interleaved(calls, repeats)
    peaks = {name: measure.peak_bytes(call, device) for name, call in calls.items()}
    best = min(times[name] for name in references)
    for name in references:
        report.rows.append(Row(f"{name} + backward", times[name], 3 * full, peaks[name], best))
    report.rows.append(Row("ideal + backward", best * density, 3 * work, None, best, "dense times density"))
    for name in ways:
        report.rows.append(Row(f"{name} + backward", times[name], 3 * work, peaks[name], best))


def dense_ways(device: torch.device, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Callable]:
    """Dense attention as torch chooses it, and on a GPU by the kernels it can be told to use here."""

    def attend(kernel: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v)

    ways: dict[str, Callable] = {"dense sdpa": partial(attend, None)}
    if device.type == "cuda":
        for name, kernel in OF_CUDA.items():
            try:
                attend(kernel, *inputs)
            except RuntimeError:  # torch has no such kernel for this type or card
                continue
            ways[name] = partial(attend, kernel)
    return ways
