"""What the files of a model folder are called, who makes them, and what their tensors' shapes say.

Shapes tell every width of a module; what they cannot tell (number of heads, block size, the projector's
temporal mode) is in `flashvsr.json`, or has the value of the only release without one: Wan2.1 with heads of
128 and blocks of 2x8x8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from flashvsr.base.cli import UserError
from flashvsr.config import DiTConfig, ProjectorConfig, TCDecoderConfig, VAEConfig

Shapes = Mapping[str, Sequence[int]]

INFO_FILE = "flashvsr.json"
# The release's file names: inference packages look for exactly these.
FILES = {
    "dit": "diffusion_pytorch_model_streaming_dmd.safetensors",
    "lr_projector": "LQ_proj_in.ckpt",
    "tc_decoder": "TCDecoder.ckpt",
    "vae": "Wan2.1_VAE.pth",
    "prompt": "posi_prompt.pth",
}
WAN_DIT = "diffusion_pytorch_model.safetensors"  # in a Wan2.1-T2V-1.3B folder
# Others store the same parts with other suffixes.
SUFFIXES = (".safetensors", ".pth", ".ckpt", ".pt", ".bin")
STEMS = {part: name.rsplit(".", 1)[0] for part, name in (*FILES.items(), ("wan", WAN_DIT))}
SINGLE_KEY = "flashvsr"  # of our description in the metadata of a single file
WAN_HEAD_DIM = 128

# For sentences: the training stage that makes a part.
MADE_BY = {
    "vae": "stage=vae",
    "dit": "stage=1",
    "lr_projector": "stage=1",
    "prompt": "stage=1",
    "tc_decoder": "stage=decoder",
}
CALLED = {
    "dit": "DiT",
    "lr_projector": "LR projector",
    "tc_decoder": "TC decoder",
    "vae": "VAE",
    "prompt": "prompt embedding",
}


RELEASES = {"1": "v1", "1.0": "v1", "1_0": "v1", "1.1": "v1.1", "1_1": "v1.1"}


def release_in(name: str) -> str | None:
    """The release a folder's name says unmistakably, v1 or v1.1: `FlashVSR-v1.1`, `FlashVSR_v1`, also behind
    `models--OWNER--`. Plain `FlashVSR` does not: both releases are kept under that name."""
    if not re.match(r"(?:models--.+--)?flashvsr", name.lower()):
        return None
    said = set(re.findall(r"(?:(?<=flashvsr)|(?<=[-_ ]))v(\d+(?:[._]\d+)*)(?=[-_ ]|$)", name.lower()))
    return RELEASES.get(said.pop()) if len(said) == 1 else None


def dit_config(shapes: Shapes, heads: int | None = None, eps: float = 1e-6) -> DiTConfig:
    """Widths of the transformer; `heads` defaults to Wan's 128 channels per head. KeyError without them."""
    dim, in_channels = shapes["patch_embedding.weight"][:2]
    if heads is None and dim % WAN_HEAD_DIM:
        raise UserError(
            f"a DiT {dim} wide is none of Wan's (heads of {WAN_HEAD_DIM}), and nothing says how many heads "
            f"it has; give a folder with {INFO_FILE} or diffusers' config.json"
        )
    return DiTConfig(
        dim=dim,
        ffn=shapes["blocks.0.ffn.0.weight"][0],
        layers=1 + max(int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))),
        heads=heads or dim // WAN_HEAD_DIM,
        freq_dim=shapes["time_embedding.0.weight"][1],
        text_dim=shapes["text_embedding.0.weight"][1],
        in_channels=in_channels,
        eps=eps,
    )


def projector_config(shapes: Shapes, mode: str) -> ProjectorConfig:
    """Widths of LR Proj-In, of the given temporal mode."""
    return ProjectorConfig(
        hidden1=shapes["conv1.weight"][0],
        hidden2=shapes["conv2.weight"][0],
        out_dim=shapes["linear_layers.0.weight"][0],
        layer_num=sum(bool(re.fullmatch(r"linear_layers\.\d+\.weight", name)) for name in shapes),
        mode=mode,
    )


def vae_config(shapes: Shapes) -> VAEConfig:
    """Widths of the VAE, with Wan's latent statistics."""
    return VAEConfig(dim=shapes["encoder.conv1.weight"][0], z_dim=shapes["conv2.weight"][0])


def tc_decoder_config(shapes: Shapes) -> TCDecoderConfig:
    """Widths of the TC decoder: its input is the latent beside 768 condition channels."""
    channels = tuple(shapes[f"decoder.{i}.weight"][0] for i in ("1", "10", "16", "22"))
    return TCDecoderConfig(channels, shapes["decoder.1.weight"][1] - 768)
