"""A plan that notes what it chose beside what another run chose, and goes on with the other's choice.

Two computations of one selection agree up to pairs at the threshold itself: one flipped tie changes all that
comes after it. So masks are compared first, pairs within `TIE` of the threshold are told apart from real
differences, and what follows is computed with the other's mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flashvsr.attention.plans import CachedStreaming, SparseCausal
from flashvsr.attention.selection import Selection, budget, pool

TIE = 1e-6  # relative distance of P from the threshold
Key = tuple[int, int]  # layer, chunk from the start of the clip


@dataclass(frozen=True)
class Choice:
    """What one query chunk chose in one layer; keys are the blocks of `visible`, in time order."""

    visible: list[int]
    mask: Tensor  # boolean `B heads s K`
    p: Tensor  # float64, alike
    kept: int | None  # the k of the rule: P > the (k+1)-th largest stays; None: no selection

    @property
    def distance(self) -> Tensor:
        """How far P lies from the threshold, relative to it: `B heads s K`, infinite without threshold."""
        if self.kept is None or self.kept >= self.p[0, 0].numel():
            return torch.full_like(self.p, torch.inf)
        threshold = self.p.flatten(-2).topk(self.kept + 1, -1).values[..., -1, None, None]
        return (self.p - threshold).abs() / threshold

    @property
    def margin(self) -> float:
        """The relative gap between the last pair kept and the first one dropped."""
        return self.distance.masked_fill(~self.mask, torch.inf).min().item()

    def alternatives(self) -> list[Tensor]:
        """Other masks that rounding may give when the margin is a tie: the last pair kept for the first one
        dropped, and neither."""
        fall = self.p.flatten(-2).argsort(-1, descending=True)
        last, first = fall[..., self.kept - 1, None], fall[..., self.kept, None]
        tied = self.distance.flatten(-2).gather(-1, last) <= TIE
        neither = self.mask.flatten(-2).clone()
        neither.scatter_(-1, last, neither.gather(-1, last) & ~tied)
        swapped = neither.scatter(-1, first, tied)
        return [m.unflatten(-1, self.mask.shape[-2:]) for m in (swapped, neither)]


@dataclass(frozen=True)
class Difference:
    """Pairs that differ beyond ties, ties, and the largest distance from the threshold among all of them."""

    wrong: int = 0
    ties: int = 0
    worst: float = 0.0

    def __add__(self, other: Difference) -> Difference:
        return Difference(self.wrong + other.wrong, self.ties + other.ties, max(self.worst, other.worst))

    @classmethod
    def between(cls, choice: Choice, mask: Tensor) -> Difference:
        differ = choice.mask != mask
        if not differ.any():
            return cls()
        distance = choice.distance[differ]
        ties = int((distance <= TIE).sum())
        return cls(int(differ.sum()) - ties, ties, distance.max().item())


class Watched:
    """Wraps a sparse plan. After the forward: `choices` per (layer, chunk), `used`, the masks it went on with
    (the given one's where there is one), and `differences` from what was given."""

    def __init__(self, plan: CachedStreaming | SparseCausal, given: Mapping[Key, Tensor] | None = None):
        self.plan, self.given = plan, given or {}
        self.rope, self.pack, self.unpack, self.spread = plan.rope, plan.pack, plan.unpack, plan.spread
        streaming = isinstance(plan, CachedStreaming)
        self.chunks = plan.chunks if streaming else list(range(len(plan.visible)))
        self.choices: dict[Key, Choice] = {}
        self.used: dict[Key, Tensor] = {}
        self.differences: dict[Key, Difference] = {}

    @property
    def total(self) -> Difference:
        return sum(self.differences.values(), Difference())

    def _visible(self, i: int) -> list[int]:
        if isinstance(self.plan, CachedStreaming):
            return [*self.plan.ring.chunks, *self.plan.chunks]
        return self.plan.visible[i]

    def _columns(self, chunk: int) -> Tensor:
        """Key blocks of a chunk, as the selection counts them."""
        s = self.plan.per_chunk
        slot = self.plan.ring.slot(chunk) if isinstance(self.plan, CachedStreaming) else chunk
        return torch.arange(slot * s, (slot + 1) * s)

    def _choice(self, layer: int, i: int, q: Tensor, keys: Tensor, mask: Tensor) -> Choice:
        plan, s = self.plan, self.plan.per_chunk
        visible = self._visible(i)
        columns = torch.cat([self._columns(c) for c in visible])
        scores = q[:, :, i * s : (i + 1) * s] @ keys[:, :, columns].transpose(-1, -2) / q.shape[-1] ** 0.5
        if plan.local is not None:
            scores = scores.masked_fill(~plan.local.repeat(1, len(visible)), -torch.inf)
        kept = None if plan.ratio is None else budget(s, s * len(columns), plan.ratio)
        return Choice(visible, mask[:, :, i * s : (i + 1) * s][..., columns], scores.softmax(-1), kept)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan, s = self.plan, self.plan.per_chunk
        out = plan.attend(layer, q, k, v)
        own = plan.selections[layer].mask()
        pooled_q = pool(q.transpose(1, 2), plan.block_tokens).double()
        if isinstance(plan, CachedStreaming):
            keys = plan.ring.pooled[layer].double()
        else:
            keys = pool(k.transpose(1, 2), plan.block_tokens).double()
        forced = own.clone()
        for i, chunk in enumerate(self.chunks):
            choice = self._choice(layer, i, pooled_q, keys, own)
            self.choices[layer, chunk] = choice
            mask = self.given.get((layer, chunk), choice.mask)
            self.used[layer, chunk] = mask
            self.differences[layer, chunk] = Difference.between(choice, mask)
            rows, columns = slice(i * s, (i + 1) * s), torch.cat([self._columns(c) for c in choice.visible])
            forced[:, :, rows, columns] = mask
        if torch.equal(forced, own):
            return out
        plan.selections[layer] = Selection.from_mask(forced, plan.block_tokens)
        return plan.attend(layer, q, k, v)
