"""Which key blocks each query block attends to.

Queries and keys are mean-pooled per block; per head, P = softmax(q.k / sqrt(d)) over the blocks of all
visible chunks, locally forbidden pairs at 0; then per head and query chunk, over its n pairs (s^2 times the
visible chunks, counted before locality), the pairs above the (k+1)-th largest P stay,
k = max(1, min(int(s*s*ratio) - 1, n - 1)). One budget for a whole chunk: rows differ in length and may
be empty. No gradient passes. Source: released code; DESIGN section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from flashvsr.models.norm import widen


@dataclass(frozen=True)
class Selection:
    """Chosen key blocks in compressed rows; a row is one batch entry, head and query block, in that order.

    counts: int32 `B heads Q`, key blocks per query block (0 allowed); columns: flat key block indices, row
    after row, in any order within a row, int16 (int32 from 32,768 key blocks on); key_blocks: how many there
    are to choose from; block_tokens: tokens in a block.

    `columns` may be longer than the rows together: entries from `offsets[-1]` on mean nothing, so that no
    length has to be fetched from the device. Derived forms are computed once, on the device, without waiting
    for it.
    """

    counts: Tensor
    columns: Tensor
    key_blocks: int
    block_tokens: int

    @classmethod
    def from_mask(cls, mask: Tensor, block_tokens: int) -> Selection:
        """From a boolean `B heads Q K`."""
        columns = mask.nonzero()[:, -1].to(column_dtype(mask.shape[-1]))
        return cls(mask.sum(-1, dtype=torch.int32), columns, mask.shape[-1], block_tokens)

    @cached_property
    def offsets(self) -> Tensor:
        """Where each row begins in `columns`, and at last the end of all: int32 `B*heads*Q + 1`."""
        ends = self.counts.flatten().cumsum(0, dtype=torch.int32)
        return torch.cat([ends.new_zeros(1), ends])

    @cached_property
    def rows(self) -> Tensor:
        """The row of each entry of `columns`, int32; `B*heads*Q` for those that mean nothing."""
        entry = torch.arange(self.columns.numel(), dtype=torch.int32, device=self.columns.device)
        return torch.searchsorted(self.offsets[1:], entry, right=True, out_int32=True)

    @cached_property
    def _transposed(self) -> Selection:
        b, heads, queries = self.counts.shape
        pairs = b * heads * self.key_blocks
        unused = self.rows == self.counts.numel()
        by_key = self.rows // queries * self.key_blocks + self.columns.int()
        by_key, order = by_key.masked_fill_(unused, pairs).sort(stable=True)
        query = (self.rows % queries)[order].to(column_dtype(queries))
        starts = torch.searchsorted(
            by_key, torch.arange(pairs + 1, dtype=torch.int32, device=by_key.device), out_int32=True
        )
        counts = starts.diff().view(b, heads, self.key_blocks)
        return Selection(counts, query, queries, self.block_tokens)

    def transposed(self) -> Selection:
        """Per key block the query blocks that chose it, ascending: counts `B heads K`, `key_blocks` = Q."""
        return self._transposed

    def mask(self) -> Tensor:
        """As a boolean `B heads Q K`."""
        rows = self.counts.numel()
        mask = torch.zeros(rows + 1, self.key_blocks, dtype=torch.bool, device=self.counts.device)
        columns = self.columns.long().masked_fill(self.rows == rows, 0)
        mask[self.rows.long(), columns] = True
        return mask[:rows].unflatten(0, self.counts.shape)

    @property
    def density(self) -> float:
        """Chosen pairs over all pairs."""
        return self.counts.sum().item() / (self.counts.numel() * self.key_blocks)

    @property
    def most(self) -> float:
        """The most that `density` can be; known without asking the device."""
        return self.columns.numel() / (self.counts.numel() * self.key_blocks)


def column_dtype(blocks: int) -> torch.dtype:
    """The narrowest integer that holds the index of one of `blocks`."""
    return torch.int16 if blocks <= 2**15 else torch.int32


def pool(x: Tensor, block_tokens: int) -> Tensor:
    """Mean over each block: `B heads T d` -> `B heads T/block_tokens d`, at least float32."""
    return widen(x).unflatten(2, (-1, block_tokens)).mean(3)


def local_window(rows: int, columns: int, size: int, boundary: str = "truncated") -> Tensor:
    """Which blocks of a `rows x columns` grid see which: boolean `rows*columns rows*columns`.

    Block row r sees r - size//2 ... r - size//2 + size - 1, columns alike: clipped at the border
    ("truncated", as the release) or shifted inside ("preserved").
    """

    def axis(n: int) -> Tensor:
        first = torch.arange(n) - size // 2
        if boundary == "preserved":
            first = first.clamp(0, max(n - size, 0))
        offset = torch.arange(n)[None] - first[:, None]
        return (offset >= 0) & (offset < size)

    both = axis(rows)[:, None, :, None] & axis(columns)[None, :, None, :]
    return both.reshape(rows * columns, rows * columns)


def causal_chunks(chunks: int, window: int, *, image_last: bool = False) -> Tensor:
    """Which chunks see which, boolean `chunks chunks`: chunk i sees i - window + 1 ... i, and the first
    three see each other fully, whatever the window. `image_last` isolates the last chunk (an image)."""
    i = torch.arange(chunks)
    seen = (i[None] <= i[:, None]) & (i[None] > i[:, None] - window)
    seen[:3, :3] = True
    if image_last:
        seen[-1], seen[:, -1] = False, False
        seen[-1, -1] = True
    return seen


def budget(per_chunk: int, pairs: int, ratio: float) -> int:
    """k of the rule above, for `per_chunk` = s blocks in a chunk and `pairs` = n."""
    return max(1, min(int(per_chunk * per_chunk * ratio) - 1, pairs - 1))


@torch.no_grad()
def choose(
    q: Tensor, k: Tensor, *, per_chunk: int, ratio: float | None, local: Tensor | None = None
) -> Tensor:
    """The pairs kept by one query chunk: boolean `... s K`.

    q: pooled queries of the chunk `... s d`; k: pooled keys of all visible chunks `... K d`, time order;
    local: allowed pairs `s s`, the same for every visible chunk; ratio None keeps every legal pair.
    """
    keys = k.shape[-2]
    legal = None if local is None else local.repeat(1, keys // per_chunk)
    if ratio is None:
        everything = torch.ones(*q.shape[:-1], keys, dtype=torch.bool, device=q.device)
        return everything if legal is None else everything & legal
    with torch.autocast(q.device.type, enabled=False):
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if legal is not None:
        scores = scores.masked_fill_(~legal, -torch.inf)
    p = scores.softmax(-1)
    flat = p.flatten(-2)
    keep = budget(per_chunk, flat.shape[-1], ratio)
    if keep >= flat.shape[-1]:
        return p > 0
    # the (keep + 1)-th largest: found by selection, nothing is sorted
    threshold = flat.topk(keep + 1, dim=-1, sorted=False).values.amin(-1)
    return p > threshold[..., None, None]


@torch.no_grad()
def select(
    q: Tensor,
    key_chunks: Callable[[Sequence[int]], Tensor],
    visible: Sequence[Sequence[int]],
    columns_of: Sequence[int] | Mapping[int, int],
    *,
    key_blocks: int,
    per_chunk: int,
    block_tokens: int,
    ratio: float | None,
    local: Tensor | None = None,
    allowed: int | None = None,
) -> Selection:
    """Chooses for every query chunk; on a GPU without waiting for it (with `local` if `allowed` is given).

    q: pooled queries `B heads (chunks s) d`; visible: per query chunk, the visible key chunks in time
    order; `key_chunks(list)` gives their pooled keys; `columns_of[chunk]` is the first key block of a
    chunk in the key tensor handed to attention (a ring need not be in time order); allowed: how many pairs
    `local` allows.
    """
    b, heads, blocks, _ = q.shape
    q = q.unflatten(2, (-1, per_chunk))
    within = torch.arange(per_chunk, device=q.device)
    kept, columns, at = [], [], 0
    for _, run in groupby(visible, len):  # chunks that see equally many go together
        sets = list(run)
        if all(chunks == sets[0] for chunks in sets):
            keys = key_chunks(sets[0])[:, :, None]
        else:
            keys = torch.stack([key_chunks(chunks) for chunks in sets], 2)
        part = q[:, :, at : at + len(sets)]
        kept.append(choose(part, keys, per_chunk=per_chunk, ratio=ratio, local=local))
        first = torch.tensor([[columns_of[c] for c in chunks] for chunks in sets], device=q.device)
        columns.append((first[..., None] + within).flatten(1))
        at += len(sets)
    if allowed is None:
        allowed = per_chunk * per_chunk if local is None else int(local.sum())
    most = [allowed * len(chunks) for chunks in visible]
    if ratio is not None:
        budgets = [budget(per_chunk, per_chunk * per_chunk * len(chunks), ratio) for chunks in visible]
        most = [min(pair) for pair in zip(most, budgets, strict=True)]
    return _compress(kept, columns, b * heads * sum(most), key_blocks, block_tokens)


def _compress(
    kept: list[Tensor], columns: list[Tensor], most: int, key_blocks: int, block_tokens: int
) -> Selection:
    """Compressed rows of runs of query chunks: `kept` boolean `B heads chunks s K`, `columns` the key block
    of each of the K, `chunks K`; altogether at most `most` pairs are kept."""
    inside = [mask.cumsum(-1, dtype=torch.int32) for mask in kept]
    counts = torch.cat([x[..., -1].flatten(2) for x in inside], 2)
    before = (counts.flatten().cumsum(0) - counts.flatten()).view(counts.shape)
    # one entry more, where all that is not kept goes
    flat = torch.zeros(most + 1, dtype=column_dtype(key_blocks), device=counts.device)
    at = 0
    for mask, x, column in zip(kept, inside, columns, strict=True):
        rows = mask.shape[2] * mask.shape[3]
        first = before[:, :, at : at + rows].view(*mask.shape[:-1], 1)
        position = (first + x - 1).masked_fill_(~mask, most)
        flat.scatter_(0, position.flatten(), column[:, None].to(flat.dtype).expand(mask.shape).flatten())
        at += rows
    return Selection(counts, flat[:most], key_blocks, block_tokens)
