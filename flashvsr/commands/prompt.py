"""`python -m flashvsr prompt TEXT --umt5 PATH`: another prompt's embedding, as a new `posi_prompt.pth`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashvsr.base.cli import UserError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m flashvsr prompt",
        description="Encode a prompt with a local UMT5-xxl, as Wan2.1 does, for `python -m train "
        "prompt=FILE` or `python -m flashvsr convert --prompt FILE`. Released weights know only the "
        "prompt they were trained with. Needs `pip install transformers sentencepiece`.",
    )
    p.add_argument("text", metavar="TEXT", help="the prompt; @FILE reads it from a text file")
    p.add_argument(
        "--umt5",
        metavar="PATH",
        required=True,
        help="a folder of transformers (google/umt5-xxl, or text_encoder/ of a diffusers Wan), a "
        "Wan2.1-T2V-1.3B folder, or its models_t5_umt5-xxl-enc-bf16.pth",
    )
    p.add_argument(
        "--tokenizer", metavar="DIR", help="tokenizer's folder (default: where PATH's form has it)"
    )
    p.add_argument("--out", metavar="FILE", default="posi_prompt.pth", help="(default: %(default)s)")
    p.add_argument(
        "--length", type=int, default=512, help="tokens, zero behind the text's (default: %(default)s)"
    )
    p.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)"
    )
    p.add_argument("--device", default="cpu", help="(default: %(default)s)")
    p.add_argument("--force", action="store_true", help="replace FILE if it exists")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return p


def main(argv: list[str]) -> None:
    """Encodes and writes."""
    import torch

    from flashvsr.base.files import atomic, reading
    from flashvsr.models.prompt import save_prompt
    from flashvsr.weights.umt5 import encode

    given = parser().parse_args(argv)
    out = Path(given.out)
    if out.exists() and not given.force:
        raise UserError(f"{out} already exists; --force replaces it")
    if given.length < 1:
        raise UserError(f"--length {given.length} must be at least 1")
    text = given.text
    if text.startswith("@"):
        with reading(text[1:]):
            text = Path(text[1:]).read_text(encoding="utf-8")
    embedding, tokens = encode(
        text,
        given.umt5,
        tokenizer=given.tokenizer,
        length=given.length,
        dtype=getattr(torch, given.dtype),
        device=given.device,
    )
    with atomic(out) as part:
        save_prompt(embedding, part)
    if not given.quiet:
        cut = ", cut there" if tokens == given.length else ""
        print(f"{out}: {tokens} tokens{cut}, {tuple(embedding.shape)} {given.dtype}")
