"""Metrics on what a user brings: RAFT's weights, pyiqa, DOVER. The packages are stood in for by fakes."""

import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

from eval.metrics import metrics_for
from eval.metrics.dover import fused, views
from eval.metrics.flow import raft
from flashvsr.base.cli import UserError


def clip(frames=7, size=(224, 256)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (frames, *size, 3), dtype=np.uint8)


def scored(names, frames, hr=None, **more):
    scoring = metrics_for(names, **more).start()
    scoring.push(frames, hr)
    return scoring.finish()


def test_raft_is_torchvisions_with_the_weights_found_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="raft_large_C_T_SKHT_V2"):
        metrics_for(["ewarp"], flow="raft")
    from torchvision.models.optical_flow import raft_large

    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "raft_large_test.pth"
    with torch.random.fork_rng(devices=[]):
        model = raft_large(weights=None).eval()
    torch.save(model.state_dict(), file)
    flow = raft()
    assert flow.name == "raft" and file.name in flow.description
    a, b = (torch.from_numpy(f).movedim(-1, 0)[None] / 255 for f in clip(2, (128, 132)))
    with torch.no_grad():
        pad = [torch.nn.functional.pad(2 * x - 1, (0, 4, 0, 0), mode="replicate") for x in (a, b)]
        assert torch.equal(flow.between(a, b), model(*pad)[-1][..., :132])
    with pytest.raises(UserError, match="128x128"):
        flow.between(a[..., :100], b[..., :100])
    file.write_bytes(b"cut short")
    with pytest.raises(UserError, match="not a checkpoint of raft_large"):
        raft()


def fake_pyiqa(monkeypatch, create):
    module = types.ModuleType("pyiqa")
    module.__spec__ = ModuleSpec("pyiqa", None)
    module.create_metric = create
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    monkeypatch.setattr("eval.metrics.pyiqa.version", lambda name: "9.9")


def test_pyiqas_metrics_get_rgb_in_0_1_and_their_direction(monkeypatch):
    class Model:
        def __init__(self, name):
            self.metric_mode, self.lower_better = ("FR", True) if name == "dists" else ("NR", False)

        def __call__(self, x, y=None):
            assert x.shape[1] == 3 and x.max() <= 1
            return x.mean(dim=(1, 2, 3))[:, None] if y is None else (x - y).abs().mean(dim=(1, 2, 3))

    fake_pyiqa(monkeypatch, lambda name, device: Model(name))
    sr, hr = clip(3), 255 - clip(3)
    suite = metrics_for(["musiq", "dists"])
    assert [(m.higher, m.needs_gt) for m in suite.metrics] == [(True, False), (False, True)]
    assert "pyiqa 9.9 musiq" in suite.metrics[0].description
    found = scored(["musiq", "dists"], sr, hr)
    assert found["musiq"].clip == pytest.approx(sr.mean() / 255, rel=1e-4)
    assert found["dists"].clip == pytest.approx(np.abs(sr.astype(float) - hr).mean() / 255, rel=1e-4)


def test_a_missing_package_or_weight_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("eval.metrics.pyiqa.find_spec", lambda name: None)
    with pytest.raises(UserError, match="musiq needs the package pyiqa.*non-commercial"):
        metrics_for(["musiq"])

    def offline(name, device):
        raise OSError("no route to host")

    monkeypatch.undo()
    fake_pyiqa(monkeypatch, offline)
    with pytest.raises(UserError, match="cannot get the weights of musiq: no route"):
        metrics_for(["musiq"])
    with pytest.raises(UserError, match="say which file"):
        metrics_for(["dover_overall"])
    with pytest.raises(UserError, match="nowhere.pth do not exist"):
        metrics_for(["dover_overall"], dover="nowhere.pth")
    (tmp_path / "broken.pt").write_bytes(b"no model")
    with pytest.raises(UserError, match="broken.pt is not a DOVER model"):
        metrics_for(["dover_overall"], dover=tmp_path / "broken.pt")
    (tmp_path / "DOVER.pth").write_bytes(b"")
    with pytest.raises(UserError, match="needs the package dover"):
        metrics_for(["dover_overall"], dover=tmp_path / "DOVER.pth")
    (tmp_path / "dover.onnx").write_bytes(b"")
    monkeypatch.setattr("eval.metrics.dover.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package onnxruntime"):
        metrics_for(["dover_overall"], dover=tmp_path / "dover.onnx")


class Branches(torch.nn.Module):
    """Stands in for DOVER: raw scores near what the real branches give."""

    def forward(self, aesthetic: torch.Tensor, technical: torch.Tensor):
        assert aesthetic.shape == (1, 3, 32, 224, 224) and technical.shape == (3, 3, 32, 224, 224)
        return 0.01 * aesthetic.mean() - 0.08, 0.01 * technical.mean().reshape(1, 1) + 0.1


def test_dover_on_a_torchscript_file_names_both_branches(tmp_path):
    torch.jit.script(Branches()).save(str(tmp_path / "dover.pt"))
    frames = clip(8)
    found = scored(["dover_technical", "dover_overall"], frames, dover=tmp_path / "dover.pt")
    mean = np.array([123.675, 116.28, 103.53])
    std = np.array([58.395, 57.12, 57.375])
    technical = 0.01 * ((frames.mean((0, 1, 2)) - mean) / std).mean() + 0.1
    assert found["dover_technical"].clip == pytest.approx(100 * technical, rel=2e-2)
    assert 0 < found["dover_overall"].clip < 1 and len(found["dover_overall"].per_frame) == 0
    small = scored(["dover_technical"], clip(2, (100, 120)), dover=tmp_path / "dover.pt")
    assert 5 < small["dover_technical"].clip < 15


def test_dovers_fusion_is_that_of_its_release():
    assert fused(0.1107, -0.08285) == 0.5
    assert fused(0.1107 + 0.07355, -0.08285) == pytest.approx(1 / (1 + np.exp(-0.6104)))
    assert fused(0.1107, -0.08285 + 0.03774) == pytest.approx(1 / (1 + np.exp(-0.3896)))


def test_dovers_views_take_the_frames_its_sampler_takes():
    rows = torch.zeros(240, 2, 3, 1, 1, dtype=torch.uint8)
    rows += torch.arange(240, dtype=torch.uint8)[:, None, None, None, None]
    aesthetic, technical = views(rows, 3)
    back = [(v[..., 0, 0][:, 0] * 58.395 + 123.675).round().int().tolist() for v in (aesthetic, technical)]
    assert back[0][0] == [7 * i + 2 for i in range(32)]
    assert back[1] == [[80 * i + 8 + 2 * k for k in range(32)] for i in range(3)]
    _, short = views(rows[:10], 3)  # a clip shorter than the views goes round
    assert (short[..., 0, 0][1, 0] * 58.395 + 123.675).round().tolist()[:5] == [3, 5, 7, 9, 1]
