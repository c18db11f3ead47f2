"""8-bit bicubic against Pillow, on both of its paths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from flashvsr.base import resize
from flashvsr.base.resize import bicubic_8bit, to_signed, to_uint8


def _pillow(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pillow, one pass at a time: alone it may take the height first (when only the height shrinks)."""
    planes = x.reshape(-1, *x.shape[-2:]).numpy()
    wide = [Image.fromarray(p).resize((size[1], p.shape[0]), Image.Resampling.BICUBIC) for p in planes]
    out = [np.asarray(p.resize(size[::-1], Image.Resampling.BICUBIC)) for p in wide]
    return torch.from_numpy(np.stack(out)).reshape(*x.shape[:-2], *size)


def _pictures() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, 3, 37, 53), generator=rng, dtype=torch.uint8)
    extreme = torch.randint(0, 2, (1, 37, 53), generator=rng, dtype=torch.uint8) * 255
    edge = torch.zeros(37, 53, dtype=torch.uint8)
    edge[:, 20:] = 255
    edge[30:] = 255 - edge[30:]
    return {"noise": noise, "extreme": extreme, "edge": edge}


@pytest.mark.parametrize("path", ["kernel", "two_passes"])
@pytest.mark.parametrize("size", [(148, 212), (111, 53), (37, 80), (13, 17), (9, 212), (200, 13), (1, 1)])
def test_equal_to_pillow_within_one_level(size, path):
    for name, x in _pictures().items():
        y = bicubic_8bit(x, size) if path == "kernel" else resize._two_passes(x, *size)
        assert y.dtype == torch.uint8 and y.shape == (*x.shape[:-2], *size)
        error = (y.int() - _pillow(x, size).int()).abs()
        assert error.max() <= 1, (name, error.max())
        assert (error > 0).float().mean() < 0.01, name


def test_one_call_of_pillow_at_a_uniform_scale():
    x = _pictures()["extreme"][0]
    for size in ((148, 212), (74, 106), (18, 26)):
        whole = np.asarray(Image.fromarray(x.numpy()).resize(size[::-1], Image.Resampling.BICUBIC))
        assert (bicubic_8bit(x, size).int() - torch.tensor(whole).int()).abs().max() <= 1


def test_any_memory_layout():
    x = _pictures()["noise"]
    want = bicubic_8bit(x, (148, 212))
    assert torch.equal(bicubic_8bit(x.transpose(0, 1), (148, 212)).transpose(0, 1), want)
    last = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(bicubic_8bit(last, (148, 212)), want)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices_agree_with_the_cpu(device):
    if not getattr(torch, device).is_available():
        pytest.skip(f"no {device} here")
    for x in _pictures().values():
        for size in ((148, 212), (13, 17)):
            y = bicubic_8bit(x.to(device), size)
            assert y.device.type == device
            assert (y.cpu().int() - bicubic_8bit(x, size).int()).abs().max() <= 1


def test_same_size_is_a_copy_and_floats_are_refused():
    x = _pictures()["noise"]
    y = bicubic_8bit(x, (37, 53))
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()
    with pytest.raises(TypeError, match="uint8"):
        bicubic_8bit(x.float(), (8, 8))


def test_pixels_and_signed_values():
    levels = torch.arange(256, dtype=torch.uint8)
    signed = to_signed(levels)
    assert signed.dtype == torch.float32 and signed[0] == -1 and signed[255] == 1
    assert torch.equal(to_uint8(signed), levels)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.999])).tolist() == [0, 255, 255]
    assert torch.equal(to_uint8(signed.bfloat16()), ((signed.bfloat16().float() + 1) * 127.5).round().byte())
