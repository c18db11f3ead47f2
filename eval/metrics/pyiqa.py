"""Learned metrics of the package pyiqa, where a user has installed it.

pyiqa's licence (PolyForm Noncommercial, parts S-Lab) does not fit a dependency of this project: it is never
installed by an extra, and imported only when one of its metrics is named. It finds or downloads its weights
itself.
"""

from importlib.metadata import version
from importlib.util import find_spec

import torch

from eval.metrics.scoring import Frames, Metric
from flashvsr.base.cli import UserError
from flashvsr.base.operators import declare_torchvision

# Our name, which is pyiqa's too: title and decimals. The weights are pyiqa's defaults of that name.
PYIQA = {"musiq": ("MUSIQ", 2), "clipiqa": ("CLIPIQA", 4), "maniqa": ("MANIQA", 4), "dists": ("DISTS", 4)}


def pyiqa_metric(name: str, device: str | torch.device = "cpu") -> Metric:
    """One of `PYIQA`. Raises UserError when the package is not installed or cannot get its weights."""
    if find_spec("pyiqa") is None:
        raise UserError(
            f"{name} needs the package pyiqa, whose licence allows non-commercial use only: "
            "pip install -c constraints.txt pyiqa"
        )
    declare_torchvision()
    import pyiqa

    try:
        model = pyiqa.create_metric(name, device=torch.device(device))
    except OSError as error:
        raise UserError(f"pyiqa cannot get the weights of {name}: {error}") from error
    compares = model.metric_mode == "FR"

    def measure(frames: Frames) -> torch.Tensor:
        clips = (frames.sr.rgb, frames.hr.rgb) if compares else (frames.sr.rgb,)
        return model(*clips).detach().reshape(-1).double()

    title, digits = PYIQA[name]
    return Metric(
        key=name,
        title=title,
        higher=not model.lower_better,
        digits=digits,
        description=f"{title}: pyiqa {version('pyiqa')} {name}, its default weights, RGB, mean over frames",
        measure=measure,
        needs_gt=compares,
    )
