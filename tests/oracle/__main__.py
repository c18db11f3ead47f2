"""`python -m tests.oracle OUT --kind dit_stream --seed 3 rows=8 columns=24 chunks=6 kv_ratio=2`

Writes a file of the golden form with random weights. Settings are those of the kind, as NAME=VALUE.
"""

from __future__ import annotations

import argparse
import ast
import sys
from typing import Any

from flashvsr.base.cli import UserError, run
from flashvsr.base.files import atomic
from tests.oracle.files import KINDS
from tests.oracle.make import DEFAULTS, make, write


def setting(kind: str, text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name not in DEFAULTS[kind]:
        raise UserError(f"{name!r} is no setting of {kind}; there are {', '.join(DEFAULTS[kind])}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    parser.add_argument("out")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", type=float, default=0.0, help="share of the outputs left out")
    args = parser.parse_intermixed_args(argv)
    chosen = dict(setting(args.kind, text) for text in args.settings)
    tensors, meta = make(args.kind, args.seed, **chosen)
    with atomic(args.out) as path:
        write(path, tensors, meta, without=args.without, seed=args.seed)
    print(f"{args.out}: {len(tensors)} tensors, {meta}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
