"""A clip to try the app with: drawn here, so that nothing has to be downloaded."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from flashvsr.base.video_writer import VideoWriter

HEIGHT, WIDTH, FRAMES, FPS = 72, 128, 33, 25
FINER = 4  # it is drawn so many times larger and averaged, as a camera would
TEXT = "fine print is what upscaling is about"


def frame(number: int) -> np.ndarray:
    """Frame `number` of the sample, uint8 `H W 3`: a turning fan of lines, a wall, passing print."""
    from PIL import Image, ImageDraw, ImageFont

    height, width, t = FINER * HEIGHT, FINER * WIDTH, number / FRAMES
    shade = np.linspace(0, 1, height)[:, None, None]
    sky = (1 - shade) * (38, 70, 120) + shade * (214, 170, 120)
    picture = Image.fromarray(np.broadcast_to(sky, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for row in range(6):
        for column in range(-1, 16):
            left, top = 36 * column + 18 * (row % 2) - 30 * t, 130 + 18 * row
            draw.rectangle((left + 2, top + 2, left + 34, top + 16), (150 + 9 * row, 84 + 5 * row, 62))
    x, y, radius, spokes = 380, 105, 84, 18
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), (244, 240, 228))
    for k in range(spokes):
        box, angle = (x - radius, y - radius, x + radius, y + radius), 360 / spokes * k + 40 * t
        draw.pieslice(box, angle, angle + 180 / spokes, (24, 34, 54))
    ball = (90 + 150 * t, 74 - 40 * math.sin(2 * math.pi * t))
    draw.ellipse((ball[0] - 26, ball[1] - 26, ball[0] + 26, ball[1] + 26), (232, 196, 56), (60, 40, 20), 5)
    draw.rectangle((0, 242, width, height), (248, 246, 240))
    draw.text((24 - 60 * t, 246), TEXT, (20, 20, 24), ImageFont.load_default(30))
    return np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX))


def write(path: Path) -> Path:
    """Draws the sample into a video file."""
    with VideoWriter(str(path), FPS, HEIGHT, WIDTH, crf=12) as writer:
        writer.write(np.stack([frame(number) for number in range(FRAMES)]))
    return path
