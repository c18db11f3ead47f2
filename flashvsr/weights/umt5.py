"""Encodes a prompt with a local UMT5 checkpoint through transformers, as Wan2.1 does.

Two forms of the same encoder are read: a folder of transformers (`config.json`, also `text_encoder/` of a
diffusers pipeline) and Wan's own file, `models_t5_umt5-xxl-enc-bf16.pth`, whose tokenizer is in
`google/umt5-xxl/` beside it. Nothing is downloaded.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashvsr.base.cli import UserError
from flashvsr.base.files import read_json, reading
from flashvsr.base.operators import declare_torchvision
from flashvsr.weights.load import fill
from flashvsr.weights.tensors import check_file, read_tensors

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

WAN_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
WAN_TOKENIZER = "google/umt5-xxl"
# Wan's names -> transformers', inside a block
_BLOCK = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_TOP = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}


def encode(
    text: str,
    encoder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    length: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, int]:
    """The embedding `1 length D` of `text` and the number of its tokens; zero behind them, as Wan pads it.

    encoder: folder or file (see above); tokenizer: its folder, when it is not where the encoder's form has
    it. The text is cleaned as Wan does (HTML entities, spaces, and for other than ASCII ftfy) and cut at
    `length` tokens. UserError when something is missing or is another encoder.
    """
    cleaned = clean(text)
    if not cleaned:
        raise UserError("the prompt is empty; give some text")
    weights, words = _locate(Path(encoder), None if tokenizer is None else Path(tokenizer))
    ids = torch.tensor([_tokens(cleaned, words, length)], device=device)
    model = _from_wan(weights, dtype, device) if weights.is_file() else _from_folder(weights, dtype, device)
    if int(ids.max()) >= model.config.vocab_size:
        raise UserError(
            f"{words} has more words than the encoder {weights}; take the tokenizer that goes with it"
        )
    with torch.inference_mode():
        # without padding: padded positions are masked out and change nothing
        states = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    embedding = torch.zeros(1, length, states.shape[2], dtype=dtype)
    embedding[:, : states.shape[1]] = states.to("cpu", dtype)
    return embedding, states.shape[1]


def clean(text: str) -> str:
    """Wan's cleaning: repaired encoding and straight quotes (ftfy), HTML entities, single spaces."""
    if not text.isascii():
        try:
            from ftfy import fix_text
        except ImportError:
            raise UserError(
                "this prompt has letters beyond ASCII: `pip install ftfy`, as Wan uses it"
            ) from None
        text = fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def _transformers() -> Any:
    declare_torchvision()
    try:
        import transformers
    except ImportError:
        raise UserError(
            "encoding a prompt needs transformers: `pip install transformers sentencepiece`"
        ) from None
    return transformers


def _locate(encoder: Path, tokenizer: Path | None) -> tuple[Path, Path]:
    """The folder or file of the weights, and the folder of the tokenizer."""
    with reading(encoder):
        encoder.stat()
    if encoder.is_dir() and not (encoder / "config.json").is_file() and (encoder / "text_encoder").is_dir():
        encoder = encoder / "text_encoder"
    elif (encoder / WAN_FILE).is_file():
        encoder = encoder / WAN_FILE
    if encoder.is_file():
        places = [encoder.parent / WAN_TOKENIZER, encoder.parent]
    elif (encoder / "config.json").is_file():
        places = [encoder, encoder.parent / "tokenizer"]
    else:
        raise UserError(f"{encoder} holds no UMT5: neither config.json nor text_encoder/ nor {WAN_FILE}")
    places = places if tokenizer is None else [tokenizer]
    for place in places:
        if any((place / name).is_file() for name in ("tokenizer.json", "spiece.model")):
            return encoder, place
    where = " nor ".join(str(place) for place in places)
    raise UserError(
        f"no tokenizer (tokenizer.json or spiece.model) in {where}; give its folder with --tokenizer"
    )


def _tokens(text: str, folder: Path, length: int) -> list[int]:
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is no tokenizer that can be read ({str(error).splitlines()[0]})") from None
    return tokenizer(text, truncation=True, max_length=length, add_special_tokens=True).input_ids


def _from_folder(folder: Path, dtype: torch.dtype, device: torch.device | str) -> UMT5EncoderModel:
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "umt5":
        raise UserError(
            f"{folder} is a {kind} model; the prompt of Wan2.1 is encoded by UMT5 (google/umt5-xxl)"
        )
    try:
        model, report = _transformers().UMT5EncoderModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be read ({str(error).splitlines()[0]}); copy it again") from None
    if report["missing_keys"]:
        raise UserError(f"{folder} lacks {', '.join(sorted(report['missing_keys'])[:6])}; copy it again")
    return model.to(device)


def _from_wan(path: Path, dtype: torch.dtype, device: torch.device | str) -> UMT5EncoderModel:
    """Wan's file: the same encoder under other names, its widths read from the shapes."""
    check_file(path)
    state = read_tensors([path], dtype, device)
    if isinstance(state, Tensor) or "blocks.0.ffn.gate.0.weight" not in state:
        raise UserError(f"{path} is not Wan's UMT5 file ({WAN_FILE}); give that, or a folder of transformers")
    transformers = _transformers()
    vocabulary, width = state["token_embedding.weight"].shape
    buckets, heads = state["blocks.0.pos_embedding.embedding.weight"].shape
    config = transformers.UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=state["blocks.0.attn.q.weight"].shape[0] // heads,
        d_ff=state["blocks.0.ffn.fc1.weight"].shape[0],
        num_layers=1 + max(int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
    )
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
    named = {_name(name): tensor for name, tensor in state.items()}
    named["encoder.embed_tokens.weight"] = named["shared.weight"]
    return fill(model, named, str(path))


def _name(name: str) -> str:
    inside, stem, leaf = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight)?", name).groups("")
    if not inside:
        return _TOP.get(stem, stem) + leaf
    return inside.replace("blocks.", "encoder.block.") + _BLOCK.get(stem, stem) + leaf
