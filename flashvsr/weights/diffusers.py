"""The Wan transformer as diffusers names it (`WanTransformer3DModel`): names and config, both ways.

The tensors are the same, only their names differ, and the functions agree: rotary angles, norms, modulation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from flashvsr.base.cli import UserError
from flashvsr.config import DiTConfig

V = TypeVar("V")
CLASS = "WanTransformer3DModel"
FOLDER, FILE = "transformer", "diffusion_pytorch_model.safetensors"

_ATTENTION = (("attn1", "self_attn"), ("attn2", "cross_attn"))
# diffusers -> Wan2.1, without .weight and .bias: inside a block, and outside
_BLOCK = {
    **{f"{theirs}.to_{x}": f"{ours}.{x}" for theirs, ours in _ATTENTION for x in "qkv"},
    **{f"{theirs}.to_out.0": f"{ours}.o" for theirs, ours in _ATTENTION},
    **{f"{theirs}.norm_{x}": f"{ours}.norm_{x}" for theirs, ours in _ATTENTION for x in "qk"},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}
_TOP = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_BLOCK_BACK = {ours: theirs for theirs, ours in _BLOCK.items()}
_TOP_BACK = {ours: theirs for theirs, ours in _TOP.items()}


def is_diffusers(names: Collection[str]) -> bool:
    """Whether tensor names are those of diffusers' Wan transformer."""
    return any(name.startswith("condition_embedder.") for name in names)


def to_wan(name: str) -> str:
    """A tensor's original Wan2.1 name; names that are no part of the transformer stay."""
    return _rename(name, _BLOCK, _TOP)


def from_wan(name: str) -> str:
    """A tensor's name in diffusers."""
    return _rename(name, _BLOCK_BACK, _TOP_BACK)


def _rename(name: str, block: Mapping[str, str], top: Mapping[str, str]) -> str:
    inside, stem, leaf = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name).groups("")
    return inside + (block if inside else top).get(stem, stem) + leaf


def renamed(state: Mapping[str, V], back: bool = False) -> dict[str, V]:
    """All of a state dict: diffusers' names to Wan's, or `back`."""
    return {(from_wan if back else to_wan)(name): value for name, value in state.items()}


def config_json(config: DiTConfig) -> dict[str, Any]:
    """What `transformer/config.json` says."""
    return {
        "_class_name": CLASS,
        "_diffusers_version": "0.35.0",
        "patch_size": [1, 2, 2],
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn,
        "num_layers": config.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def read_config(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Heads, layers and eps from a `config.json`; UserError when it is another kind of transformer."""
    if values.get("image_dim") or values.get("added_kv_proj_dim"):
        raise UserError(f"{where} describes a Wan image-to-video model; take Wan2.1-T2V-1.3B, text to video")
    fixed = {"patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True}
    for key, value in fixed.items():
        if values.get(key, value) != value:
            raise UserError(f"{where} has {key}={values[key]!r}; only Wan2.1's {value!r} is known here")
    try:
        return {"heads": int(values["num_attention_heads"]), "layers": int(values["num_layers"]),
                "eps": float(values.get("eps", 1e-6))}  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} lacks a whole value ({error}); download it again") from None
