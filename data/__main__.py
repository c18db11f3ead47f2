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
    build.add_argument("sources", nargs="*", metavar="SRC", help="video, image, or folder of them")
    build.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the shards; replaced as a whole"
    )
    build.add_argument(
        "--val", nargs="+", default=[], metavar="SRC", help="clips to hold out (default: every eighth)"
    )
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


def _build(args: argparse.Namespace) -> None:
    from data.build import build, summary

    if args.sources and (args.synthetic is not None or args.seed is not None):
        raise UserError(
            "--synthetic and --seed are about procedural clips, made only when no SRC is given: drop them"
        )
    if args.val and not args.sources:
        raise UserError("--val needs SRC: give the clips to train on")
    if args.synthetic is not None and args.synthetic < 1:
        raise UserError(f"--synthetic {args.synthetic} must be at least 1")
    count = 12 if args.synthetic is None else args.synthetic
    print(summary(build(args.sources, args.out, args.val, count, args.seed or 0, args.quiet)))


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
