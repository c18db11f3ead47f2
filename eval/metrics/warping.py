"""Warping error: what is left of the change from frame to frame once motion is taken out (Lai et al. 2018).

A blurred clip has a small one, so the difference from HR's own stands beside it: below 0 SR is smoother in
time than the original, above 0 it flickers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.metrics.flow import Flow, warp
from eval.metrics.frames import Stack
from eval.metrics.scoring import Frames, Metric
from eval.metrics.temporal import mean_over_time, neighbours
from flashvsr.base.cli import UserError


def warping_metrics(flow: Flow) -> tuple[Metric, Metric]:
    """E_warp of SR, and E_warp of SR minus that of HR, both on the flow of HR; they share one computation.

    Without GT the first takes its flow from the LQ frames, enlarged by bicubic.
    """

    def errors(frames: Frames, name: str) -> Tensor:
        guide = frames.hr or frames.lq
        if guide is None:
            raise UserError("ewarp takes motion from the GT frames or, without GT, from the LQ frames")
        field, seen = guide.once(f"flow {flow.name}", lambda: _motion(flow, guide))
        stack: Stack = getattr(frames, name)
        return stack.once(f"ewarp {flow.name}", lambda: _errors(stack, field, seen))

    protocol = (
        "v1: 1000 x mean squared difference of a frame and the next one warped to it, RGB in [0, 1], without "
        f"occlusions and motion boundaries, flow of HR (without GT of LQ): {flow.description}"
    )
    return (
        Metric(
            key=f"ewarp-{flow.name}",
            title=f"E_warp ({flow.name}) x1000",
            higher=False,
            digits=3,
            description=f"E_warp {protocol}",
            measure=lambda frames: errors(frames, "sr"),
            gather=mean_over_time,
            needs_gt=False,
        ),
        Metric(
            key=f"ewarp_delta-{flow.name}",
            title=f"ΔE_warp ({flow.name}) x1000",
            higher=None,
            ideal=0.0,
            digits=3,
            description=f"E_warp of SR minus E_warp of HR; E_warp {protocol}",
            measure=lambda frames: errors(frames, "sr") - errors(frames, "hr"),
            gather=mean_over_time,
        ),
    )


def _motion(flow: Flow, guide: Stack) -> tuple[Tensor, Tensor]:
    """The field from every frame to the next, `n 2 H W`, and where it can be trusted, bool `n H W`."""
    earlier, later = neighbours(guide)
    if len(earlier) == 0:
        return earlier[:, :2], earlier[:, 0].bool()
    forward, backward = flow.between(earlier, later), flow.between(later, earlier)
    return forward, trusted(forward, backward)


def trusted(forward: Tensor, backward: Tensor) -> Tensor:
    """Where a pixel of the first frame is seen in the second and does not lie at a motion boundary, `n H W`.

    The tests of Sundaram, Brox, Keutzer 2010, as Lai et al. use them: forward and backward flow must cancel
    to within .01 of their squares + .5, and the flow's squared slope stay under .01 of its square + .002.
    What moves out of the frame is not seen either.
    """
    back = warp(backward, forward)
    square = forward.square().sum(1)
    seen = (forward + back).square().sum(1) <= 0.01 * (square + back.square().sum(1)) + 0.5
    slope = F.pad(forward.diff(dim=3), (0, 1)).square() + F.pad(forward.diff(dim=2), (0, 0, 0, 1)).square()
    seen &= slope.sum(1) <= 0.01 * square + 0.002
    height, width = forward.shape[2:]
    x = forward[:, 0] + torch.arange(width, device=forward.device)
    y = forward[:, 1] + torch.arange(height, device=forward.device)[:, None]
    return seen & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def _errors(stack: Stack, field: Tensor, seen: Tensor) -> Tensor:
    """E_warp between neighbouring frames, float64 `n`; nan where no pixel is seen in both."""
    earlier, later = neighbours(stack)
    if len(earlier) == 0:
        return earlier.new_zeros(0, dtype=torch.float64)
    square = (warp(later, field) - earlier).square_().mean(1)
    return 1000 * (square * seen).sum(dim=(1, 2), dtype=torch.float64) / seen.sum(dim=(1, 2))
