"""The commands that make and look at a corpus: build, index, inspect, curate."""

import argparse
from pathlib import Path
from typing import Any

from flashvsr.base.cli import UserError

# flag, score, whether it is the least allowed value, default, help
LIMITS = (
    ("--min-short-side", "short_side", True, None, "smaller sources go, pixels"),
    ("--min-seconds", "seconds", True, None, "shorter clips go"),
    ("--max-bars", "bars", False, 0.01, "burnt-in black borders, share of the area (0.01)"),
    ("--min-change", "change", True, 0.5, "static slides: change between the sampled frames, levels (0.5)"),
    ("--min-motion", "motion", True, None, "least motion, %% of the width per second"),
    ("--max-motion", "motion", False, None, "most motion, %% of the width per second"),
    ("--min-sharpness", "sharpness", True, None, "least sharpness, 0 to 1"),
    ("--max-blockiness", "blockiness", False, None, "most visible 8x8 grid, 0 to 1"),
    ("--max-noise", "noise", False, None, "most noise, standard deviation in levels of 255"),
)  # fmt: skip


def add_parsers(commands: Any) -> None:
    """Adds the four commands to `python -m data`'s."""
    _add_build(commands)
    _add_index(commands)
    _add_inspect(commands)
    _add_curate(commands)


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="videos and images to shards",
        description="Videos, images and folders of frames become WebDataset shards (train-*.tar, val-*.tar) "
        "and index.json; with no SRC, from procedural clips. Killed, the same command goes on; a second call "
        "with the same files does nothing.",
    )
    build.add_argument(
        "sources", nargs="*", metavar="SRC", help="video, image, folder of them, pattern, list (.txt)"
    )
    build.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the shards; replaced as a whole"
    )
    build.add_argument(
        "--val", nargs="+", default=[], metavar="SRC", help="sources to hold out (default: every eighth)"
    )
    _add_cutting(build)
    build.add_argument(
        "--member-mb", type=int, default=256, metavar="N",
        help="cut larger videos at keyframes into files of about this size, not encoding them anew (256)",
    )  # fmt: skip
    build.add_argument("--shard-mb", type=int, default=1024, metavar="N", help="size of a shard (1024)")
    build.add_argument(
        "--reencode", metavar="CODEC", help="encode every clip anew, e.g. libx264 (default: original bytes)"
    )
    build.add_argument("--crf", type=float, help="quality of --reencode (12)")
    build.add_argument("--synthetic", type=int, metavar="N", help="how many procedural training clips (12)")
    build.add_argument("--seed", type=int, help="seed of the procedural clips (0)")
    _add_workers(build)


def _add_index(commands: Any) -> None:
    index = commands.add_parser(
        "index",
        help="index.json for tars made elsewhere",
        description="Reads WebDataset tars (video, image or numbered frames, and optionally JSON), checks "
        "that every member can be decoded, and writes index.json beside them.",
    )
    index.add_argument("folder", metavar="DIR", help="folder with *.tar; val-*.tar is held out")
    _add_cutting(index)
    _add_workers(index)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="a corpus on one HTML page",
        description="Writes a page with pictures of the clips and how their sizes, lengths, rates and scores "
        "are distributed.",
    )
    inspect.add_argument("data", metavar="DIR", help="folder of a build, or an index")
    inspect.add_argument("--out", metavar="HTML", help="the page (DIR/inspect.html)")
    inspect.add_argument(
        "--clips", type=int, default=60, metavar="N", help="pictures of at most N clips a split (60)"
    )
    inspect.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_curate(commands: Any) -> None:
    curate = commands.add_parser(
        "curate",
        help="choose clips by scores",
        description="Scores every clip (once; kept in scores.jsonl), applies the limits, and writes an index "
        "of what passes, to be used as data.shards=INDEX, with a page that shows what each limit removed.",
    )
    curate.add_argument("data", metavar="DIR", help="folder of a build, or an index")
    curate.add_argument("--out", metavar="INDEX", help="the index to write (DIR/curated.json)")
    curate.add_argument("--report", metavar="HTML", help="the page (beside the index, .html)")
    for flag, name, _, default, text in LIMITS:
        curate.add_argument(flag, type=float, default=default, dest=f"{flag[2:5]}_{name}", help=text)
    curate.add_argument(
        "--scores", nargs="+", default=[], metavar="JSONL",
        help='scores computed elsewhere, lines {"id": CLIP_OR_SEGMENT, "musiq": 61.2, …}',
    )  # fmt: skip
    for kind in ("min", "max"):
        curate.add_argument(
            f"--{kind}", nargs="+", default=[], metavar="NAME=VALUE", help="limit on a score of --scores"
        )
    curate.add_argument(
        "--duplicate-bits", type=int, default=6, metavar="N",
        help="clips whose perceptual hashes differ in at most N of 64 bits are one; -1: keep all (6)",
    )  # fmt: skip
    curate.add_argument(
        "--pictures", type=int, default=12, metavar="N", help="pictures per reason in the report (12)"
    )
    _add_workers(curate)


def _add_cutting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-seconds", type=float, default=20.0, metavar="S", help="longest clip; scenes are divided (20)"
    )
    parser.add_argument(
        "--min-frames", type=int, default=5, metavar="N", help="leave out clips shorter than this (5)"
    )
    parser.add_argument("--no-cuts", action="store_true", help="do not look for scene changes")


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S",
        help="give a file up when it yields nothing for this long (60 seconds)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _check_workers(args: argparse.Namespace) -> None:
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers} must be at least 1")
    if args.timeout <= 0:
        raise UserError(f"--timeout {args.timeout:g} must be above 0")


def _build(args: argparse.Namespace) -> None:
    from data.build import How, build, summary
    from data.scan import Options

    if args.sources and (args.synthetic is not None or args.seed is not None):
        raise UserError(
            "--synthetic and --seed are about procedural clips, made only when no SRC is given: drop them"
        )
    if args.val and not args.sources:
        raise UserError("--val needs SRC: give the clips to train on")
    if args.synthetic is not None and args.synthetic < 1:
        raise UserError(f"--synthetic {args.synthetic} must be at least 1")
    if args.crf is not None and not args.reencode:
        raise UserError("--crf is about --reencode: give a codec, e.g. --reencode libx264")
    if args.shard_mb < 1:
        raise UserError(f"--shard-mb {args.shard_mb} must be at least 1")
    _check_workers(args)
    options = Options(
        cuts=not args.no_cuts,
        max_seconds=args.max_seconds,
        min_frames=args.min_frames,
        member_mb=args.member_mb,
        codec=args.reencode,
        crf=12.0 if args.crf is None else args.crf,
    )
    how = How(options, args.shard_mb, args.workers, args.timeout, args.quiet)
    count = 12 if args.synthetic is None else args.synthetic
    print(summary(build(args.sources, args.out, args.val, count, args.seed or 0, how=how)))


def _index(args: argparse.Namespace) -> None:
    from data.build import summary
    from data.reindex import reindex
    from data.scan import Options

    _check_workers(args)
    options = Options(cuts=not args.no_cuts, max_seconds=args.max_seconds, min_frames=args.min_frames)
    print(summary(reindex(Path(args.folder), options, args.workers, args.timeout, args.quiet)))


def _inspect(args: argparse.Namespace) -> None:
    from data.inspect import inspect
    from data.shards import read_index

    index = read_index(args.data)
    out = Path(args.out) if args.out else index.folder / "inspect.html"
    inspect(index, out, args.clips, args.quiet)
    print(f"page: {out}")


def _curate(args: argparse.Namespace) -> None:
    from data.curate import curate
    from data.curate_report import report
    from data.shards import read_index

    _check_workers(args)
    limits = _limits(args)
    out = Path(args.out) if args.out else read_index(args.data).folder / "curated.json"
    if out.suffix != ".json" or out.name == "index.json":
        raise UserError(f"--out {out} must be a .json file other than index.json")
    tables = [Path(table) for table in args.scores]
    how = (args.duplicate_bits, args.workers, args.timeout, args.quiet)
    index, chosen, found, removed, twins = curate(Path(args.data), out, limits, tables, *how)
    page = Path(args.report) if args.report else out.with_suffix(".html")
    report(page, index, chosen, found, removed, twins, limits, args.pictures, args.quiet)
    for reason, rows in removed.items():
        if rows:
            print(f"{reason}: {len(rows)} of {len(found)} segments")
    for split, clips in chosen.splits.items():
        print(
            f"{split}: {len(clips)} clips of {len(index.splits[split])} clips are kept, in whole or in part"
        )
    print(f"page: {page}")
    print(f"data: {out}")


def _limits(args: argparse.Namespace) -> list:
    from data.curate import Limit

    limits = []
    for flag, name, least, _, _ in LIMITS:
        bound = vars(args)[f"{flag[2:5]}_{name}"]
        if bound is not None:
            limits.append(Limit(name, bound, least))
    for kind, given in (("min", args.min), ("max", args.max)):
        for text in given:
            name, equals, value = text.partition("=")
            try:
                limits.append(Limit(name, float(value), kind == "min"))
            except ValueError:
                raise UserError(f"--{kind} {text}: give NAME=VALUE, such as musiq=60") from None
    return limits


COMMANDS = {"build": _build, "index": _index, "inspect": _inspect, "curate": _curate}
