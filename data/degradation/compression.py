"""Real JPEG and real video codecs, in memory. Everything here is uint8 RGB in, uint8 RGB out."""

from fractions import Fraction
from io import BytesIO

import numpy as np

from data.degradation.presets import Codec, Jpeg, choose

DECODERS = {"libx264": "h264", "mpeg4": "mpeg4"}
TOLERANCE = 4_000_000  # bits: FFmpeg's default, which the original keeps; only mpeg4 reads it


class _Convert:
    """Pixel format and size conversion with exact arithmetic on one thread: the same bytes everywhere."""

    def __init__(self) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        self.reformatter = VideoReformatter()
        self.flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

    def __call__(self, picture, width: int, height: int, pixels: str):
        return self.reformatter.reformat(picture, width, height, pixels, interpolation=self.flags, threads=1)


def draw_jpeg(config: Jpeg, frames: int, rng: np.random.Generator) -> dict:
    return {"quality": np.rint(config.quality.draw(frames, rng)).astype(int).tolist()}


def draw_codec(config: Codec, area: int, rng: np.random.Generator) -> dict:
    """Encoder, bits per frame and how many bits a clip may go astray.

    `area` is that of the HR frame: bits scale with it, so that the same draw is the same damage at any size
    (the published range belongs to 256 x 256 crops).
    """
    bits = int(rng.integers(config.bits[0], config.bits[1] + 1))
    share = area / 256**2
    return {
        "codec": choose(config.names, rng),
        "bits_per_frame": max(1, round(bits * share)),
        "tolerance": max(1, round(TOLERANCE * share)),
    }


def jpeg_bytes(frame: np.ndarray, quality: int) -> bytes:
    """`H W 3` as a JPEG file: libjpeg's tables, 4:2:0. (The original hands RGB to an encoder that expects
    BGR; here luma is luma.)"""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=int(quality))
    return buffer.getvalue()


def jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    from PIL import Image

    return np.array(Image.open(BytesIO(jpeg_bytes(frame, quality))))


def encode(frames: list[np.ndarray], codec: str, bits_per_frame: int, tolerance: int = TOLERANCE) -> list:
    """Encodes `H W 3` frames to a list of PyAV packets, 4:2:0, at that mean size.

    The stream runs at one frame per second, so that its bit rate is bits per frame; frames of another size
    than the first are scaled to it; odd sizes grow by a copied last row or column. One thread: the same bits
    on every machine and in every worker.
    """
    import av

    h, w = frames[0].shape[:2]
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = w + w % 2, h + h % 2, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1), Fraction(1)
    encoder.thread_count = 1
    if codec == "libx264":
        # It counts in whole kilobits and refuses zero. Its AVX-512 code for macroblock trees gives other bits
        # from run to run.
        encoder.bit_rate = max(1, round(bits_per_frame / 1000)) * 1000
        encoder.options = {"x264-params": "mbtree=0"}
    else:
        encoder.bit_rate, encoder.bit_rate_tolerance = bits_per_frame, tolerance
    packets, convert = [], _Convert()
    for i, frame in enumerate(frames):
        pad = ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0))
        if pad[0][1] or pad[1][1]:
            frame = np.pad(frame, pad, mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = convert(picture, encoder.width, encoder.height, "yuv420p")
        picture.pts = i
        packets += encoder.encode(picture)
    return packets + encoder.encode(None)


def video(
    frames: list[np.ndarray], codec: str, bits_per_frame: int, tolerance: int = TOLERANCE
) -> list[np.ndarray]:
    """A round trip through a video codec: as many frames as came in, all of the size of the first."""
    import av

    h, w = frames[0].shape[:2]
    decoder = av.CodecContext.create(DECODERS[codec], "r")
    decoder.thread_count = 1
    pictures = [
        p for packet in encode(frames, codec, bits_per_frame, tolerance) for p in decoder.decode(packet)
    ]
    pictures += decoder.decode(None)
    assert len(pictures) == len(frames), f"{codec} returned {len(pictures)} of {len(frames)} frames"
    convert = _Convert()
    return [convert(p, p.width, p.height, "rgb24").to_ndarray()[:h, :w] for p in pictures]
