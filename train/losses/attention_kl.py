"""KL between the block-pooled attention maps of a dense teacher and a sparse student (ours, after the block
KL of sparse-attention fine-tuning). Selection has no gradient; this trains the scores it ranks by.

    P = softmax(q.k / sqrt(d)) over the key blocks that the student may see, q and k mean-pooled per block
    L = mean over heads and query blocks of sum P_teacher (log P_teacher - log P_student)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.losses.flow_matching import per_sample

Pooled = tuple[Tensor, Tensor]  # queries and keys of one layer, `B heads blocks d`


def visible_blocks(visible: Sequence[Sequence[int]], per_chunk: int, device: torch.device) -> Tensor:
    """Which key blocks each query block may see, boolean `Q K`: `visible` names each chunk's key chunks."""
    chunks = torch.zeros(len(visible), len(visible), dtype=torch.bool, device=device)
    for chunk, seen in enumerate(visible):
        chunks[chunk, list(seen)] = True
    return chunks.repeat_interleave(per_chunk, 0).repeat_interleave(per_chunk, 1)


def log_map(pooled: Pooled, seen: Tensor) -> Tensor:
    """log P of the equation above, float32 `B heads Q K`; -inf where a pair is not seen."""
    q, k = (x.float() for x in pooled)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).log_softmax(-1)


def attention_kl(student: Sequence[Pooled], teacher: Sequence[Pooled], seen: Tensor) -> Tensor:
    """The loss per sample, `B`, mean over layers; `seen` boolean `Q K`."""
    layers = []
    for own, target in zip(student, teacher, strict=True):
        wanted, given = log_map(target, seen), log_map(own, seen)
        terms = (wanted.exp() * (wanted.masked_fill(~seen, 0) - given.masked_fill(~seen, 0))).sum(-1)
        layers.append(per_sample(terms))
    return torch.stack(layers).mean(0)
