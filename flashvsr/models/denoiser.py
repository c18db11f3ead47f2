"""One role: a DiT and the projector that feeds it, as the single module that engines wrap and call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector

if TYPE_CHECKING:
    from flashvsr.attention.plans import Plan


class Denoiser(nn.Module):
    """`forward` gives the velocity of every segment from LR videos, or from features already computed."""

    def __init__(self, dit: DiT, lr_projector: LRProjector | None = None):
        super().__init__()
        self.dit = dit
        self.lr_projector = lr_projector

    def forward(
        self,
        segments: Sequence[Tensor],
        sigma: Tensor,
        plan: Plan,
        *,
        lr: Sequence[Tensor] | None = None,
        features: Sequence[Sequence[Tensor]] | None = None,
    ) -> list[Tensor]:
        """segments: `B 16 f h w` each; sigma `B S`; exactly one of `lr` (LR videos at output size,
        `B 3 4f+1 8h 8w` in [-1,1], one per segment) and `features` (per layer, per segment)."""
        assert (lr is None) != (features is None), "give either the LR videos or their features"
        if features is None:
            features = self.features(lr)
        return self.dit(segments, sigma, plan, features)

    def features(self, lr: Sequence[Tensor]) -> list[list[Tensor]]:
        """LR videos, one per segment -> features per layer, per segment (each video starts a clip)."""
        per_segment = [self.lr_projector(video)[0] for video in lr]
        return [list(layer) for layer in zip(*per_segment, strict=True)]
