"""How a clip changes from frame to frame, beside how its HR does."""

import torch
from torch import Tensor

from eval.metrics.frames import Stack
from eval.metrics.lpips import Lpips
from eval.metrics.scoring import Frames, Metric, Values

_SHORT = "a clip of one frame has no change in time"


def neighbours(stack: Stack) -> tuple[Tensor, Tensor]:
    """Every frame with one in front of it, and that one: RGB `n 3 H W`, one fewer at the start of a clip."""
    x = stack.rgb
    if stack.before is None:
        return x[:-1], x[1:]
    first = stack.before.rgb[-1:]
    return (first if len(x) == 1 else torch.cat([first, x[:-1]])), x


def _size(x: Tensor) -> Tensor:
    """Mean |x| of each `n 3 H W` in levels of 8 bits, float64 `n`."""
    total = torch.linalg.vector_norm(x, ord=1, dim=(1, 2, 3), dtype=torch.float64)
    return total * (255 / max(1, x[:1].numel()))


def _step(stack: Stack) -> Tensor:
    """Frame minus the one in front of it, `n 3 H W`."""

    def make() -> Tensor:
        earlier, later = neighbours(stack)
        return later - earlier

    return stack.once("step", make)


def _change(stack: Stack) -> Tensor:
    return stack.once("change", lambda: _size(_step(stack)))


def _both_changes(frames: Frames) -> Tensor:
    """`n 2`: how much SR and HR change."""
    return torch.stack([_change(frames.sr), _change(frames.hr)], dim=1)


def mean_over_time(rows: Tensor) -> Values:
    """The mean over neighbouring frames where the metric is defined, saying how many are not."""
    if len(rows) == 0:
        return Values(rows, None, first=1, reason=_SHORT)
    defined = rows[~rows.isnan()]
    if len(defined) == 0:
        return Values(rows, None, first=1, reason="it is not defined for any two neighbouring frames")
    left_out = len(rows) - len(defined)
    reason = f"{left_out} of {len(rows)} pairs of frames are left out" if left_out else ""
    return Values(rows, defined.mean().item(), first=1, reason=reason)


def _ratio(rows: Tensor) -> Values:
    sr, hr = rows.reshape(-1, 2).unbind(dim=1)
    per_frame = torch.where(hr > 0, sr / hr, torch.nan)
    if len(rows) == 0:
        return Values(per_frame, None, first=1, reason=_SHORT)
    if hr.sum() == 0:
        return Values(per_frame, None, first=1, reason="the HR frames do not change")
    return Values(per_frame, (sr.sum() / hr.sum()).item(), first=1)


def _edges(change: Tensor) -> tuple[Tensor, float | None, str]:
    """Change over its mean inside chunks, the mean of that at chunk edges, the reason if there is none.

    `change[i]` is between frames i and i+1; chunk edges lie between 8c+4 and 8c+5.
    """
    edge = torch.arange(len(change)) % 8 == 4
    nothing = torch.full_like(change, torch.nan)
    if not edge.any():
        return nothing, None, f"a clip of {len(change) + 1} frames has no chunk edge: the first is at 4|5"
    inside = change[~edge].mean()
    if inside == 0:
        return nothing, None, "the frames do not change inside chunks"
    return change / inside, (change[edge].mean() / inside).item(), ""


def _edge_score(change: Tensor) -> Values:
    per_frame, clip, reason = _edges(change)
    return Values(per_frame, clip, first=1, reason=reason)


def _edge_score_to_hr(rows: Tensor) -> Values:
    (per_sr, sr, why), (per_hr, hr, why_hr) = (_edges(change) for change in rows.reshape(-1, 2).unbind(dim=1))
    if sr is None or hr is None or hr == 0:
        reason = why or (f"HR: {why_hr}" if why_hr else "HR does not change at chunk edges")
        return Values(torch.full_like(per_sr, torch.nan), None, first=1, reason=reason)
    return Values(torch.where(per_hr > 0, per_sr / per_hr, torch.nan), sr / hr, first=1)


TDIFF = Metric(
    key="tdiff",
    title="t-diff",
    higher=False,
    digits=3,
    description="temporal difference error v1: mean |change of SR - change of HR| from frame to frame, RGB, "
    "levels of 8 bits",
    measure=lambda frames: _size(_step(frames.sr) - _step(frames.hr)),
    gather=mean_over_time,
)

TDIFF_RATIO = Metric(
    key="tdiff_ratio",
    title="t-change to HR",
    higher=None,
    ideal=1.0,
    digits=3,
    description="temporal change relative to HR v1: mean |change of SR| over mean |change of HR|, RGB; "
    "above 1 flickers, below 1 is smoother than HR",
    measure=_both_changes,
    gather=_ratio,
)

CHUNK_EDGE = Metric(
    key="chunk_edge",
    title="chunk edge",
    higher=None,
    ideal=1.0,
    digits=3,
    description="chunk-edge score v1: mean |change| between frames 8c+4 and 8c+5 over its mean between all "
    "other neighbours, RGB; 1 shows no seam",
    measure=lambda frames: _change(frames.sr),
    gather=_edge_score,
    needs_gt=False,
)

CHUNK_EDGE_RATIO = Metric(
    key="chunk_edge_ratio",
    title="chunk edge to HR",
    higher=None,
    ideal=1.0,
    digits=3,
    description="chunk-edge score of SR over that of HR v1",
    measure=_both_changes,
    gather=_edge_score_to_hr,
)


def tlpips_metric(lpips: Lpips) -> Metric:
    """tLPIPS (Chu et al. 2020, there times 100): how far the perceptual change in time is from HR's."""

    def change(stack: Stack) -> Tensor:
        features = lpips.of_stack(stack)
        if stack.before is None:
            return lpips.distance([f[:-1] for f in features], [f[1:] for f in features])
        before = [f[-1:] for f in lpips.of_stack(stack.before)]
        earlier = [torch.cat([b, f[:-1]]) for b, f in zip(before, features, strict=True)]
        return lpips.distance(earlier, features)

    return Metric(
        key="t" + lpips.name,
        title="tLPIPS" if lpips.name == "lpips" else "tLPIPS-random",
        higher=False,
        digits=4,
        description=f"tLPIPS v1: mean |LPIPS of neighbouring SR frames - that of HR|, {lpips.description}",
        measure=lambda frames: (change(frames.sr).double() - change(frames.hr).double()).abs(),
        gather=mean_over_time,
    )
