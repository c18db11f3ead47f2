"""Files for the tests of the corpus: procedural pictures in all kinds of containers, whole and damaged."""

from pathlib import Path

import numpy as np


def texture(seed: int, height: int, width: int, cell: int = 4) -> np.ndarray:
    """Random grey blobs of about `cell` pixels: float `H W` in 20 … 235."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    grid = rng.random((height // cell + 2, width // cell + 2)).astype(np.float32)
    big = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    return 20 + 215 * (big - big.min()) / (big.max() - big.min())


def scene(seed: int, frames: int, height: int = 72, width: int = 128, speed: float = 1.0) -> np.ndarray:
    """A camera moving over a texture of one colour: uint8 `F H W 3`."""
    rng = np.random.default_rng(1000 + seed)
    sheet = texture(seed, height + 64, width + 64 + int(abs(speed) * frames), 8)
    tint = rng.uniform(0.3, 1.0, 3)
    shots = [sheet[32 : 32 + height, round(16 + speed * f) :][:, :width] for f in range(frames)]
    return (np.stack(shots)[..., None] * tint).clip(0, 255).astype(np.uint8)


def encode(path: Path, clip: np.ndarray, codec="libx264", pix_fmt="yuv420p", options=None, pts=None) -> Path:
    """A video file written by PyAV itself, with time stamps in 1/25 s; `clip` uint8 `F H W [C]`."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pix_fmt
        stream.options = options or {}
        stream.codec_context.thread_count = 1
        kind = {3: "gray"}.get(clip.ndim) or {3: "rgb24", 4: "rgba"}[clip.shape[3]]
        for number, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=kind)
            frame.pts = number if pts is None else pts[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def corrupted(data: bytes, seed: int) -> bytes:
    """`data` with flipped bits, cut short, or with a range of zeros, by turns."""
    rng = np.random.default_rng(seed)
    out = bytearray(data)
    kind = seed % 3
    if kind == 0:
        for _ in range(int(rng.integers(1, 40))):
            out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del out[int(rng.integers(len(out))) :]
    else:
        begin = int(rng.integers(len(out)))
        end = min(len(out), begin + int(rng.integers(1, max(2, len(out) // 4))))
        out[begin:end] = bytes(end - begin)
    return bytes(out)
