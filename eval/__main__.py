"""`python -m eval`: methods over a test set, numbers, a report. `python -m eval prepare`: make a test set."""

import argparse
from pathlib import Path

import torch

from flashvsr.base.cli import UserError, run


def main(argv: list[str]) -> int | None:
    """Dispatch to `prepare` or to the evaluation."""
    return prepare_command(argv[1:]) if argv[:1] == ["prepare"] else eval_command(argv)


def prepare_command(argv: list[str]) -> None:
    """Make a test set from HR clips."""
    from eval.prepare import PrepareConfig, prepare

    parser = argparse.ArgumentParser(prog="python -m eval prepare", description=prepare_command.__doc__)
    parser.add_argument(
        "source", metavar="SRC", help="folder of videos or frames, or a data folder (its val split)"
    )
    parser.add_argument("out", metavar="OUT", help="test set to write: GT/, LQ/ and prepare.json")
    parser.add_argument("--preset", default="realbasicvsr", help="degradation preset (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the degradation (default: %(default)s)")
    parser.add_argument("--scale", type=int, default=4, help="LQ is this much smaller (default: %(default)s)")
    parser.add_argument("--frames", type=int, help="only the first FRAMES frames of each clip")
    parser.add_argument("--size", help="HxW of GT, cut from the middle (default: the whole frame)")
    parser.add_argument("--short-side", type=int, help="first reduce frames to this short side")
    parser.add_argument("--clips", type=int, help="only the first CLIPS clips by name")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    a = parser.parse_args(argv)
    config = PrepareConfig(
        preset=a.preset,
        seed=a.seed,
        scale=a.scale,
        frames=a.frames,
        size=None if a.size is None else parse_size(a.size),
        short_side=a.short_side,
        clips=a.clips,
    )
    made = prepare(a.source, a.out, config, quiet=a.quiet)
    print(a.out if made else f"{a.out} (already there, same settings)")


def parse_size(text: str) -> tuple[int, int]:
    """`HxW` to (height, width)."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise UserError(f"--size {text!r} must be HEIGHTxWIDTH, for example 256x384")
    return int(height), int(width)


def eval_command(argv: list[str]) -> None:
    """Compare methods on a test set: PSNR, SSIM, LPIPS, seconds per frame; numbers, curves, pictures."""
    from eval.methods import FORMS

    parser = argparse.ArgumentParser(
        prog="python -m eval",
        description=eval_command.__doc__,
        epilog="`python -m eval prepare --help` tells how to make a test set.",
    )
    parser.add_argument(
        "--method", action="append", metavar="NAME=SPEC", required=True, help=f"repeat it; {FORMS}"
    )
    parser.add_argument("--data", required=True, help="test set with the folders GT and LQ")
    parser.add_argument(
        "--out", required=True, help="run folder: eval.json, results.csv, results.md, report.html"
    )
    parser.add_argument("--frames", type=int, help="only the first FRAMES frames of each clip")
    parser.add_argument("--lpips-net", default="alex", choices=["alex", "vgg", "squeeze"])
    parser.add_argument(
        "--lpips-weights",
        default="auto",
        help="auto (torch's hub cache, else random), random, or a torchvision checkpoint",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of the models; auto is bfloat16 on a GPU, else float32",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    evaluate_to_report(parser.parse_args(argv))


def evaluate_to_report(a: argparse.Namespace) -> None:
    """Everything between the parsed arguments and the printed path of the page."""
    from eval.datasets import open_test_set
    from eval.methods import parse_method
    from eval.metrics import Lpips
    from eval.report import write_report
    from eval.results import collect, method_line, protocol_line, show, write_results
    from eval.runner import evaluate

    methods = [parse_method(text) for text in a.method]
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two methods are named {name!r}; give each its own NAME")
    if a.frames is not None and a.frames < 1:
        raise UserError(f"--frames must be at least 1, got {a.frames}")
    test_set = open_test_set(a.data, a.frames)
    device = parse_device(a.device)
    bfloat = a.dtype == "bfloat16" or (a.dtype == "auto" and device != "cpu")
    dtype = torch.bfloat16 if bfloat else torch.float32
    lpips = Lpips(a.lpips_net, a.lpips_weights)
    if lpips.name != "lpips":
        print(f"no {a.lpips_net} backbone weights: the metric is {lpips.name}, comparable only with itself")

    outcome = evaluate(methods, test_set, lpips, device=device, dtype=dtype, quiet=a.quiet)
    out = Path(a.out)
    evaluation = collect(out.resolve().name, test_set, methods, outcome, lpips, device, dtype)
    write_results(out, evaluation)
    page = write_report(out, evaluation, outcome.panels)
    print(protocol_line(evaluation["protocol"]))
    for method in evaluation["methods"]:
        print(method_line(method).replace("`", ""))
    titles = {"psnr": "PSNR", "ssim": "SSIM", "lpips": lpips.name, "seconds_per_frame": "s/frame"}
    for row in evaluation["means"]:
        numbers = "  ".join(f"{title} {show(key, row[key])}" for key, title in titles.items())
        print(f"{row['method']:<{max(map(len, names))}}  {numbers}")
    print(page)


def parse_device(text: str) -> str:
    """A device torch can use, as text; "auto" is the first GPU if there is one."""
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(
            f"--device {text!r} cannot be used ({str(error).splitlines()[0]}); try cpu"
        ) from error
    return text


if __name__ == "__main__":
    run(main)
