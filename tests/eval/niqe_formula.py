"""NIQE a second time, by scipy and plain loops, and the photographs it is compared on."""

import warnings

import numpy as np
import torch
from scipy import ndimage, special

from flashvsr.base.resize import bicubic_8bit


def photographs() -> dict[str, np.ndarray]:
    """Three photographs of scikit-image, as they are, enlarged from a quarter, and between black bars."""
    import skimage.data

    found = {}
    for name in ("astronaut", "coffee", "chelsea"):
        photo = np.ascontiguousarray(getattr(skimage.data, name)())
        height, width = photo.shape[:2]
        x = torch.from_numpy(photo).movedim(-1, 0)
        bars = photo.copy()
        bars[: height // 8], bars[-(height // 8) :] = 0, 0
        quarter = bicubic_8bit(bicubic_8bit(x, (height // 4, width // 4)), (height, width))
        found |= {name: photo, f"{name}/4x": quarter.movedim(0, -1).numpy(), f"{name}/bars": bars}
    return found


def formula_niqe(frame: np.ndarray) -> float:
    """NIQE by scipy and plain loops, after the paper and the authors' MATLAB code."""
    from eval.metrics import niqe

    luma = (frame.astype(np.float64) @ np.array([0.299, 0.587, 0.114])).round()
    luma = luma[: luma.shape[0] // 96 * 96, : luma.shape[1] // 96 * 96]
    columns = []
    for side in (96, 48):
        taps = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
        window = np.outer(taps, taps) / taps.sum() ** 2
        mean = ndimage.correlate(luma, window, mode="nearest")
        deviation = np.sqrt(np.abs(ndimage.correlate(luma**2, window, mode="nearest") - mean**2))
        x = (luma - mean) / (deviation + 1)
        tops = [(i, j) for i in range(0, x.shape[0], side) for j in range(0, x.shape[1], side)]
        columns.append([niqe_block(x[i : i + side, j : j + side]) for i, j in tops])
        luma = matlab_half(luma)
    features = np.concatenate(columns, axis=1)
    pristine = np.load(niqe.__file__.replace("niqe.py", "niqe.npz"))
    whole = features[~np.isnan(features).any(axis=1)]
    gap = np.nanmean(features, axis=0) - pristine["mean"]
    return np.sqrt(gap @ np.linalg.pinv((np.cov(whole, rowvar=False) + pristine["covariance"]) / 2) @ gap)


def niqe_block(x: np.ndarray) -> list[float]:
    shape, left, right = gaussian_fit(x)
    numbers = [shape, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        shape, left, right = gaussian_fit(x * np.roll(x, shift, axis=(0, 1)))
        mean = (right - left) * special.gamma(2 / shape) / special.gamma(1 / shape)
        numbers += [shape, mean, left, right]
    return numbers


def gaussian_fit(x: np.ndarray) -> tuple[float, float, float]:
    shapes = np.arange(0.2, 10.001, 0.001)
    table = special.gamma(2 / shapes) ** 2 / (special.gamma(1 / shapes) * special.gamma(3 / shapes))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left, right = np.sqrt(np.mean(x[x < 0] ** 2)), np.sqrt(np.mean(x[x > 0] ** 2))
        skew, ratio = left / right, np.mean(np.abs(x)) ** 2 / np.mean(x**2)
    ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = shapes[np.argmin((table - ratio) ** 2)]
    scale = np.sqrt(special.gamma(1 / shape) / special.gamma(3 / shape))
    return shape, left * scale, right * scale


def matlab_half(x: np.ndarray) -> np.ndarray:
    """imresize(x, .5): each output pixel from eight, weighted by the stretched bicubic kernel."""
    for axis in (0, 1):
        x = np.moveaxis(x, axis, 0)
        padded = np.pad(x, ((4, 4), (0, 0)), mode="symmetric")
        out = np.zeros((len(x) // 2, x.shape[1]))
        for i in range(len(out)):
            for k in range(8):
                t = abs(k - 3.5) / 2
                near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
                out[i] += padded[2 * i + k + 1] * (near if t <= 1 else far) / 2
        x = np.moveaxis(out, 0, axis)
    return x
