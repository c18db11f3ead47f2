"""What a file that does not fit looks like: one clause that names it and says what to do."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

WRAPPERS = {
    "module.": "DataParallel or DDP",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "model.diffusion_model.": "ComfyUI",
    "model.": "a training framework",
    "pipe.dit.": "DiffSynth",
    "dit.": "a pipeline",
    "base_model.model.": "PEFT",
}
ADAPTER = re.compile(r"lora_|\.lora|_lora|\.hada_|\.lokr_|\.dora_")
T2V = "FlashVSR starts from Wan2.1-T2V-1.3B"
ENCODER = "`python -m flashvsr prompt` makes the prompt embedding with it"
# A name that only this module has -> what it is and what to do with it. The first that is there counts.
FACES = (
    ("img_emb.proj.1.weight", f"a Wan image-to-video model; {T2V}, text to video"),
    (
        "condition_embedder.image_embedder.norm1.weight",
        f"a Wan image-to-video model of diffusers; {T2V}, text to video",
    ),
    ("vace_patch_embedding.weight", f"a Wan VACE model; {T2V}"),
    ("blocks.0.self_attn.q.weight", "a Wan DiT"),
    ("blocks.0.attn1.to_q.weight", "a Wan transformer of diffusers, a DiT"),
    ("token_embedding.weight", f"Wan's UMT5 text encoder; {ENCODER}"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", f"a T5 text encoder of transformers; {ENCODER}"),
    ("visual.patch_embedding.weight", "a CLIP image encoder, which FlashVSR does not use"),
    ("encoder.conv_in.weight", "a VAE of diffusers; take the original Wan2.1_VAE.pth"),
    ("encoder.downsamples.0.residual.0.gamma", "Wan's VAE, whose file is Wan2.1_VAE.pth"),
    ("linear_layers.0.weight", "an LR projector, whose file is LQ_proj_in.ckpt"),
    ("decoder.5.conv.0.weight", "a TC decoder, whose file is TCDecoder.ckpt"),
)  # fmt: skip
OWN_FACE = {
    "DiT": ("blocks.0.self_attn.q.weight",),
    "LRProjector": ("linear_layers.0.weight",),
    "TCDecoder": ("decoder.5.conv.0.weight",),
    "WanVAE": ("encoder.downsamples.0.residual.0.gamma",),
    "UMT5EncoderModel": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
}
WIDTHS = {5120: "Wan2.1-14B", 3072: "Wan2.2-TI2V-5B"}


def looks_like(state: Mapping[str, Tensor], module: str) -> str | None:
    """What a file given for `module` (a class name) looks like instead; None when nothing speaks."""
    adapters = [name for name in state if ADAPTER.search(name)]
    if adapters:
        rank = min(min(state[name].shape, default=0) for name in adapters)
        return f"it holds {len(adapters)} tensors of a LoRA of rank {rank}: merge it into its base first"
    if any(re.search(r"(^|\.)exp_avg(_sq)?$", name) for name in state):
        return "it holds an optimizer's state, not weights: take the model's file"
    for prefix, by in WRAPPERS.items():
        if state and all(name.startswith(prefix) for name in state):
            return f"every name begins with {prefix!r}, as {by} leaves it: save the plain module's state dict"
    width = state.get("patch_embedding.weight")
    if width is not None and width.ndim and width.shape[0] in WIDTHS:
        return f"it is {WIDTHS[width.shape[0]]}, {width.shape[0]} wide; {T2V}"
    for name, what in FACES:
        if name in state:
            return None if name in OWN_FACE[module] else f"it looks like {what}"
    return None


def foreign_content(content: object) -> str:
    """The same for a torch file that is not a plain mapping of tensors."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}; give the release's file"
    keys = {str(key) for key in content}
    if {"ds_version", "dp_world_size", "ds_config", "param_shapes"} & keys:
        return "a DeepSpeed checkpoint; make one state dict of it with its `zero_to_fp32.py`"
    if "param_groups" in keys or {"optimizer_state_dict"} & keys and not {"state_dict", "model"} & keys:
        return "an optimizer's state; take the model's file"
    for key in ("state_dict", "model", "module", "model_state_dict", "params", "params_ema", "ema"):
        if isinstance(content.get(key), Mapping):
            return f"a training checkpoint whose weights are under {key!r}; save that alone"
    return f"{', '.join(sorted(keys)[:6]) or 'nothing'}; give the release's file"


def foreign_folder(names: Collection[str]) -> str:
    """What a folder without any known file is, by its file names; empty when nothing speaks."""
    signs = (
        (r".*\.(part|incomplete|crdownload|aria2|download|tmp)", "a download that has not finished ({})"),
        (r"zero_to_fp32\.py|.*zero_pp_rank_.*|.*mp_rank_\d+_model_states\.pt|global_step\d+",
         "a DeepSpeed checkpoint ({}); make one state dict of it with its `zero_to_fp32.py`"),
        (r".*\.distcp", "a distributed checkpoint of torch ({}); save it as one state dict"),
        (r"adapter_config\.json|adapter_model\..*|pytorch_lora_weights\..*",
         "a LoRA ({}); merge it into its base first"),
        (r".*\.gguf", "GGUF files ({}), which are not read; take safetensors"),
        (r"spiece\.model|models_t5.*|.*umt5.*", "a text encoder ({}); `python -m flashvsr prompt` uses it"),
    )  # fmt: skip
    for pattern, what in signs:
        for name in sorted(names):
            if re.fullmatch(pattern, name):
                return what.format(name)
    return ""


def listed(names: Collection[str], most: int = 40) -> str:
    """Names for a sentence, numbered ones gathered: `blocks.0-29.norm3.bias`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        key = name if number is None else f"{name[: number.start()]}#{name[number.end() :]}"
        groups.setdefault(key, []).append(-1 if number is None else int(number[0]))
    shown = [
        key if numbers == [-1] else key.replace("#", _ranges(sorted(numbers)), 1)
        for key, numbers in groups.items()
    ]
    shown.sort()
    more = [f"and {len(shown) - most} more"] if len(shown) > most else []
    return ", ".join([*shown[:most], *more])


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return ",".join("-".join(str(n) for n in run) for run in runs)
