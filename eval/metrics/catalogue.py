"""Metrics by name: the only place that knows them all."""

from collections.abc import Iterable
from pathlib import Path

import torch

from eval.metrics.dover import dover_metrics
from eval.metrics.flow import LUCAS_KANADE, Flow, raft
from eval.metrics.lpips import Lpips, lpips_metric
from eval.metrics.niqe import NIQE
from eval.metrics.psnr import PSNR, PSNR_Y
from eval.metrics.pyiqa import PYIQA, pyiqa_metric
from eval.metrics.scoring import Suite
from eval.metrics.ssim import SSIM, SSIM_Y
from eval.metrics.temporal import CHUNK_EDGE, CHUNK_EDGE_RATIO, TDIFF, TDIFF_RATIO, tlpips_metric
from eval.metrics.warping import warping_metrics
from flashvsr.base.cli import UserError

_PLAIN = {
    metric.key: metric
    for metric in (PSNR, PSNR_Y, SSIM, SSIM_Y, NIQE, TDIFF, TDIFF_RATIO, CHUNK_EDGE, CHUNK_EDGE_RATIO)
}
_BY_LPIPS = {"lpips": lpips_metric, "tlpips": tlpips_metric}
_BY_FLOW = ("ewarp", "ewarp_delta")
_BY_DOVER = ("dover_technical", "dover_overall")
NAMES = (*_PLAIN, *_BY_LPIPS, *_BY_FLOW, *PYIQA, *_BY_DOVER)


def metrics_for(
    names: Iterable[str],
    *,
    crop: int = 0,
    device: str | torch.device = "cpu",
    lpips: Lpips | None = None,
    flow: str | Flow = "lk",
    dover: str | Path | None = None,
) -> Suite:
    """The metrics of these names (`NAMES`), in this order, on `device`, after cropping `crop` pixels off each
    side. `lpips` is a network already there; without it one is built as `Lpips()` when a name needs it.
    `flow` is what the warping errors follow motion by: "lk", "raft" or one's own. `dover` is DOVER's file.

    A key of the result may say more than its name: "lpips" without weights gives `lpips-random`, "ewarp"
    gives `ewarp-lk`.
    Raises UserError for an unknown or repeated name, a negative crop, a missing package or missing weights.
    """
    names = list(names)
    if crop < 0:
        raise UserError(f"a border crop is 0 or more pixels, not {crop}")
    if len(set(names)) < len(names):
        raise UserError(f"a metric is named twice in {', '.join(names)}")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise UserError(f"unknown metric {unknown[0]!r}; known are {', '.join(NAMES)}")
    if lpips is None and not _BY_LPIPS.keys().isdisjoint(names):
        lpips = Lpips()
    if lpips is not None:
        lpips = lpips.to(device)
    known = dict(_PLAIN)
    known |= {name: _BY_LPIPS[name](lpips) for name in names if name in _BY_LPIPS}
    known |= {name: pyiqa_metric(name, device) for name in names if name in PYIQA}
    if not set(_BY_FLOW).isdisjoint(names):
        known |= zip(_BY_FLOW, warping_metrics(_flow(flow, device)), strict=True)
    if not set(_BY_DOVER).isdisjoint(names):
        if dover is None:
            raise UserError("DOVER's metrics need its weights: say which file")
        known |= zip(_BY_DOVER, dover_metrics(dover, device), strict=True)
    return Suite(tuple(known[name] for name in names), crop, device)


def _flow(flow: str | Flow, device: str | torch.device) -> Flow:
    if isinstance(flow, Flow):
        return flow
    if flow not in ("lk", "raft"):
        raise UserError(f"a flow is lk or raft, not {flow!r}")
    return LUCAS_KANADE if flow == "lk" else raft(device)
