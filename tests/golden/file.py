"""One golden file: tensors, metadata with defaults, modules from weights, rows of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eval.baselines.basicvsr import Recurrent
from eval.baselines.weights import network_of
from flashvsr.base.cli import UserError
from flashvsr.config import VAEConfig
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights import names

ACTIVATION, FRAMES, STATISTICS, SCHEDULE, WEIGHTS, BASELINE = 2e-5, 2e-4, 2e-5, 2e-7, 2e-6, 1e-4
VARIANTS = {"buffer": "buffer", "causal": "causal", "v1": "buffer", "v1.1": "causal", "v11": "causal"}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Row:
    """One comparison. `ties`: pairs of a mask that differ within the tie rule; they do not fail it."""

    name: str
    error: float
    tolerance: float
    note: str = ""
    ties: int = 0

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    @property
    def verdict(self) -> str:
        return "FAIL" if not self.passed else "tie" if self.ties else "ok"


class Golden:
    """Floating point tensors come as float32. What was asked for is noted, so that the rest can be named."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with safe_open(path, "pt") as handle:
                self.meta = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as a safetensors file: {error}") from None
        self.tensors = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
        self.used: set[str] = set()
        self.notes: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"{self.path} lacks the tensor {name!r}, without which nothing can be computed")
        self.used.add(name)
        return self.tensors[name]

    def setting(self, name: str, default: float | None = None) -> float:
        """A number of the metadata; UserError when it is none, or missing without a default."""
        text = self.meta.get(name)
        if text is None:
            if default is None:
                raise UserError(f"{self.path} does not say {name!r} in its metadata")
            return default
        try:
            return float(text)
        except ValueError:
            raise UserError(f"{self.path}: the metadata's {name}={text!r} is no number") from None

    def word(self, name: str, known: dict[str, str], default: str) -> str:
        """A word of the metadata, as this code calls it; UserError for an unknown one."""
        text = self.meta.get(name)
        if text is None:
            self.notes.append(f"the metadata does not say {name}: taken as {default}")
            return default
        if text.lower() not in known:
            raise UserError(f"{self.path}: {name}={text!r} is unknown; there are {', '.join(known)}")
        return known[text.lower()]

    def compare(
        self, name: str, ours: Tensor, tolerance: float, theirs: Tensor | None = None, note: str = ""
    ) -> Row:
        """`ours` beside the file's tensor of that name, or beside `theirs`."""
        theirs = self[name] if theirs is None else theirs
        if ours.shape != theirs.shape:
            return Row(name, float("inf"), tolerance, f"shape {tuple(ours.shape)} != {tuple(theirs.shape)}")
        if theirs.dtype == torch.bool:
            differing = float((ours != theirs).sum())
            return Row(name, differing, tolerance, note or ("entries differ" if differing else ""))
        error = (ours.double() - theirs.double()).abs()
        return Row(name, error.max().item() if error.numel() else 0.0, tolerance, note)

    # ---- modules ----------------------------------------------------------------------------------------

    def _fill(
        self,
        prefix: str,
        make: Callable[[Shapes], nn.Module],
        optional: tuple[str, ...] = (),
    ) -> nn.Module:
        """The module with the file's weights behind `prefix`. Missing is only what begins with one of
        `optional`; what the module has no place for is left, and named with the unused tensors."""
        weights = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        try:
            module = make({name: tuple(t.shape) for name, t in weights.items()})
        except (KeyError, ValueError, IndexError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{self.path}: no module can be made of the weights {prefix}*: {what}") from None
        own = module.state_dict()
        missing = [n for n in own if n not in weights and not n.startswith(optional or ("\0",))]
        other = [n for n in own if n in weights and own[n].shape != weights[n].shape]
        if missing or other:
            raise UserError(
                f"{self.path}: the weights {prefix}* do not fit: "
                f"missing {missing[:4]}, of another shape {other[:4]}"
            )
        module.load_state_dict({n: weights[n] for n in own if n in weights}, strict=False)
        self.used.update(prefix + n for n in own)
        return module.requires_grad_(False)

    def dit(self) -> DiT:
        heads, eps = int(self.setting("heads")), self.setting("eps", 1e-6)
        dit = self._fill("dit.", lambda shapes: DiT(names.dit_config(shapes, heads, eps)))
        dit.set_prompt(self["context"])
        return dit

    def projector(self) -> LRProjector:
        mode = self.word("lr_variant" if "lr_variant" in self.meta else "variant", VARIANTS, "causal")
        return self._fill("lr_proj.", lambda shapes: LRProjector(names.projector_config(shapes, mode)))

    def tc_decoder(self) -> TCDecoder:
        return self._fill("tc_decoder.", lambda shapes: TCDecoder(names.tc_decoder_config(shapes)))

    def vae(self) -> WanVAE:
        """With one half at least: the other's weights are needed only for what they compute."""

        def make(shapes: Shapes) -> WanVAE:
            encoder = "encoder.conv1.weight" in shapes
            dim = shapes["encoder.conv1.weight"][0] if encoder else shapes["decoder.head.2.weight"][1]
            z_dim = shapes["conv2.weight"][0] if "conv2.weight" in shapes else shapes["conv1.weight"][0] // 2
            return WanVAE(VAEConfig(dim=dim, z_dim=z_dim))

        halves = (("encoder.", "conv1."), ("decoder.", "conv2."))
        present = [h for h in halves if any(n.startswith(f"vae.{h[0]}") for n in self.tensors)]
        absent = tuple(prefix for h in halves if h not in present for prefix in h)
        return self._fill("vae.", make, absent if present else ())

    def baseline(self, kind: str) -> Recurrent:
        """BasicVSR or IconVSR; unlike the modules above it knows every name, so none may be left over."""
        weights = {n: t for n, t in self.tensors.items() if n.startswith("model.")}
        self.used.update(weights)
        network = network_of(kind, {n.removeprefix("model."): t for n, t in weights.items()}, str(self.path))
        if kind == "iconvsr":
            network.keyframe_stride = int(self.setting("keyframe_stride", network.keyframe_stride))
        return network.requires_grad_(False)

    def unused(self) -> list[str]:
        """Tensors that nothing here asked for."""
        return sorted(self.tensors.keys() - self.used)
