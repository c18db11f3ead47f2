"""Plain torch: gathers the selected key blocks of each query block, so that cost follows density.

A row is one batch entry, head and query block. Rows of like length go through batched matrix products
together, in tiles small enough for the cache; a row longer than a tile is cut into slabs, whose results are
merged by their log-sum-exp (online softmax). The backward pass gathers again and recomputes the scores from
q, k and the saved log-sum-exp, so beyond inputs, outputs and gradients there is only the tile: at any length
less than `SCRATCH` bytes. Half precision is computed and summed in float32; there the sums of at least one
head come on top.

Runs forward and backward on every device. On CPUs the same inputs give the same bits; on GPUs the sums into
dk and dv use atomic additions and may differ in the last bit from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashvsr.attention.selection import Selection
from flashvsr.models.norm import widen

SCRATCH = 64 * 2**20  # the most this takes beside inputs, outputs and gradients
TILE_PER_THREAD = 2**20  # bytes of scores in a tile, per CPU thread: they should stay in its cache
PADDING = 2e7  # multiplications a group may waste on padding; less than starting another one costs


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, block_tokens: int) -> str | None:
    """Runs everywhere."""
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    """See `sparse_attention`. Differentiable once."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Gather.apply(q, k, v, selection)
    return _forward(q, k, v, selection)[0]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
        out, lse = _forward(q, k, v, selection)
        ctx.selection = selection
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *_backward(*ctx.saved_tensors, grad, ctx.selection), None


class _Blocks:
    """Reads blocks of `B heads T d` whatever its strides, without a copy of the whole."""

    def __init__(self, x: Tensor, n: int):
        _, self.heads, tokens, self.d = x.shape
        self.n, self.per_head = n, tokens // n
        self.by_block = x.is_contiguous()
        if self.by_block:
            self.flat = x.view(-1, n * self.d)
            return
        if x.stride(3) != 1 or any(s % self.d for s in x.stride()[:3]):
            x = x.contiguous()
        self.strides = [s // self.d for s in x.stride()[:3]]
        last = sum((size - 1) * s for size, s in zip(x.shape[:3], self.strides, strict=True))
        self.flat = x.as_strided((last + 1, self.d), (self.d, 1))
        self.token = torch.arange(n, device=x.device) * self.strides[2]

    def take(self, head: Tensor, block: Tensor) -> Tensor:
        """Blocks `P n d`, at least float32; `head` (batch * heads + head) and `block` broadcast to P."""
        if self.by_block:
            index = head * self.per_head + block
        else:
            b, h, t = self.strides
            index = (head // self.heads * b + head % self.heads * h + block * (t * self.n))[..., None]
            index = index + self.token
        return widen(self.flat.index_select(0, index.flatten())).view(-1, self.n, self.d)


@dataclass
class _Tile:
    """Some rows and, of each, `length` key blocks from the `skip`-th on.

    shorter: runs of rows (start, stop within the tile) that have only so many; the rest is padding.
    """

    rows: Tensor  # G
    head: Tensor  # G 1, batch * heads + head
    query: Tensor  # G 1
    keys: Tensor  # G length, key block within its head
    shorter: list[tuple[int, int, int]]
    skip: int


def _groups(counts: list[int], most: int, spare: float, threads: int) -> Iterator[tuple[int, int, int, int]]:
    """Tiles over descending `counts` as (start, stop, skip, length), each of at most `most` key blocks.

    A tile has at least one row; its rows are padded to the longest, by `spare` blocks together at most.
    Batched products go one to a thread: a tile of more rows than threads has a multiple of them.
    """
    skip, rows = 0, len(counts)
    while True:
        while rows and counts[rows - 1] <= skip:
            rows -= 1
        if not rows:
            return
        start = 0
        while start < rows:
            length = min(counts[start] - skip, most)
            stop, wasted = start + 1, 0
            while stop < rows and (stop + 1 - start) * length <= most:
                wasted += max(length - (counts[stop] - skip), 0)
                if wasted > spare:
                    break
                stop += 1
            if stop - start > threads and stop < rows:
                stop -= (stop - start) % threads
            yield start, stop, skip, length
            start = stop
        skip += most


def _shorter(counts: list[int], length: int) -> list[tuple[int, int, int]]:
    """Runs of equal counts below `length` in a tile's descending counts."""
    runs, at = [], 0
    for count, run in groupby(counts):
        start, at = at, at + len(list(run))
        if count < length:
            runs.append((start, at, count))
    return runs


def _tiles(selection: Selection, heads: range, d: int, element: int, tile_bytes: int) -> Iterator[_Tile]:
    """Tiles of the rows of `heads` (indices batch * heads + head) for scores of `element` bytes."""
    n, queries = selection.block_tokens, selection.counts.shape[2]
    device = selection.counts.device
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    scores = tile_bytes * threads if device.type == "cpu" else SCRATCH
    most = max(1, min(scores // (n * n * element), SCRATCH // (8 * n * max(n, d) * element)))
    rows = slice(heads.start * queries, heads.stop * queries)
    counts, order = selection.counts.flatten()[rows].sort(descending=True, stable=True)
    order = order + rows.start
    head, query = (order // queries)[:, None], (order % queries)[:, None]
    first = selection.offsets[order].long()[:, None]
    steps = torch.arange(most, device=device)
    lengths = counts.tolist()
    for start, stop, skip, length in _groups(lengths, most, PADDING / (n * n * d), threads):
        part = slice(start, stop)
        entry = first[part] + (skip + steps[:length])
        shorter = _shorter([count - skip for count in lengths[part]], length)
        if shorter:
            entry = entry.clamp_(max=selection.columns.numel() - 1)
        keys = selection.columns[entry].long()
        for a, b, real in shorter:
            keys[a:b, real:] = 0
        yield _Tile(order[part], head[part], query[part], keys, shorter, skip)


def _head_ranges(q: Tensor, k: Tensor) -> Iterator[range]:
    """All heads at once; in half precision as many as can have float32 sums in a part of the scratch."""
    total = q.shape[0] * q.shape[1]
    step = total
    if widen(q[:0]).dtype != q.dtype:
        sums = 4 * q.shape[3] * (q.shape[2] + 2 * k.shape[2])
        step = max(1, SCRATCH // 4 // sums)
    for start in range(0, total, step):
        yield range(start, min(start + step, total))


def _scores(tile: _Tile, q: Tensor, k: Tensor) -> Tensor:
    """`G n length*n`, padding at -inf; q is scaled already."""
    n = q.shape[1]
    s = torch.bmm(q, k.transpose(1, 2))
    for start, stop, real in tile.shorter:
        s[start:stop, :, real * n :] = -torch.inf
    return s


def _attend_tile(tile: _Tile, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of `G n d` to `G length*n d`, and the log-sum-exp `G n 1`."""
    if q.device.type == "cpu":
        # torch's own flash kernel, which keeps the scores in the innermost cache
        mask = None
        if tile.shorter:
            mask = q.new_zeros(1, len(q), 1, k.shape[1])
            for start, stop, real in tile.shorter:
                mask[:, start:stop, :, real * q.shape[1] :] = -torch.inf
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        o, lse = kernel(q[None], k[None], v[None], attn_mask=mask)
        return o[0], lse[0, ..., None]
    s = _scores(tile, q.mul_(q.shape[2] ** -0.5), k)
    top = s.amax(-1, keepdim=True)
    mass = s.sub_(top).exp_().sum(-1, keepdim=True)
    return torch.bmm(s, v).div_(mass), mass.log().add_(top)


def _forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Output `B heads T d` and log-sum-exp of the scores, rows x tokens of a block x 1."""
    n, d, queries = selection.block_tokens, q.shape[3], selection.counts.shape[2]
    q_blocks, k_blocks, v_blocks = (_Blocks(x, n) for x in (q, k, v))
    out = q.new_zeros(q.shape)
    wide = widen(q[:0]).dtype
    lse = q.new_zeros((selection.counts.numel(), n, 1), dtype=wide)
    for heads in _head_ranges(q, k):
        part = out.view(-1, *out.shape[2:])[heads.start : heads.stop]
        total = part.to(wide).view(-1, n, d)
        for tile in _tiles(selection, heads, d, lse.element_size(), 2 * TILE_PER_THREAD):
            k_tile, v_tile = (
                x.take(tile.head, tile.keys).view(len(tile.rows), -1, d) for x in (k_blocks, v_blocks)
            )
            o, here = _attend_tile(tile, q_blocks.take(tile.head, tile.query), k_tile, v_tile)
            at = tile.rows - heads.start * queries
            if tile.skip:
                before = lse[tile.rows]
                both = torch.logaddexp(before, here)
                o = o * (here - both).exp_() + total[at] * (before - both).exp_()
                here = both
            lse.index_copy_(0, tile.rows, here)
            total.index_copy_(0, at, o)
        if part.dtype != wide:
            part.copy_(total.view(part.shape))
    return out, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, selection: Selection
) -> tuple[Tensor, Tensor, Tensor]:
    """P = exp(S - lse); dV = P'dO; dS = P (dO V' - sum(dO O)); dQ = dS K; dK = dS' Q."""
    blocks = [_Blocks(x, selection.block_tokens) for x in (q, k, v, out, grad)]
    gradients = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    for heads in _head_ranges(q, k):
        _backward_heads(heads, blocks, gradients, lse, selection)
    return tuple(gradients)


def _backward_heads(
    heads: range, blocks: list[_Blocks], gradients: list[Tensor], lse: Tensor, selection: Selection
) -> None:
    """The gradients of some heads; a function of its own, so that its sums are gone before the next ones."""
    n, d = blocks[0].n, blocks[0].d
    parts = [g.view(-1, *g.shape[2:])[heads.start : heads.stop] for g in gradients]
    totals = [g.to(lse.dtype).view(-1, n, d) for g in parts]
    for tile in _tiles(selection, heads, d, lse.element_size(), TILE_PER_THREAD):
        _backward_tile(tile, blocks, totals, lse, heads.start)
    for part, total in zip(parts, totals, strict=True):
        if part.dtype != total.dtype:
            part.copy_(total.view(part.shape))


def _backward_tile(
    tile: _Tile, blocks: list[_Blocks], totals: list[Tensor], lse: Tensor, first_head: int
) -> None:
    """Adds one tile's share to the sums of dq, dk, dv."""
    q, k, v, out, grad = blocks
    dq, dk, dv = totals
    n, d, rows = q.n, q.d, len(tile.rows)
    q_tile = q.take(tile.head, tile.query).mul_(d**-0.5)
    k_tile = k.take(tile.head, tile.keys).view(rows, -1, d)
    grad_tile = grad.take(tile.head, tile.query)
    at_keys = ((tile.head - first_head) * k.per_head + tile.keys).flatten()
    p = _scores(tile, q_tile, k_tile).sub_(lse[tile.rows]).exp_()
    dv.index_add_(0, at_keys, torch.bmm(p.transpose(1, 2), grad_tile).view(-1, n, d))
    ds = torch.bmm(grad_tile, v.take(tile.head, tile.keys).view(rows, -1, d).transpose(1, 2))
    ds.sub_((grad_tile * out.take(tile.head, tile.query)).sum(-1, keepdim=True)).mul_(p)
    dk.index_add_(0, at_keys, torch.bmm(ds.transpose(1, 2), q_tile).view(-1, n, d))
    at_queries = ((tile.head - first_head) * q.per_head + tile.query).flatten()
    dq.index_add_(0, at_queries, torch.bmm(ds, k_tile).mul_(d**-0.5))
