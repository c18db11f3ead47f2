"""`python -m eval`: methods over a test set, numbers, a report. `python -m eval prepare`: make a test set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flashvsr.base.cli import UserError, run

if TYPE_CHECKING:
    from eval.datasets import TestSet
    from eval.metrics import Metric


def main(argv: list[str]) -> int | None:
    """Dispatch to `prepare` or to the evaluation."""
    return prepare_command(argv[1:]) if argv[:1] == ["prepare"] else eval_command(argv)


def prepare_command(argv: list[str]) -> int:
    """Make a test set from HR clips, or check one."""
    from eval.prepare import PrepareConfig, check, prepare

    parser = argparse.ArgumentParser(prog="python -m eval prepare", description=prepare_command.__doc__)
    parser.add_argument(
        "source",
        metavar="SRC",
        nargs="?",
        help="folder of videos or frames, or a data folder (its val split)",
    )
    parser.add_argument("out", metavar="OUT", nargs="?", help="test set to write: GT/, LQ/ and prepare.json")
    parser.add_argument(
        "--check",
        metavar="DIR",
        help="instead: compare a set's pixels with its prepare.json, make its LQ again, and name the "
        "versions that differ where the bytes do",
    )
    parser.add_argument("--preset", default="realbasicvsr", help="degradation preset (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the degradation (default: %(default)s)")
    parser.add_argument("--scale", type=int, default=4, help="LQ is this much smaller (default: %(default)s)")
    parser.add_argument("--frames", type=int, help="only the first FRAMES frames of each clip")
    parser.add_argument("--size", help="HxW of GT, cut from the middle (default: the whole frame)")
    parser.add_argument("--short-side", type=int, help="first reduce frames to this short side")
    parser.add_argument("--clips", type=int, help="only the first CLIPS clips by name")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    a = parser.parse_args(argv)
    if a.check is not None:
        if a.source is not None:
            raise UserError("prepare takes SRC OUT or --check DIR, not both")
        wrong = check(a.check, quiet=a.quiet)
        print(
            "\n".join(wrong) or f"{a.check}: GT and LQ are what was written, and this machine makes the same"
        )
        return 1 if wrong else 0
    if a.out is None:
        raise UserError("prepare needs SRC and OUT, or --check DIR")
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
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """`HxW` to (height, width)."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise UserError(f"--size {text!r} must be HEIGHTxWIDTH, for example 256x384")
    return int(height), int(width)


def eval_command(argv: list[str]) -> None:
    """Compare methods on test sets: make what is missing, score it, write numbers and a page."""
    from eval.datasets import ALIGN
    from eval.datasets import FORMS as DATA_FORMS
    from eval.methods import FORMS
    from eval.metrics import NAMES
    from eval.published import NAMES as PUBLISHED
    from eval.units import DEFAULT_METRICS

    parser = argparse.ArgumentParser(
        prog="python -m eval",
        description=eval_command.__doc__,
        epilog="The same command goes on where it stopped, and makes nothing twice. "
        "`python -m eval prepare --help` tells how to make a test set.",
    )
    add = parser.add_argument
    add("--method", action="append", metavar="NAME=SPEC", required=True, help=f"repeat it; {FORMS}")
    add("--data", action="append", metavar="SET", required=True, help=f"test set; repeat it; {DATA_FORMS}")
    add("--out", required=True, help="run folder: eval.json, results.csv, results.md, report.html, cache/")
    add("--frames", type=int, help="only the first FRAMES frames of each clip")
    add("--metrics", default=",".join(DEFAULT_METRICS), help=f"of {','.join(NAMES)} (default: %(default)s)")
    add("--crop", type=int, default=0, help="pixels cut off each side before scoring (default: %(default)s)")
    add(
        "--align", default="refuse", choices=ALIGN, help="where counts or sizes differ (default: %(default)s)"
    )
    add("--lpips-net", default="alex", choices=["alex", "vgg", "squeeze"])
    add(
        "--lpips-weights",
        default="auto",
        help="auto (torch's hub cache, else random), random, or a torchvision checkpoint",
    )
    add("--flow", default="lk", choices=["lk", "raft"], help="of the warping errors (default: %(default)s)")
    add("--dover", metavar="FILE", help="DOVER's weights, for its metrics")
    add(
        "--device",
        default="auto",
        help="auto (every GPU, else cpu), cpu, cuda, cuda:1 (default: %(default)s)",
    )
    add("--workers", type=int, default=1, help="processes on a CPU (default: %(default)s)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of the models; auto is bfloat16 on a GPU, else float32",
    )
    add("--cache", help="folder of frames and scores, for several run folders (default: OUT/cache)")
    add("--fresh", action="store_true", help="make and score everything anew")
    add(
        "--published",
        action="append",
        default=[],
        choices=PUBLISHED,
        metavar="SET",
        help=f"show what papers print for {', '.join(PUBLISHED)}, as a block of its own",
    )
    add("--quiet", action="store_true", help="no progress bar")
    evaluate_to_report(parser.parse_args(argv))


def evaluate_to_report(a: argparse.Namespace) -> None:
    """Everything between the parsed arguments and the printed path of the page."""
    from eval.cache import Cache
    from eval.datasets import parse_set
    from eval.methods import parse_method
    from eval.published import published
    from eval.report import write_report
    from eval.results import collect, method_line, protocol_lines, write_results
    from eval.runner import evaluate
    from eval.units import MetricChoice, job_for

    methods = [parse_method(text) for text in a.method]
    refuse_twice("methods", [method.name for method in methods], "give each its own NAME")
    if a.frames is not None and a.frames < 1:
        raise UserError(f"--frames must be at least 1, got {a.frames}")
    test_sets = [parse_set(text, a.frames, a.align) for text in a.data]
    refuse_twice("data sets", [test_set.name for test_set in test_sets], "give each its own NAME=DIR")
    devices = parse_devices(a.device, a.workers)
    bfloat = a.dtype == "bfloat16" or (a.dtype == "auto" and devices[0] != "cpu")
    choice = MetricChoice(tuple(a.metrics.split(",")), a.crop, a.lpips_net, a.lpips_weights, a.flow, a.dover)
    out = Path(a.out)
    cache = Cache(out / "cache" if a.cache is None else a.cache, a.fresh)
    job, metrics = job_for(choice, cache, a.align, torch.bfloat16 if bfloat else torch.float32, devices)
    if any(metric.key.endswith("-random") for metric in metrics):
        print(f"no {a.lpips_net} backbone weights: the metric is lpips-random, comparable only with itself")
    if not all(test_set.has_gt for test_set in test_sets):
        say_what_is_left_out(test_sets, metrics)

    outcome = evaluate(methods, test_sets, job, devices, quiet=a.quiet)
    evaluation = collect(
        out.resolve().name,
        test_sets,
        methods,
        metrics,
        outcome,
        job,
        frames=a.frames,
        devices=devices,
        published=[block for name in a.published for block in published(name)],
    )
    write_results(out, evaluation)
    page = write_report(out, evaluation, quiet=a.quiet)
    for line in (*protocol_lines(evaluation), *map(method_line, evaluation["methods"])):
        print(line.replace("`", ""))
    print_tables(evaluation)
    print(page)


def refuse_twice(what: str, names: list[str], remedy: str) -> None:
    """UserError when a name is there twice."""
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two {what} are named {name!r}; {remedy}")


def say_what_is_left_out(test_sets: Sequence[TestSet], metrics: Sequence[Metric]) -> None:
    """One line for each set without GT; UserError when no metric is left for one."""
    lost = ", ".join(m.key for m in metrics if m.needs_gt)
    left = ", ".join(m.key for m in metrics if not m.needs_gt)
    for test_set in test_sets:
        if not test_set.has_gt:
            print(f"{test_set.name} has no GT: {lost or 'nothing'} left out, {left or 'nothing'} measured")


def print_tables(evaluation: dict[str, Any]) -> None:
    """The means of every set as plain text; * marks the best."""
    from eval.results import table

    for dataset in evaluation["datasets"]:
        heads, rows = table(evaluation, dataset["name"])
        width = max(len(name) for name, _ in rows)
        print(f"{dataset['name']}:")
        for name, cells in rows:
            parts = [f"{head} {text}" for head, (text, _) in zip(heads, cells, strict=True)]
            print(f"  {name:<{width}}  {'  '.join(parts)}")


def parse_devices(text: str, workers: int) -> list[str]:
    """The devices of the workers: one each for every GPU, or `workers` times the CPU."""
    if workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(
            f"--device {text!r} cannot be used ({str(error).splitlines()[0]}); try cpu"
        ) from error
    if torch.device(text).type == "cpu":
        return [text] * workers
    if workers > 1:
        raise UserError(f"--workers {workers} is for the CPU; on GPUs there is one process for each")
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if text == "cuda" else [text]


if __name__ == "__main__":
    run(main)
