"""Real JPEG and real video codecs, in memory. Everything here is uint8 RGB in, uint8 RGB out."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from io import BytesIO

import numpy as np

from data.degradation.frames import Frame, bytes_of, wrapped_bytes
from data.degradation.steps import Codec, Jpeg, choose

DECODERS = {"libx264": "h264", "libx265": "hevc", "mpeg4": "mpeg4"}
TOLERANCE = 4_000_000  # bits: FFmpeg's default, which the original keeps; only mpeg4 reads it
SMALLEST_X265 = 64  # pixels: smaller pictures crash the libx265 that PyAV brings


class _Convert:
    """Pixel format and size conversion with exact arithmetic on one thread: the same bytes everywhere."""

    def __init__(self) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        self.reformatter = VideoReformatter()
        self.flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

    def __call__(self, picture, width: int, height: int, pixels: str):
        return self.reformatter.reformat(picture, width, height, pixels, interpolation=self.flags, threads=1)


def draw_jpeg(config: Jpeg, frames: int, rng: np.random.Generator) -> dict:
    """Whole qualities of one clip; with `whole_steps` every step of the walk starts from one."""
    walk = config.quality
    if not config.whole_steps:
        quality = np.rint(walk.draw(frames, rng)).astype(int).tolist()
        return {"quality": quality, "swapped": config.swapped}
    quality = [round(rng.uniform(walk.low, walk.high))]
    for move in rng.uniform(-walk.step, walk.step, size=max(frames - 1, 0)):
        quality.append(round(min(max(quality[-1] + move, walk.low), walk.high)))
    return {"quality": quality, "swapped": config.swapped}


def draw_codec(config: Codec, area: int, rng: np.random.Generator) -> dict | None:
    """Encoder, bits per frame and how many bits a clip may go astray; None when this trip is left out.

    `area` is that of the HR frame: bits scale with it, so that the same draw is the same damage at any size
    (the published range belongs to 256 x 256 crops).
    """
    if config.probability < 1 and rng.uniform() >= config.probability:
        return None
    low, high = config.bits
    if config.logarithmic:
        bits = round(math.exp(rng.uniform(math.log(low), math.log(high))))
    else:
        bits = int(rng.integers(low, high + 1))
    share = area / 256**2 if config.scaled else 1.0
    codec = choose(config.names, rng)
    return {
        "codec": codec,
        "bits_per_frame": max(1, round(bits * share)),
        "tolerance": max(1, round(TOLERANCE * share)),
        "fps": config.fps,
        "speed": config.speed,
        "wrap": config.wrap,
    }


def fitted(params: dict, height: int, width: int) -> dict:
    """Drawn parameters for pictures of that size: too small for libx265 gives libx264, and says so."""
    if params["codec"] == "libx265" and min(height, width) < SMALLEST_X265:
        return params | {"codec": "libx264", "instead_of": "libx265"}
    return params


def jpeg_bytes(frame: np.ndarray, quality: int) -> bytes:
    """`H W 3` as a JPEG file: libjpeg's tables, 4:2:0. (The original hands RGB to an encoder that expects
    BGR; here luma is luma.)"""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=int(quality))
    return buffer.getvalue()


def jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    """`H W 3` after a trip through JPEG."""
    from PIL import Image

    return np.asarray(Image.open(BytesIO(jpeg_bytes(frame, quality))))


def apply_jpeg(frames: Iterable[Frame], params: dict) -> Iterator[np.ndarray]:
    """Sends every frame through JPEG at its drawn quality."""
    for frame, quality in zip(frames, params["quality"], strict=False):
        frame = bytes_of(frame)
        if params["swapped"]:
            yield jpeg(np.ascontiguousarray(frame[..., ::-1]), quality)[..., ::-1]
        else:
            yield jpeg(frame, quality)


def _encoder(height: int, width: int, params: dict):
    """An encoder for such pictures (odd sizes grow to even ones); one thread: the same bits everywhere."""
    import av

    codec, fps = params["codec"], params["fps"]
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, fps), Fraction(fps)
    encoder.thread_count = 1
    rate = params["bits_per_frame"] * fps
    if codec == "mpeg4":
        encoder.bit_rate, encoder.bit_rate_tolerance = rate, params["tolerance"]
        return encoder
    # Both count in whole kilobits and refuse zero.
    encoder.bit_rate = max(1, round(rate / 1000)) * 1000
    if codec == "libx264":
        # x264's AVX-512 code for macroblock trees gives other bits from run to run.
        encoder.options = {"preset": params["speed"], "x264-params": "mbtree=0"}
    else:
        if min(height, width) < SMALLEST_X265:
            raise ValueError(f"libx265 takes no picture of {width}x{height}: it must be 64x64 or larger")
        quiet = "log-level=none:pools=none:frame-threads=1:wpp=0"
        encoder.options = {"preset": params["speed"], "x265-params": quiet}
    return encoder


def encode(frames: Iterable[Frame], params: dict) -> Iterator:
    """Encodes frames to PyAV packets, 4:2:0, at a mean of `params["bits_per_frame"]`.

    The published stream runs at one frame per second, so that its bit rate is bits per frame. Frames of
    another size than the first are scaled to it; odd sizes grow by a copied last row or column. Encoders hold
    some tens of frames back, so packets begin late.
    """
    import av

    to_bytes = wrapped_bytes if params["wrap"] else bytes_of
    encoder, convert = None, _Convert()
    for i, frame in enumerate(frames):
        frame = to_bytes(frame)
        if encoder is None:
            encoder = _encoder(*frame.shape[:2], params)
        pad = ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0))
        if pad[0][1] or pad[1][1]:
            frame = np.pad(frame, pad, mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = convert(picture, encoder.width, encoder.height, "yuv420p")
        picture.pts = i
        yield from encoder.encode(picture)
    if encoder is not None:
        yield from encoder.encode(None)


def decode(packets: Iterable, codec: str) -> Iterator[np.ndarray]:
    """The frames of `encode`'s packets, uint8 `H W 3`, of even sizes."""
    import av

    decoder = av.CodecContext.create(DECODERS[codec], "r")
    decoder.thread_count = 1
    convert = _Convert()

    def rgb(pictures: list) -> Iterator[np.ndarray]:
        return (convert(p, p.width, p.height, "rgb24").to_ndarray() for p in pictures)

    for packet in packets:
        yield from rgb(decoder.decode(packet))
    yield from rgb(decoder.decode(None))


def video(frames: Iterable[Frame], params: dict) -> Iterator[np.ndarray]:
    """A round trip through a video codec: as many frames as came in, all of the size of the first."""
    size: list[int] = []
    came = went = 0

    def counted() -> Iterator[Frame]:
        nonlocal came
        for frame in frames:
            if not size:
                size.extend(frame.shape[:2] if isinstance(frame, np.ndarray) else frame.shape[1:])
            came += 1
            yield frame

    for frame in decode(encode(counted(), params), params["codec"]):
        went += 1
        yield frame[: size[0], : size[1]]
    assert went == came, f"{params['codec']} returned {went} of {came} frames"
