"""The plain way: each operator per frame with OpenCV, NumPy and PyAV, as the published code works.

The yardstick of `python -m data bench` and of the tests; nothing else uses it. It takes the parameters that
pipeline.draw gives and does the same with float32 frames `H W 3` in [0, 1]. Noise has its own samples.
"""

from collections.abc import Callable, Sequence
from io import BytesIO

import numpy as np

from data.degradation import blur
from data.degradation.resize import even_size

Frames = list[np.ndarray]


def start(frames: Sequence[np.ndarray]) -> Frames:
    """uint8 frames as the operators take them."""
    return [frame.astype(np.float32) / 255 for frame in frames]


def finish(frames: Frames) -> np.ndarray:
    return np.stack([np.rint(frame.clip(0, 1) * 255).astype(np.uint8) for frame in frames])


def sharpen(frames: Frames, params: dict) -> Frames:
    import cv2

    taps = cv2.getGaussianKernel(params["kernel"], 0)
    kernel = taps @ taps.T

    def one(frame: np.ndarray) -> np.ndarray:
        detail = frame - cv2.filter2D(frame, -1, kernel)
        mask = (np.abs(detail) * 255 > params["threshold"]).astype(np.float32)
        soft = cv2.filter2D(mask, -1, kernel)
        sharp = np.clip(frame + params["weight"] * detail, 0, 1)
        return soft * sharp + (1 - soft) * frame

    return [one(frame) for frame in frames]


def blurred(frames: Frames, params: dict) -> Frames:
    import cv2

    kernels = blur.kernels(params).double().numpy()
    return [cv2.filter2D(frame, -1, kernel) for frame, kernel in zip(frames, kernels, strict=True)]


def _resized(frame: np.ndarray, size: Sequence[int], kind: str) -> np.ndarray:
    import cv2

    filters = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA, "bicubic": cv2.INTER_CUBIC}
    return cv2.resize(frame, (size[1], size[0]), interpolation=filters[kind])


def resized(frames: Frames, params: dict) -> Frames:
    sizes = [even_size(*params["of"], scale) for scale in params["scale"]]
    return [_resized(f, size, params["filter"]) for f, size in zip(frames, sizes, strict=True)]


def to_lr(frames: Frames, params: dict) -> Frames:
    return [_resized(frame, params["size"], params["filter"]) for frame in frames]


def noisy(frames: Frames, params: dict) -> Frames:
    rng = np.random.RandomState(0)
    add = _gaussian if params["kind"] == "gaussian" else _poisson
    return [add(f, s, params["gray"], rng) for f, s in zip(frames, params["strength"], strict=True)]


def _gaussian(frame: np.ndarray, sigma: float, gray: bool, rng: np.random.RandomState) -> np.ndarray:
    noise = np.float32(rng.randn(*frame.shape)) * np.float32(sigma / 255)
    return frame + (noise[..., :1] if gray else noise)


def _poisson(frame: np.ndarray, scale: float, gray: bool, rng: np.random.RandomState) -> np.ndarray:
    import cv2

    clean = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)[..., None] if gray else frame
    clean = np.clip((clean * 255).round(), 0, 255) / 255
    photons = 2 ** np.ceil(np.log2(len(np.unique(clean))))
    noise = rng.poisson(clean * photons) / photons - clean
    return np.float32(frame + noise * scale)


def jpeg(frames: Frames, params: dict) -> Frames:
    """Colours in the encoder's own order; the published code hands them over swapped at the same cost."""
    import cv2

    out = []
    for frame, quality in zip(frames, params["quality"], strict=True):
        levels = np.rint(frame[..., ::-1].clip(0, 1) * 255).astype(np.uint8)
        _, data = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        out.append(np.float32(cv2.imdecode(data, 1)[..., ::-1]) / 255)
    return out


def codec(frames: Frames, params: dict) -> Frames:
    """Through an MP4 file in memory."""
    import av

    height, width = frames[0].shape[:2]
    file = BytesIO()
    with av.open(file, "w", "mp4") as container:
        stream = container.add_stream(params["codec"], rate=params["fps"])
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        stream.bit_rate = max(1000, params["bits_per_frame"] * params["fps"])
        if params["codec"] != "mpeg4":
            stream.options = {"preset": params["speed"]}
        for frame in frames:
            levels = (255 * frame.clip(0, 1)).astype(np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    with av.open(file, "r", "mp4") as container:
        pictures = [p.to_rgb().to_ndarray()[:height, :width] for p in container.decode(video=0)]
    return start(pictures)


OPERATORS: dict[str, Callable[[Frames, dict], Frames]] = {
    "sharpen": sharpen,
    "blur": blurred,
    "resize": resized,
    "to_lr": to_lr,
    "noise": noisy,
    "jpeg": jpeg,
    "codec": codec,
}


def apply(frames: np.ndarray, params: dict) -> np.ndarray:
    """pipeline.apply the plain way, for the steps of the RealBasicVSR presets."""
    x = start(frames)
    for step in params["steps"]:
        x = OPERATORS[step["op"]](x, step)
    return finish(x)
