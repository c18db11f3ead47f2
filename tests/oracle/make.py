"""Files of the golden form with random weights, of any size: the oracle computes what they hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.oracle.files import Tensors, recompute

DEFAULTS: dict[str, dict[str, Any]] = {
    "dit_stream": dict(
        dim=48, ffn=64, heads=2, layers=2, freq_dim=32, text_dim=16, text_len=5, rows=8, columns=16, chunks=3,
        first=6, batch=1, topk_ratio=0.75, kv_ratio=3.0, local_range=None, eps=1e-6,
        timestep=1000.0, lr_tokens=True,
    ),
    "lr_proj": dict(variant="causal", hidden1=4, hidden2=6, out_dim=8, layer_num=1, frames=13, height=32,
                    width=48, batch=1),
    "tc_decoder": dict(channels=(8, 6, 4, 4), latents=(6, 2), height=4, width=6, batch=1),
    "wan_vae": dict(vae_dim=4, frames=9, height=16, width=24, batch=1),
    "pipeline": dict(
        dim=24, ffn=32, heads=2, layers=2, freq_dim=16, text_dim=8, text_len=4, topk_ratio=1.5, kv_ratio=3.0,
        local_range=None, eps=1e-6, lr_variant="causal", hidden1=2, hidden2=3, layer_num=1, decoder="tc",
        channels=(6, 4, 4, 4), vae_dim=4, color_fix="adain", frames=33, height=128, width=256,
    ),
    "basicvsr": dict(num_feat=6, num_block=2, detail=4, flow=(6, 8, 6, 4), frames=4, height=35, width=44,
                     batch=1),
    "iconvsr": dict(num_feat=8, num_block=1, detail=4, flow=(6, 8, 6, 4), window=5, edvr_blocks=1, groups=4,
                    keyframe_stride=5, frames=6, height=18, width=23, batch=1),
}  # fmt: skip


class Maker:
    """Random tensors, one after the other from one seed, as a trained network's would be in size."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=self.generator)

    def layer(self, name: str, *shape: int, bias: bool = True) -> Tensors:
        """A linear layer or convolution `C_out C_in ...` that keeps variance."""
        fan_in = max(1, torch.Size(shape[1:]).numel())
        made = {f"{name}.weight": self.normal(*shape, scale=fan_in**-0.5)}
        return made | ({f"{name}.bias": self.normal(shape[0], scale=0.1)} if bias else {})

    def gain(self, name: str, *shape: int) -> Tensors:
        return {name: 1 + self.normal(*shape, scale=0.2)}

    def dit(self, s: Mapping[str, Any]) -> Tensors:
        d = s["dim"]
        w = self.layer("patch_embedding", d, 16, 1, 2, 2)
        w |= self.layer("text_embedding.0", d, s["text_dim"]) | self.layer("text_embedding.2", d, d)
        w |= self.layer("time_embedding.0", d, s["freq_dim"]) | self.layer("time_embedding.2", d, d)
        w |= self.layer("time_projection.1", 6 * d, d) | self.layer("head.head", 64, d)
        w["head.modulation"] = self.normal(1, 2, d, scale=0.3)
        for i in range(s["layers"]):
            at = f"blocks.{i}"
            w[f"{at}.modulation"] = self.normal(1, 6, d, scale=0.3)
            for attention in ("self_attn", "cross_attn"):
                for part in "qkvo":
                    w |= self.layer(f"{at}.{attention}.{part}", d, d)
                for norm in ("norm_q", "norm_k"):
                    w |= self.gain(f"{at}.{attention}.{norm}.weight", d)
            w |= self.gain(f"{at}.norm3.weight", d) | {f"{at}.norm3.bias": self.normal(d, scale=0.1)}
            w |= self.layer(f"{at}.ffn.0", s["ffn"], d) | self.layer(f"{at}.ffn.2", d, s["ffn"])
        return w

    def projector(self, hidden1: int, hidden2: int, out_dim: int, layer_num: int) -> Tensors:
        w = self.layer("conv1", hidden1, 768, 4, 3, 3) | self.gain("norm1.gamma", hidden1, 1, 1, 1)
        w |= self.layer("conv2", hidden2, hidden1, 4, 3, 3) | self.gain("norm2.gamma", hidden2, 1, 1, 1)
        for i in range(layer_num):
            w |= self.layer(f"linear_layers.{i}", out_dim, hidden2)
        return w

    def tc_decoder(self, channels: tuple[int, int, int, int]) -> Tensors:
        a, b, c, d = channels
        w = self.layer("decoder.1", a, 784, 3, 3) | self.layer("decoder.3", a, a, 3, 3, bias=False)
        for first, width, following, times in ((5, a, b, 1), (11, b, c, 2), (17, c, d, 2)):
            for i in range(first, first + 3):
                w |= self.layer(f"decoder.{i}.conv.0", width, 2 * width, 3, 3)
                w |= self.layer(f"decoder.{i}.conv.2", width, width, 3, 3)
                w |= self.layer(f"decoder.{i}.conv.4", width, width, 3, 3)
            w |= self.layer(f"decoder.{first + 4}.conv", width * times, width, 1, 1, bias=False)
            w |= self.layer(f"decoder.{first + 5}", following, width, 3, 3, bias=False)
        return w | self.layer("decoder.24", d, d, 3, 3, bias=False) | self.layer("decoder.26", 3, d, 3, 3)

    def _residual(self, at: str, c_in: int, c_out: int) -> Tensors:
        w = self.gain(f"{at}.residual.0.gamma", c_in, 1, 1, 1)
        w |= self.gain(f"{at}.residual.3.gamma", c_out, 1, 1, 1)
        w |= self.layer(f"{at}.residual.2", c_out, c_in, 3, 3, 3)
        w |= self.layer(f"{at}.residual.6", c_out, c_out, 3, 3, 3)
        return w if c_in == c_out else w | self.layer(f"{at}.shortcut", c_out, c_in, 1, 1, 1)

    def vae(self, dim: int, *, encoder: bool = True) -> Tensors:
        w: Tensors = {}
        for half in ("encoder", "decoder") if encoder else ("decoder",):
            down = half == "encoder"
            widths = (
                [dim, dim, 2 * dim, 4 * dim, 4 * dim] if down else [4 * dim, 4 * dim, 4 * dim, 2 * dim, dim]
            )
            w |= self.layer(f"{half}.conv1", widths[0], 3 if down else 16, 3, 3, 3)
            top = 4 * dim
            for i in (0, 2):
                w |= self._residual(f"{half}.middle.{i}", top, top)
            w |= self.gain(f"{half}.middle.1.norm.gamma", top, 1, 1)
            w |= self.layer(f"{half}.middle.1.to_qkv", 3 * top, top, 1, 1)
            w |= self.layer(f"{half}.middle.1.proj", top, top, 1, 1)
            number = 0
            for level in range(4):
                c_in, c_out = widths[level], widths[level + 1]
                for i in range(2 if down else 3):
                    at = f"{half}.{'down' if down else 'up'}samples.{number}"
                    halved = c_in if down or level == 0 else c_in // 2
                    w |= self._residual(at, halved if i == 0 else c_out, c_out)
                    number += 1
                if level == 3:
                    continue
                at = f"{half}.{'down' if down else 'up'}samples.{number}"
                w |= self.layer(f"{at}.resample.1", c_out if down else c_out // 2, c_out, 3, 3)
                if level > 0 if down else level < 2:
                    w |= self.layer(f"{at}.time_conv", c_out if down else 2 * c_out, c_out, 3, 1, 1)
                number += 1
            w |= self.gain(f"{half}.head.0.gamma", widths[-1], 1, 1, 1)
            w |= self.layer(f"{half}.head.2", 32 if down else 3, widths[-1], 3, 3, 3)
        w |= self.layer("conv2", 16, 16, 1, 1, 1)
        return w | self.layer("conv1", 32, 32, 1, 1, 1) if encoder else w

    def recurrent(self, kind: str, s: Mapping[str, Any]) -> Tensors:
        n, d, flow = s["num_feat"], s["detail"], (8, *s["flow"], 2)
        w = {"spynet.mean": torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)}
        w |= {"spynet.std": torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)}
        for level in range(6):
            for i in range(5):
                at = f"spynet.basic_module.{level}.basic_module.{2 * i}"
                w |= self.layer(at, flow[i + 1], flow[i], 7, 7)
            w[f"{at}.weight"] *= 0.2  # coarse flow is doubled five times: a few pixels in all
        coupled = kind == "iconvsr"
        for trunk, c_in in (("backward_trunk", n + 3), ("forward_trunk", n + 3 + n * coupled)):
            w |= self.layer(f"{trunk}.main.0", n, c_in, 3, 3)
            w |= self._blocks(f"{trunk}.main.2", s["num_block"], n)
        if coupled:
            w |= self.layer("backward_fusion", n, 2 * n, 3, 3) | self.layer("forward_fusion", n, 2 * n, 3, 3)
            w |= self.edvr(n, s["window"], s["edvr_blocks"], s["groups"])
        else:
            w |= self.layer("fusion", n, 2 * n, 1, 1)
        w |= self.layer("upconv1", 4 * n, n, 3, 3) | self.layer("upconv2", 4 * d, n, 3, 3)
        return w | self.layer("conv_hr", d, d, 3, 3) | self.layer("conv_last", 3, d, 3, 3)

    def _blocks(self, at: str, count: int, n: int) -> Tensors:
        layers = [f"{at}.{i}.conv{k}" for i in range(count) for k in (1, 2)]
        return {name: t for layer in layers for name, t in self.layer(layer, n, n, 3, 3).items()}

    def edvr(self, n: int, window: int, blocks: int, groups: int) -> Tensors:
        w = self.layer("conv_first", n, 3, 3, 3) | self._blocks("feature_extraction", blocks, n)
        single = ["conv_l2_1", "conv_l2_2", "conv_l3_1", "conv_l3_2", "fusion.temporal_attn1"]
        single += ["fusion.temporal_attn2", "fusion.spatial_attn3", "fusion.spatial_attn5"]
        single += ["fusion.spatial_attn_l3", "pcd_align.cas_offset_conv2", "pcd_align.offset_conv2.l3"]
        single += ["pcd_align.offset_conv3.l1", "pcd_align.offset_conv3.l2"]
        double = ["fusion.spatial_attn_l2", "pcd_align.cas_offset_conv1"]
        double += [f"pcd_align.offset_conv{k}.l{i}" for k in (1, 2) for i in (1, 2, 3) if (k, i) != (2, 3)]
        double += ["pcd_align.feat_conv.l1", "pcd_align.feat_conv.l2"]
        points = {"feat_fusion": window, "spatial_attn1": window, "spatial_attn2": 2, "spatial_attn4": 1}
        points |= {"spatial_attn_l1": 1, "spatial_attn_add1": 1, "spatial_attn_add2": 1}
        for names, wide in ((single, 1), (double, 2)):
            for name in names:
                w |= self.layer(name, n, wide * n, 3, 3)
        for name, wide in points.items():
            w |= self.layer(f"fusion.{name}", n, wide * n, 1, 1)
        for name in ("dcn_pack.l1", "dcn_pack.l2", "dcn_pack.l3", "cas_dcnpack"):
            w |= self.layer(f"pcd_align.{name}", n, n, 3, 3)
            w |= self.layer(f"pcd_align.{name}.conv_offset", 27 * groups, n, 3, 3)
        return _behind("edvr", w)

    def video(self, *shape: int) -> Tensor:
        """`... F H W` in [-1,1]: soft shapes that change with time, and noise."""
        coarse = torch.rand(*shape[:-2], 4, 5, generator=self.generator)
        soft = torch.nn.functional.interpolate(coarse.flatten(0, -4), size=shape[-2:], mode="bilinear")
        noise = torch.rand(*shape, generator=self.generator)
        return (1.6 * (soft.reshape(shape) - 0.5) + 0.4 * (noise - 0.5)).clamp(-1, 1)

    def blocky(self, batch: int, f: int, rows: int, columns: int, width: int) -> Tensor:
        """Tokens that differ from block to block, so that the choice of blocks is not one among equals."""
        coarse = self.normal(batch, f, rows // 8, columns // 8, width)
        coarse = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)
        return (coarse + self.normal(batch, f, rows, columns, width, scale=0.5)).flatten(1, 3)


def _behind(prefix: str, weights: Tensors) -> Tensors:
    return {f"{prefix}.{name}": t for name, t in weights.items()}


def _inputs(kind: str, s: Mapping[str, Any], maker: Maker) -> Tensors:
    """Weights and inputs."""
    if kind == "dit_stream":
        tensors = _behind("dit", maker.dit(s)) | {"context": maker.normal(1, s["text_len"], s["text_dim"])}
        for c in range(s["chunks"]):
            f = 2 if c else s["first"]
            tensors[f"chunk{c}.x"] = maker.normal(s["batch"], 16, f, 2 * s["rows"], 2 * s["columns"])
            tokens = maker.blocky(s["batch"], f, s["rows"], s["columns"], s["dim"])
            tensors |= {f"chunk{c}.lr_tokens": tokens} if s["lr_tokens"] else {}
        return tensors
    if kind == "lr_proj":
        weights = maker.projector(s["hidden1"], s["hidden2"], s["out_dim"], s["layer_num"])
        return _behind("lr_proj", weights) | {
            "video": maker.video(s["batch"], 3, s["frames"], s["height"], s["width"])
        }
    if kind == "tc_decoder":
        tensors = _behind("tc_decoder", maker.tc_decoder(s["channels"]))
        h, w = s["height"], s["width"]
        for c, n in enumerate(s["latents"]):
            tensors[f"chunk{c}.latent_NTCHW"] = maker.normal(s["batch"], n, 16, h, w)
            tensors[f"chunk{c}.cond_BCFHW"] = maker.video(s["batch"], 3, 4 * n - 3 * (c == 0), 8 * h, 8 * w)
        return tensors
    if kind == "wan_vae":
        video = maker.video(s["batch"], 3, s["frames"], s["height"], s["width"])
        return _behind("vae", maker.vae(s["vae_dim"])) | {"video": video}
    if kind in ("basicvsr", "iconvsr"):
        video = maker.video(s["batch"], 3, s["frames"], s["height"], s["width"])
        frames = (video.transpose(1, 2) + 1) / 2
        return _behind("model", maker.recurrent(kind, s)) | {"input_BNCHW": frames}
    tensors = _behind("dit", maker.dit(s)) | {"context": maker.normal(1, s["text_len"], s["text_dim"])}
    tensors |= _behind("lr_proj", maker.projector(s["hidden1"], s["hidden2"], s["dim"], s["layer_num"]))
    if s["decoder"] == "vae":
        tensors |= _behind("vae", maker.vae(s["vae_dim"], encoder=False))
    else:
        tensors |= _behind("tc_decoder", maker.tc_decoder(s["channels"]))
    video = maker.video(3, s["frames"], s["height"], s["width"])
    tensors["lq_uint8_CFHW"] = ((video + 1) * 127.5).round().to(torch.uint8)
    tensors["noise"] = maker.normal(1, 16, (s["frames"] - 1) // 4, s["height"] // 8, s["width"] // 8)
    tensors["frames_index"] = torch.arange(0, s["frames"] - 4, 3)
    return tensors


def make(kind: str, seed: int = 0, **settings: Any) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a file of that kind; `settings` override `DEFAULTS`. Outputs come from float64
    and are stored as float32."""
    unknown = settings.keys() - DEFAULTS[kind].keys()
    assert not unknown, unknown
    s = DEFAULTS[kind] | settings
    tensors = _inputs(kind, s, Maker(seed))
    meta = {name: str(value) for name, value in s.items() if value is not None}
    if kind == "wan_vae":  # decoded comes from the latent that the file holds
        with torch.no_grad():
            tensors["latent"] = recompute(tensors, meta)[0]["latent"].float()
    outputs, nearest = recompute(tensors, meta)
    stored = {n: t if t.dtype == torch.bool else t.float() for n, t in outputs.items()}
    meta["nearest"] = f"{nearest:.1e}"
    return tensors | stored, meta


def write(
    path: str | Path, tensors: Tensors, meta: Mapping[str, str], *, without: float = 0.0, seed: int = 0
):
    """Saves a file, leaving out each output with the probability `without`."""
    drawn = random.Random(seed)
    outputs = ("velocity", "mask", "final_cache", "full.", "stream.", "rgb", "decoded", "frame_", "output_")
    kept = {n: t for n, t in tensors.items() if not any(o in n for o in outputs) or drawn.random() >= without}
    save_file({n: t.contiguous() for n, t in kept.items()}, path, dict(meta))
