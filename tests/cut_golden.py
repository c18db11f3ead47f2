"""Cuts the golden tensor files down to what a repository can hold: `python -m tests.cut_golden FROM TO`.

Below 1 MB each, and exact: what stays are numbers of the full files, and what they need.

- `misc` stays whole.
- `wan_vae`: in a clip's first frame every causal convolution sees zeros in the past, so only its last
  temporal tap counts, and the temporal convolutions of the resampling are not used. Kept are these taps and
  the first frame, encoder and decoder in a file each. `restore_vae` fills the rest with zeros.

The others are left out, their weights alone are larger (dit_stream 1.3 MB, tc_decoder 1.8, lr_proj_* 2.8,
pipeline_* 5.3) and enter even the smallest output in full. Tests use the full files where they are at hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashvsr.config import VAEConfig
from flashvsr.models.wan_vae import WanVAE

ENCODER, DECODER = ("vae.encoder.", "vae.conv1."), ("vae.decoder.", "vae.conv2.")


def last_taps(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the first frame needs of the VAE's weights: of 3-D kernels `C_out C_in k h w` the last of k; no
    temporal convolutions."""
    return {
        name: w[:, :, -1:].clone() if w.ndim == 5 else w
        for name, w in weights.items()
        if "time_conv" not in name
    }


def restore_vae(weights: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """Whole weights again (names without `vae.`), zeros where the cut took something away."""
    whole = {}
    for name, like in WanVAE(VAEConfig(dim=dim)).state_dict().items():
        whole[name] = torch.zeros_like(like)
        if name in weights:
            w = weights[name]
            (whole[name][:, :, -1:] if w.ndim == 5 else whole[name]).copy_(w)
    return whole


def main(source: str, target: str) -> None:
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "misc.safetensors").write_bytes((Path(source) / "misc.safetensors").read_bytes())
    with safe_open(Path(source) / "wan_vae.safetensors", "pt") as handle:
        meta = handle.metadata() | {"cut": "first frame"}
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    first = {name: tensors[name][:, :, :1].contiguous() for name in ("video", "latent", "decoded")}
    for half, prefixes, kept in (
        ("encoder", ENCODER, ("video", "latent")),
        ("decoder", DECODER, ("latent", "decoded")),
    ):
        weights = last_taps({name: w for name, w in tensors.items() if name.startswith(prefixes)})
        content = weights | {name: first[name] for name in kept}
        save_file(content, folder / f"wan_vae_{half}.safetensors", meta)
    for path in sorted(folder.glob("*.safetensors")):
        print(f"{path.name:28s} {path.stat().st_size:8d} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
