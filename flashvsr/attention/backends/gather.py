"""Plain torch: gathers the selected key blocks of each query block, so that cost follows density.

Rows (one per batch entry, head and query block) are sorted by their number of keys and handled in groups of
similar length; within a group shorter rows are padded and masked. Works forward and backward everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvsr.attention.selection import Selection

PADDING = 1.25  # longest over shortest row within a group
GROUP_BYTES = 64 * 2**20  # gathered keys and values of one group


def _groups(counts: list[int], bytes_per_key: int) -> list[tuple[int, int]]:
    """Ranges over ascending `counts`, each within the padding and the memory bound; empty rows left out."""
    ranges, start = [], 0
    while start < len(counts) and counts[start] == 0:
        start += 1
    while start < len(counts):
        stop = start + 1
        while (
            stop < len(counts)
            and counts[stop] <= counts[start] * PADDING + 1
            and counts[stop] * (stop + 1 - start) * bytes_per_key <= GROUP_BYTES
        ):
            stop += 1
        ranges.append((start, stop))
        start = stop
    return ranges


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, block_tokens: int) -> str | None:
    """Runs everywhere."""
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    """See `sparse_attention`."""
    batch, heads, tokens, d = q.shape
    n, key_blocks = selection.block_tokens, selection.key_blocks
    q_rows = q.reshape(-1, n, d)
    k_rows, v_rows = (x.reshape(-1, n * d) for x in (k, v))
    counts = selection.counts.flatten().long()
    first_column = counts.cumsum(0) - counts
    order = counts.argsort(stable=True)
    sorted_counts = counts[order].tolist()
    first_key_row = torch.arange(batch * heads, device=q.device).repeat_interleave(tokens // n) * key_blocks

    outputs, done = [], []
    for start, stop in _groups(sorted_counts, 2 * n * d * k.element_size()):
        rows, longest = order[start:stop], sorted_counts[stop - 1]
        position = torch.arange(longest, device=q.device)
        real = position < counts[rows, None]
        column = (first_column[rows, None] + position).clamp(max=selection.columns.numel() - 1)
        key_row = (first_key_row[rows, None] + selection.columns[column].long()).flatten()
        keys = k_rows.index_select(0, key_row).view(len(rows), longest * n, d)
        values = v_rows.index_select(0, key_row).view(len(rows), longest * n, d)
        mask = None
        if sorted_counts[start] != longest:
            mask = real.repeat_interleave(n, 1)[:, None]
            # a padded column may point into another row: keep its index legal, the mask hides it
        out = F.scaled_dot_product_attention(q_rows[rows], keys, values, attn_mask=mask)
        outputs.append(out)
        done.append(rows)
    if not outputs:
        return q * 0
    result = q.new_zeros(q_rows.shape).index_copy(0, torch.cat(done), torch.cat(outputs).to(q.dtype))
    return result.view(q.shape)
