"""`python -m data build | index | inspect | curate | degrade | presets | bench`."""

import argparse

from data import corpus
from flashvsr.base.cli import UserError, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data", description="Prepare training and test data.")
    commands = parser.add_subparsers(dest="command", required=True)

    corpus.add_parsers(commands)

    degrade = commands.add_parser(
        "degrade",
        help="clips to low resolution",
        description="Degrades a clip, or every clip of a folder; all that was drawn is written beside the "
        "frames as JSON. What is already there is kept.",
    )
    degrade.add_argument("source", metavar="IN", help="video, image, folder of frames, or folder of clips")
    degrade.add_argument(
        "out", metavar="OUT", help="folder for PNG frames, or a file .mp4/.mkv (lossless); a folder for clips"
    )
    degrade.add_argument("--preset", help="degradation preset (realbasicvsr); see `data presets`")
    degrade.add_argument("--seed", type=int, help="seed of everything that is drawn (0)")
    degrade.add_argument("--scale", type=int, help="how much smaller the result is (4)")
    degrade.add_argument("--replay", metavar="JSON", help="use the parameters of this file, draw nothing")
    degrade.add_argument("--force", action="store_true", help="make again what is already there")
    degrade.add_argument("--quiet", action="store_true", help="no progress bars")

    presets = commands.add_parser(
        "presets",
        help="degradation presets, their statistics and pictures",
        description="Lists the degradation presets. With a name, measures operators and draws against their "
        "formulas. With --sheet, degrades one clip by every preset into an HTML page.",
    )
    presets.add_argument("preset", nargs="?", metavar="NAME", help="measure this preset")
    presets.add_argument("--sheet", nargs=2, metavar=("CLIP", "HTML"), help="pictures of every preset")
    presets.add_argument("--seed", type=int, default=0, help="seed of the pictures (0)")

    bench = commands.add_parser(
        "bench",
        help="frames per second of the data's parts",
        description="Frames per second per core: decoding, every operator of a degradation and its plain "
        "per-frame OpenCV/NumPy form, the whole preset.",
    )
    bench.add_argument("--clip", help="a video (default: procedural)")
    bench.add_argument(
        "--shards", metavar="DIR", help="instead: reaching clips of these shards, and the loader"
    )
    bench.add_argument("--size", default="256x256", help="HxW of the HR frames (256x256, the published crop)")
    bench.add_argument("--frames", type=int, default=30, help="frames per clip (30, as published)")
    bench.add_argument("--draws", type=int, default=12, help="clips with other parameters (12)")
    bench.add_argument("--preset", default="realbasicvsr", help="degradation preset (realbasicvsr)")
    bench.add_argument("--json", metavar="FILE", help="also write the rows and the machine")
    return parser


def _degrade(args: argparse.Namespace) -> None:
    from data.degrade import Request, degrade_path, read_replay

    given = {k: v for k in ("preset", "seed", "scale") if (v := vars(args)[k]) is not None}
    if args.replay and given:
        raise UserError(f"--replay says all there is to say: drop --{next(iter(given))}")
    replay = read_replay(args.replay) if args.replay else None
    request = Request(replay=replay, force=args.force, quiet=args.quiet, **given)
    print(degrade_path(args.source, args.out, request))


def _presets(args: argparse.Namespace) -> None:
    from data.degradation import stats

    if args.sheet:
        if args.preset:
            raise UserError("--sheet shows every preset: drop the name")
        print(stats.sheet(*args.sheet, seed=args.seed))
    else:
        print(stats.table(args.preset) if args.preset else stats.listing())


def _bench(args: argparse.Namespace) -> None:
    from data.bench import run as run_bench
    from data.bench_loader import run as run_loader

    if args.shards and args.clip:
        raise UserError("--clip and --shards measure different things: give one of them")
    if args.shards:
        print(run_loader(args.shards, args.size, args.frames, args.preset, args.json))
        return
    print(run_bench(args.clip, args.size, args.frames, args.draws, args.preset, args.json))


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    {**corpus.COMMANDS, "degrade": _degrade, "presets": _presets, "bench": _bench}[args.command](args)


if __name__ == "__main__":
    run(main)
