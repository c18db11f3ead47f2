"""Our NIQE beside pyiqa's, in an environment that has pyiqa: `python -m tests.eval.pyiqa_niqe VIDEO...`

Three frames of every video and three photographs of scikit-image, each as it is, enlarged from a quarter,
between black bars and beside a flat grey side. pyiqa is given the model of photographs that ours uses.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from eval.metrics import metrics_for
from eval.metrics.niqe import _photographs
from flashvsr.base.operators import declare_torchvision
from flashvsr.base.resize import bicubic_8bit
from flashvsr.base.video_io import read_frames


def pictures(videos: list[Path]) -> dict[str, np.ndarray]:
    import skimage.data

    found = {name: getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea")}
    for path in videos:
        for i, frame in zip(range(41), read_frames(path), strict=False):
            if i % 20 == 0:
                found[f"{path.stem} {i}"] = frame
    return {name: np.ascontiguousarray(picture) for name, picture in found.items()}


def variants(picture: np.ndarray) -> dict[str, np.ndarray]:
    height, width = picture.shape[:2]
    x = torch.from_numpy(picture).movedim(-1, 0)
    quarter = bicubic_8bit(bicubic_8bit(x, (height // 4, width // 4)), (height, width)).movedim(0, -1)
    bars, side = picture.copy(), picture.copy()
    bars[: height // 8], bars[-(height // 8) :] = 0, 0
    side[:, :200] = 118
    return {"": picture, "/4x": quarter.numpy(), "/bars": bars, "/grey side": side}


def pyiqa_niqe():
    declare_torchvision()
    from pyiqa.archs.niqe_arch import NIQE
    from scipy.io import savemat

    mean, covariance = _photographs()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.mat"
        savemat(file, {"mu_prisparam": mean.numpy()[None], "cov_prisparam": covariance.numpy()})
        return NIQE(pretrained_model_path=str(file))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.eval.pyiqa_niqe", description=__doc__)
    parser.add_argument("videos", nargs="*", type=Path)
    theirs, suite, gaps = pyiqa_niqe(), metrics_for(["niqe"]), {}
    for name, picture in pictures(parser.parse_args().videos).items():
        for variant, frame in variants(picture).items():
            clip = suite.start()
            clip.push(frame[None])
            ours = clip.finish()["niqe"].clip
            other = theirs(torch.from_numpy(frame).movedim(-1, 0)[None].float() / 255).item()
            gap = abs(ours / other - 1)
            gaps.setdefault(variant or "as they are", []).append(gap)
            print(f"{name + variant:28s} pyiqa {other:.12f}  ours {ours:.12f}  {gap:.1e}", flush=True)
    for variant, values in gaps.items():
        print(f"{variant:14s} {len(values)} frames: mean {np.mean(values):.1e}, largest {max(values):.1e}")


if __name__ == "__main__":
    main()
