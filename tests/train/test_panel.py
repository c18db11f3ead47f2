"""The panel's numbers against closed forms; the panel of a real run is looked at in test_run.py."""

import numpy as np
import pytest
import torch
from PIL import Image

from train.panel import _heat, contrast, saturation
from train.validate import draw_panel


def test_saturation_and_contrast_of_known_frames():
    grey = torch.full((3, 4, 4), 0.3)
    assert saturation(grey) == 0 and contrast(grey) == pytest.approx(0, abs=1e-6)
    red = torch.stack([torch.ones(4, 4), -torch.ones(4, 4), -torch.ones(4, 4)])
    assert saturation(red) == 2
    halves = torch.cat([torch.full((3, 4, 2), -0.5), torch.full((3, 4, 2), 0.5)], 2)
    assert contrast(halves) == pytest.approx(0.5)
    assert contrast(9 * halves) == pytest.approx(1.0)  # what is clamped in the picture is clamped here


def test_the_map_is_brightest_where_the_push_is_strongest():
    direction = torch.zeros(16, 2, 3)
    direction[:, 1, 2], direction[:, 0, 0] = -4.0, 1.0
    heat = _heat(direction, (16, 24))
    assert heat.shape == (16, 24, 3)
    assert heat[8:, 16:].unique().tolist() == [255] and heat[:8, :8].unique().tolist() == [64]
    assert heat[:8, 8:].max() == 0
    assert _heat(torch.zeros(16, 2, 3), (16, 24)).max() == 0


def test_pictures_stand_side_by_side_under_their_names(tmp_path):
    pictures = {name: torch.full((20, 60, 3), value, dtype=torch.uint8) for name, value in
                (("HR", 10), ("student", 200))}  # fmt: skip
    draw_panel(tmp_path / "a" / "panel.png", pictures)
    sheet = np.asarray(Image.open(tmp_path / "a" / "panel.png"))
    assert sheet.shape == (34, 120, 3)
    assert (sheet[14:, :60] == 10).all() and (sheet[14:, 60:] == 200).all()
    assert (sheet[:14] < 128).any()
