"""`python -m data build | degrade`."""

import argparse
from pathlib import Path

from flashvsr.base.cli import Progress, UserError, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data", description="Prepare training and test data.")
    commands = parser.add_subparsers(dest="command", required=True)

    build = commands.add_parser(
        "build",
        help="videos and images to shards",
        description="Videos, images and folders of frames become WebDataset shards (train-*.tar, val-*.tar) "
        "and index.json; with no SRC, from procedural clips. A second call with the same files does nothing.",
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
    _add_workers(build)
    build.add_argument("--synthetic", type=int, metavar="N", help="how many procedural training clips (12)")
    build.add_argument("--seed", type=int, help="seed of the procedural clips (0)")
    build.add_argument("--quiet", action="store_true", help="no progress bars")

    degrade = commands.add_parser(
        "degrade",
        help="one clip to low resolution",
        description="Degrades a clip; all that was drawn is written beside the frames as JSON.",
    )
    degrade.add_argument("source", metavar="IN", help="video, image or folder of frames")
    degrade.add_argument("out", metavar="OUT", help="folder for PNG frames, or a file .mp4/.mkv (lossless)")
    degrade.add_argument("--preset", default="realbasicvsr", help="degradation preset (realbasicvsr)")
    degrade.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn (0)")
    degrade.add_argument("--scale", type=int, default=4, help="how much smaller the result is (4)")
    degrade.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


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


def _degrade(args: argparse.Namespace) -> None:
    import numpy as np

    from data.degradation import degrade
    from data.degradation.presets import preset
    from flashvsr.base.draws import numpy_rng
    from flashvsr.base.files import write_json
    from flashvsr.base.video_io import VideoWriter, probe, read_frames

    preset(args.preset)
    if args.scale < 1:
        raise UserError(f"--scale {args.scale} must be at least 1")
    info = probe(args.source)
    height, width = (s // args.scale * args.scale for s in (info.height, info.width))
    if not height or not width:
        raise UserError(f"'{args.source}' is {info.width}x{info.height}, too small for --scale {args.scale}")
    with Progress(info.frames, "reading", unit="frame", quiet=args.quiet) as progress:
        frames = []
        for frame in read_frames(args.source):
            frames.append(frame[:height, :width])
            progress.update()
    with Progress(1, "degrading", unit="clip", quiet=args.quiet) as progress:
        rng = numpy_rng("degrade", args.seed)
        lr, params = degrade(np.stack(frames), args.scale, args.preset, rng)
        progress.update()
    with VideoWriter(args.out, info.fps, lr.shape[1], lr.shape[2], lossless=True) as writer:
        writer.write(lr)
    sidecar = Path(args.out).with_suffix(".json")
    facts = {"source": Path(args.source).name, "preset": args.preset, "seed": args.seed, "scale": args.scale}
    write_json(sidecar, {**facts, "frames": len(lr), "hr": [height, width], "parameters": params})
    if (height, width) != (info.height, info.width):
        print(f"cropped {info.width}x{info.height} to {width}x{height} (multiples of {args.scale})")
    print(f"{args.out}: {len(lr)} frames of {lr.shape[2]}x{lr.shape[1]}, parameters in {sidecar}")


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    {"build": _build, "degrade": _degrade}[args.command](args)


if __name__ == "__main__":
    run(main)
