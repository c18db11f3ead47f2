"""`python -m flashvsr convert SRC DST --to LAYOUT`: a model in another layout, bit for bit."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m flashvsr convert",
        description="Rewrite a model in another layout: the FlashVSR release's folder, a folder whose "
        "transformer/ diffusers loads (the other parts beside it), or one safetensors file of all parts. "
        "Tensors keep their bits unless --dtype says otherwise; what was written is read back and compared.",
    )
    p.add_argument(
        "source",
        metavar="SRC",
        help="an export, a run, a FlashVSR release, Wan2.1-T2V-1.3B, a diffusers Wan transformer, or a file "
        "that this command wrote",
    )
    p.add_argument("out", metavar="DST", help="folder to write, or a .safetensors file with --to single")
    p.add_argument("--to", choices=("release", "diffusers", "single"), required=True, help="layout of DST")
    p.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: as stored; single: bfloat16)")
    p.add_argument(
        "--lr-projector",
        choices=("auto", "v1", "v1.1"),
        default="auto",
        help="for a FlashVSR release whose folder's name does not say it",
    )
    p.add_argument("--prompt", metavar="FILE", help="a posi_prompt.pth to take the place of the model's")
    p.add_argument("--force", action="store_true", help="replace a model that is at DST")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return p


def main(argv: list[str]) -> None:
    """Converts, and prints what each part became."""
    import torch

    from flashvsr.weights.convert import convert
    from flashvsr.weights.folder import plain, say
    from flashvsr.weights.names import CALLED, FILES

    given = parser().parse_args(argv)
    begun = time.monotonic()
    model = convert(
        given.source,
        given.out,
        given.to,
        dtype=getattr(torch, given.dtype) if given.dtype else None,
        lr_projector=given.lr_projector,
        prompt=given.prompt,
        force=given.force,
        note=(lambda sentence: None) if given.quiet else say,
    )
    if given.quiet:
        return
    for part in FILES:
        content = getattr(model, part)
        if content is None:
            continue
        tensors = [content] if isinstance(content, torch.Tensor) else list(plain(content).values())
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors})
        size = sum(t.nbytes for t in tensors) / 1e6
        print(f"{CALLED[part]:17s} {len(tensors):4d} tensors  {'+'.join(dtypes):9s} {size:9.1f} MB")
    if model.lr_projector is not None:
        print(f"LR projector's mode: {model.config.lr_projector.mode}")
    out = Path(given.out)
    size = sum(f.stat().st_size for f in ([out] if out.is_file() else out.rglob("*")) if f.is_file())
    print(f"{out}: {given.to}, {size / 1e9:.2f} GB, read back equal, {time.monotonic() - begun:.1f} s")
