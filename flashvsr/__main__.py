"""`python -m flashvsr COMMAND`: imports only the command that is asked for."""

from __future__ import annotations

import difflib
import importlib

from flashvsr.base.cli import UserError, run

COMMANDS = {
    "upscale": "upscale a video, a folder of frames or an image with a model folder",
    "export": "gather a run's finished parts into one model folder in the release's layout",
    "convert": "rewrite a model: release layout, diffusers, or one safetensors file",
    "prompt": "encode another prompt with a local UMT5, as a new posi_prompt.pth",
    "kernels": "compile the Triton attention kernels for GPUs, present or not, and show what they take",
    "app": "serve a page on which clips are upscaled",
    "bench": "measure speed, useful work and memory of attention, modules and the pipeline",
    "doctor": "show machine and versions, and check the attention backends",
}
USAGE = "\n".join(
    [
        "usage: python -m flashvsr COMMAND ...   (each has --help)",
        "",
        *(f"  {name:8s} {what}" for name, what in COMMANDS.items()),
    ]
)


def main(argv: list[str]) -> int | None:
    """Runs the command named first."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}; {hint}")
    return importlib.import_module(f"flashvsr.commands.{name}").main(rest)


if __name__ == "__main__":
    run(main)
