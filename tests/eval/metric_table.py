"""Every metric beside an implementation that is not ours; `python -m tests.eval.metric_table` prints them.

The tests in `test_metric_oracles` hold the same rows to their tolerances.
"""

import argparse
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage

from eval.metrics import Lpips, metrics_for
from eval.metrics.flow import Flow, lucas_kanade, warp
from eval.metrics.lpips import import_lpips
from eval.metrics.warping import trusted
from flashvsr.base.measure import interleaved, machine
from flashvsr.base.resize import bicubic_8bit
from tests.eval.niqe_formula import formula_niqe, photographs

FRAMES = 14  # enough for two chunk edges, 4|5 and 12|13


@dataclass(frozen=True)
class Row:
    """One comparison: `values` gives ours and theirs, of equal length, no further apart than `tolerance`."""

    metric: str
    oracle: str
    values: Callable[[], tuple[np.ndarray, np.ndarray]]
    tolerance: float
    relative: bool = False

    def difference(self) -> float:
        ours, theirs = (np.asarray(v, dtype=np.float64) for v in self.values())
        assert ours.shape == theirs.shape and ours.size and np.isfinite(theirs).all()
        gap = np.abs(ours - theirs)
        return float((gap / np.abs(theirs) if self.relative else gap).max())


@lru_cache(maxsize=1)
def clips() -> tuple[np.ndarray, np.ndarray]:
    """SR and HR, uint8 14 x 200 x 248: a photograph that shifts, and its enlarged quarter with noise."""
    import skimage.data

    photo = skimage.data.coffee()[60:]
    hr = np.stack([photo[t : t + 200, 3 * t : 3 * t + 248] for t in range(FRAMES)])
    x = torch.from_numpy(np.ascontiguousarray(hr)).movedim(-1, 1)
    sr = bicubic_8bit(bicubic_8bit(x, (50, 62)), (200, 248)).movedim(1, -1).numpy()
    noise = np.random.default_rng(0).normal(size=sr.shape) * np.linspace(1, 9, FRAMES)[:, None, None, None]
    return (sr + noise).round().clip(0, 255).astype(np.uint8), hr


@lru_cache(maxsize=1)
def lpips() -> Lpips:
    return Lpips("alex", "random", seed=1)


def ours(name: str, **more):
    scoring = metrics_for([name], lpips=lpips() if "lpips" in name else None, **more).start()
    scoring.push(*clips())
    return next(iter(scoring.finish().values()))


def per_frame(name: str, oracle: Callable[[np.ndarray, np.ndarray], float]):
    """Our value of every fourth frame beside the oracle's."""
    return lambda: (
        ours(name).per_frame[::4].numpy(),
        [oracle(s, h) for s, h in zip(*(clip[::4] for clip in clips()), strict=True)],
    )


def of_clip(name: str, oracle: Callable[[np.ndarray, np.ndarray], float]):
    return lambda: (np.array([ours(name).clip]), [oracle(*clips())])


# ---- fidelity -------------------------------------------------------------------------------------------


def skimage_psnr(s, h):
    from skimage.metrics import peak_signal_noise_ratio

    return peak_signal_noise_ratio(h, s, data_range=255)


def torchmetrics_psnr(s, h):
    import_lpips()  # torchmetrics imports torchvision, which may need the declared operators
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(
        torch.tensor(s).double(), torch.tensor(h).double(), data_range=255.0
    ).item()


def skimage_ssim(s, h):
    from skimage.metrics import structural_similarity

    window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return structural_similarity(s, h, channel_axis=-1, data_range=255, **window)


def torchmetrics_ssim(s, h):
    import_lpips()
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (torch.tensor(v).double().movedim(-1, 0)[None] for v in (s, h))
    _, full = structural_similarity_index_measure(x, y, data_range=255.0, return_full_image=True)
    return full[..., 5:-5, 5:-5].mean().item()  # torchmetrics also counts a mirrored border; we do not


def studio_y(frame: np.ndarray) -> np.ndarray:
    return 16 + frame.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


def formula_psnr_y(s, h):
    return 10 * np.log10(255**2 / np.mean((studio_y(s) - studio_y(h)) ** 2))


def formula_ssim(x: np.ndarray, y: np.ndarray) -> float:
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    mx, my, xx, yy, xy = (ndimage.correlate(v, window)[5:-5, 5:-5] for v in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    return (top / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))).mean()


# ---- LPIPS ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def lpips_package():
    """The package's own network and forward, with our random trunk."""
    package = import_lpips()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    network.net.load_state_dict(lpips().model.net.state_dict())
    return network


def lpips_distance(a: np.ndarray, b: np.ndarray) -> float:
    x, y = (torch.from_numpy(v).movedim(-1, 0)[None].float() / 127.5 - 1 for v in (a, b))
    with torch.no_grad():
        return lpips_package()(x, y).item()


def tlpips(sr, hr):
    pairs = range(1, FRAMES)
    gaps = [lpips_distance(sr[t - 1], sr[t]) - lpips_distance(hr[t - 1], hr[t]) for t in pairs]
    return np.abs(gaps).mean()


# ---- NIQE -----------------------------------------------------------------------------------------------


# What pyiqa 0.1.16's `niqe` says of them, with the same model of photographs (its file could not be fetched).
PYIQA_NIQE = {
    "astronaut": 3.062388045531781,
    "coffee": 4.061590026361292,
    "chelsea": 2.5720785436149978,
    "astronaut/4x": 7.112847461431773,
    "coffee/4x": 7.389684079257497,
    "chelsea/4x": 8.411457209291067,
    "astronaut/bars": 3.384476173736967,
    "coffee/bars": 4.229339352873631,
    "chelsea/bars": 3.3425817948517924,
}


def our_niqe(names: Iterable[str]) -> np.ndarray:
    suite, photos, values = metrics_for(["niqe"]), photographs(), []
    for name in names:
        scoring = suite.start()
        scoring.push(photos[name][None])
        values.append(scoring.finish()["niqe"].clip)
    return np.array(values)


def niqe_and_formula():
    names = ("coffee", "coffee/bars", "chelsea", "chelsea/4x")
    return our_niqe(names), [formula_niqe(photographs()[name]) for name in names]


# ---- change in time -------------------------------------------------------------------------------------


def changes(clip: np.ndarray) -> np.ndarray:
    return np.abs(np.diff(clip.astype(np.float64), axis=0)).mean(axis=(1, 2, 3))


def formula_tdiff(sr, hr):
    return np.abs(np.diff(sr.astype(np.float64), axis=0) - np.diff(hr.astype(np.float64), axis=0)).mean()


def formula_edge(clip: np.ndarray) -> float:
    edges = [t for t in range(1, FRAMES) if (t - 5) % 8 == 0]  # the frame after the edge
    others = [t for t in range(1, FRAMES) if t not in edges]
    change = changes(clip)
    return np.mean([change[t - 1] for t in edges]) / np.mean([change[t - 1] for t in others])


# ---- motion ---------------------------------------------------------------------------------------------


def shift_flow() -> Flow:
    """What the clip does: its window moves by (3, 1) a frame, so a pixel moves by (-3, -1)."""

    def between(first, second):
        sign = 1 if forward.pop(0) else -1
        field = torch.tensor([-3.0, -1.0])[:, None, None] * sign
        return field.expand(len(first), 2, *first.shape[2:])

    forward = [True, False] * FRAMES
    return Flow("known", "the known shift", between)


def formula_ewarp(clip: np.ndarray) -> float:
    """Of the known shift: the part of a frame that the next one still shows, pixel by pixel."""
    a, b = (clip[:-1].astype(np.float64) / 255)[:, 1:, 3:], (clip[1:].astype(np.float64) / 255)[:, :-1, :-3]
    return 1000 * ((a - b) ** 2).mean()


@lru_cache(maxsize=1)
def turning() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """A photograph, the same turned by 2 degrees, grown by 2 % and moved, and the true flow, `2 H W`."""
    import skimage.data

    first = np.ascontiguousarray(skimage.data.astronaut()[:320, :400])
    height, width = first.shape[:2]
    angle, scale = np.deg2rad(2.0), 1.02
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float64)
    middle, move = np.array([width / 2, height / 2]), np.array([4.3, -2.6])
    field = (grid - middle) @ turn.T + middle + move - grid
    back = (grid - middle - move) @ np.linalg.inv(turn).T + middle
    places = [back[..., 1], back[..., 0]]
    second = [ndimage.map_coordinates(first[..., c] / 255, places, order=3, mode="nearest") for c in range(3)]
    x = torch.from_numpy(first).movedim(-1, 0)[None].float() / 255
    return x, torch.from_numpy(np.stack(second)).float()[None], field.transpose(2, 0, 1)


def flow_error():
    first, second, true = turning()
    gap = lucas_kanade(first, second)[0].numpy() - true
    return [np.median(np.hypot(*gap[:, 24:-24, 24:-24]))], [0.0]


def warped():
    first, _, field = turning()
    ys, xs = np.mgrid[: field.shape[1], : field.shape[2]]
    places = [ys + field[1], xs + field[0]]
    theirs = [ndimage.map_coordinates(c, places, order=1, mode="nearest") for c in first[0].double().numpy()]
    return warp(first, torch.from_numpy(field)[None].float())[0].numpy(), np.stack(theirs)


def occlusion():
    """Trusted pixels of two rough fields, one by one."""
    rng = np.random.default_rng(3)
    smooth = [ndimage.gaussian_filter(rng.normal(size=(2, 40, 50)), (0, 9, 9)) * 40 for _ in range(2)]
    forward, backward = smooth[0], -smooth[0] + 0.3 * smooth[1]
    result = np.zeros((40, 50))
    for y in range(40):
        for x in range(50):
            u, v = forward[:, y, x]
            place = [[y + v], [x + u]]
            bu, bv = (ndimage.map_coordinates(b, place, order=1, mode="nearest")[0] for b in backward)
            here, there = u * u + v * v, bu * bu + bv * bv
            right = forward[:, y, x + 1] - forward[:, y, x] if x < 49 else np.zeros(2)
            below = forward[:, y + 1, x] - forward[:, y, x] if y < 39 else np.zeros(2)
            inside = 0 <= x + u <= 49 and 0 <= y + v <= 39
            cancels = (u + bu) ** 2 + (v + bv) ** 2 <= 0.01 * (here + there) + 0.5
            result[y, x] = inside and cancels and (right @ right + below @ below) <= 0.01 * here + 0.002
    fields = [torch.from_numpy(f)[None].float() for f in (forward, backward)]
    assert 0.1 < result.mean() < 0.9
    return trusted(*fields)[0].numpy(), result


ROWS = (
    Row("psnr", "scikit-image", per_frame("psnr", skimage_psnr), 1e-4),
    Row("psnr", "torchmetrics", per_frame("psnr", torchmetrics_psnr), 1e-4),
    Row("psnr_y", "BasicSR's formula, float64", per_frame("psnr_y", formula_psnr_y), 1e-4),
    Row("ssim", "scikit-image", per_frame("ssim", skimage_ssim), 2e-6),
    Row("ssim", "torchmetrics, border cut", per_frame("ssim", torchmetrics_ssim), 2e-6),
    Row(
        "ssim_y",
        "BasicSR's formula, float64",
        per_frame("ssim_y", lambda s, h: formula_ssim(studio_y(s), studio_y(h))),
        2e-6,
    ),
    Row("lpips", "package lpips, same weights", per_frame("lpips", lpips_distance), 2e-5, relative=True),
    Row(
        "niqe",
        "pyiqa 0.1.16, recorded",
        lambda: (our_niqe(PYIQA_NIQE), np.array([*PYIQA_NIQE.values()])),
        1e-2,
        relative=True,
    ),
    Row("niqe", "the authors' formula, scipy", niqe_and_formula, 5e-3, relative=True),
    Row("tdiff", "formula, float64", of_clip("tdiff", formula_tdiff), 1e-5),
    Row(
        "tdiff_ratio",
        "formula, float64",
        of_clip("tdiff_ratio", lambda s, h: changes(s).sum() / changes(h).sum()),
        1e-6,
    ),
    Row("chunk_edge", "formula, float64", of_clip("chunk_edge", lambda s, h: formula_edge(s)), 1e-6),
    Row(
        "chunk_edge_ratio",
        "formula, float64",
        of_clip("chunk_edge_ratio", lambda s, h: formula_edge(s) / formula_edge(h)),
        1e-6,
    ),
    Row("tlpips", "package lpips, same weights", of_clip("tlpips", tlpips), 1e-4, relative=True),
    Row(
        "ewarp",
        "formula, known shift",
        lambda: ([ours("ewarp", flow=shift_flow()).clip], [formula_ewarp(clips()[0])]),
        1e-4,
    ),
    Row(
        "ewarp_delta",
        "formula, known shift",
        lambda: (
            [ours("ewarp_delta", flow=shift_flow()).clip],
            [formula_ewarp(clips()[0]) - formula_ewarp(clips()[1])],
        ),
        1e-4,
    ),
    Row("warp", "scipy map_coordinates", warped, 1e-4),
    Row("occlusion test", "pixel by pixel", occlusion, 0.5),
    Row("flow lk, median error", "a known turn and zoom, pixels", flow_error, 0.3),
)


SUITES = (
    ["psnr"],
    ["ssim"],
    ["lpips"],
    ["psnr", "ssim", "lpips"],
    ["lpips", "tlpips"],
    ["niqe"],
    ["ewarp", "ewarp_delta"],
    ["tdiff", "tdiff_ratio", "chunk_edge", "chunk_edge_ratio"],
)


def speed(device: str) -> None:
    """Seconds a frame of every suite, 4 frames of 1280x720 from the host's memory, measured in turns."""
    rng = np.random.default_rng(0)
    sr, hr = (rng.integers(0, 255, (4, 720, 1280, 3), dtype=np.uint8) for _ in range(2))

    def run(suite):
        scoring = suite.start()
        scoring.push(sr, hr)
        scoring.finish()

    suites = {
        ", ".join(names): metrics_for(names, device=device, lpips=lpips() if "lpips" in names else None)
        for names in SUITES
    }
    seconds = interleaved({k: lambda s=s: run(s) for k, s in suites.items()}, repeats=3)
    found = machine()
    print(f"\n{found['cpu']}, {found['gpu'] or 'no GPU'}, {torch.get_num_threads()} thread, on {device}:\n")
    print("| metrics | seconds a frame, 1280x720 | beside LPIPS alone |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value / 4:.4f} | {value / seconds['lpips']:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.eval.metric_table", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--speed", metavar="DEVICE", help="time the metrics on cpu or cuda instead")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    if wanted.speed:
        speed(wanted.speed)
        return
    print("| metric | oracle | largest difference | tolerance |\n|---|---|---|---|")
    failed = []
    for row in ROWS:
        difference, kind = row.difference(), " relative" if row.relative else ""
        print(f"| {row.metric} | {row.oracle} | {difference:.1e}{kind} | {row.tolerance:.0e} |", flush=True)
        if not difference <= row.tolerance:
            failed.append(row.metric)
    if failed:
        raise SystemExit(f"out of tolerance: {', '.join(failed)}")


if __name__ == "__main__":
    main()
