"""`python -m flashvsr app --model DIR`: the upscaler in a browser."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import threading
from pathlib import Path
from typing import Any

from flashvsr.base.cli import UserError
from flashvsr.commands.upscale import DTYPES

HOST, PORT = "127.0.0.1", 7860


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m flashvsr app",
        description="Serve a page on which clips are upscaled: upload, settings, progress, before and after.",
    )
    p.add_argument("--model", required=True, nargs="+", metavar="DIR", help="models to choose from")
    p.add_argument("--samples", metavar="DIR", help="folder of clips to try, beside the one drawn by the app")
    p.add_argument(
        "--host",
        default=HOST,
        help="address to serve at; 0.0.0.0 lets in whoever reaches this machine (default: %(default)s)",
    )
    p.add_argument("--port", type=int, default=PORT, help="default: %(default)s")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights (default: bfloat16 on cuda, else float32)")
    p.add_argument(
        "--lr-projector",
        choices=("auto", "v1", "v1.1"),
        help="of a release folder whose name does not say it",
    )
    return p


def main(argv: list[str]) -> int | None:
    """Serves until Ctrl-C or SIGTERM, then removes what was uploaded and made."""
    given = parser().parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the app needs gradio: pip install -c constraints.txt -e '.[app]'")
    for model in given.model:
        if not Path(model).exists():
            raise UserError(f"--model {model} does not exist; check the path")
    clips = _samples(given.samples)
    options = [
        f"--{name}={value}"
        for name, value in (
            ("device", given.device),
            ("dtype", given.dtype),
            ("lr-projector", given.lr_projector),
        )
        if value
    ]
    from flashvsr.app.page import served

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with served(given.model, clips, options, given.host, given.port) as address:
            print(f"serving {address} (Ctrl-C ends it and removes all clips)", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        print("ended", flush=True)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _samples(folder: str | None) -> list[Path]:
    from flashvsr.base.stills import is_video, natural

    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise UserError(f"--samples {folder} is no folder")
    clips = sorted((path.resolve() for path in Path(folder).iterdir() if is_video(path)), key=natural)
    if not clips:
        raise UserError(f"--samples {folder} holds no video")
    return clips
