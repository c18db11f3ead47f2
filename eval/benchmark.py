"""`python -m eval.benchmark`: what methods cost, in turns in one run; `--compare` finds regressions."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.methods import FORMS, Method, open_method, parse_method
from eval.speed import Clip, count_work, memory_of, run_clip, summary, time_methods
from flashvsr.base import charts, measure
from flashvsr.base.cli import Progress, UserError, run
from flashvsr.base.files import read_json, write_json
from flashvsr.base.page import Page

FORMAT = 1
SAME = ("size", "frames", "push", "scale", "device", "dtype")  # settings that must agree for a comparison
OF_MACHINE = ("cpu", "cores", "threads", "gpu")
TIMES = {
    "seconds_per_frame": "seconds per frame",
    "first_output_seconds": "first output",
    "latency_p50": "latency p50",
}
COUNTS = {
    "first_output_frames": "frames to the first output",
    "delay_frames": "delay in frames",
    "flops_per_frame": "operations per frame",
    "parameters": "parameters",
}
MEMORY_SLACK = 16 * 2**20  # resident memory is known to a few MiB
MIB = 2**20


def main(argv: list[str]) -> int:
    """Measure what methods cost at one size: latency, speed, operations, parameters, memory."""
    a = parser().parse_args(argv)
    old = None if a.compare is None else read_benchmark(a.compare)
    methods = [parse_method(text) for text in a.method]
    settings = _settings(a)
    _check(a, methods, old, settings)
    found = benchmark(methods, settings, a.repeats, a.warmup, memory=not a.no_memory, quiet=a.quiet)
    findings = None if old is None else compare(old, found, a.tolerance)
    out = Path(a.out)
    write_json(out / "benchmark.json", found)
    write_page(out / "benchmark.html", found, findings)
    print("\n".join([*protocol(found), "", text_table(found)]))
    if findings is not None:
        print("\n".join(["", *said(findings, a.tolerance)]))
    print(out / "benchmark.html")
    return int(findings is not None and any(row["worse"] for row in findings["rows"]))


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(prog="python -m eval.benchmark", description=main.__doc__)
    p.add_argument("--method", action="append", metavar="NAME=SPEC", required=True,
                   help=f"repeat it; ratios are to the first; {FORMS}")  # fmt: skip
    p.add_argument("--size", default="180x320", help="HxW of LQ (default: %(default)s)")
    p.add_argument("--frames", type=int, default=41, help="frames of the clip (default: %(default)s)")
    p.add_argument(
        "--push", type=int, default=1, help="frames pushed at a time (default: %(default)s, a camera)"
    )
    p.add_argument("--scale", type=int, default=4)
    p.add_argument(
        "--repeats", type=int, default=3, help="measured runs of each method (default: %(default)s)"
    )
    p.add_argument("--warmup", type=int, default=1, help="runs before them (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                   help="of the models; auto is bfloat16 on a GPU, else float32")  # fmt: skip
    p.add_argument(
        "--no-memory", action="store_true", help="skip the process per method that measures memory"
    )
    p.add_argument("--out", required=True, help="folder for benchmark.json and benchmark.html")
    p.add_argument("--compare", metavar="OLD.json", help="exit with 1 when something got worse since")
    p.add_argument("--tolerance", type=float, default=0.1,
                   help="what --compare lets pass, as a share (default: %(default)s)")  # fmt: skip
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def _settings(a: argparse.Namespace) -> dict[str, Any]:
    from eval.__main__ import parse_devices, parse_size

    device = parse_devices(a.device, 1)[0]
    bfloat = a.dtype == "bfloat16" or (a.dtype == "auto" and device != "cpu")
    height, width = parse_size(a.size)
    return {
        "size": [height, width],
        "frames": a.frames,
        "push": a.push,
        "scale": a.scale,
        "device": device,
        "dtype": "bfloat16" if bfloat else "float32",
    }


def _check(
    a: argparse.Namespace, methods: Sequence[Method], old: dict[str, Any] | None, settings: dict[str, Any]
) -> None:
    """UserError for what would only fail, or say nothing, after the measurement."""
    for name in ("frames", "push", "scale", "repeats"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(a, name)}")
    if a.warmup < 0 or a.tolerance < 0 or min(settings["size"]) < 1:
        raise UserError("--warmup and --tolerance must not be negative, --size must be at least 1x1")
    names = [method.name for method in methods]
    for method in methods:
        if names.count(method.name) > 1:
            raise UserError(f"two methods are named {method.name!r}; give each its own NAME")
        if method.kind == "outputs":
            raise UserError(
                f"method {method.name!r} is a folder of finished outputs: it has no speed to measure"
            )
    if old is None:
        return
    for key in SAME:
        if old["settings"][key] != settings[key]:
            raise UserError(
                f"{a.compare} was measured with {key} {old['settings'][key]}, this run has {settings[key]}; "
                f"they must be the same to compare"
            )
    if not set(names) & {row["name"] for row in old["methods"]}:
        raise UserError(f"{a.compare} has none of these methods; name them as there")


def read_benchmark(path: str | Path) -> dict[str, Any]:
    """The value of a benchmark.json; UserError when it is something else."""
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT or "settings" not in value:
        raise UserError(
            f"{path} is no benchmark.json of format {FORMAT}; make it with python -m eval.benchmark"
        )
    return value


def benchmark(
    methods: Sequence[Method],
    settings: dict[str, Any],
    repeats: int,
    warmup: int,
    memory: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """The value of benchmark.json: settings, machine, load, and per method `summary`'s numbers, operations,
    parameters, memory, and the ratio of its seconds per frame to the first method's."""
    clip = Clip(*settings["size"], *(settings[key] for key in ("frames", "push", "scale")))
    device, dtype = settings["device"], getattr(torch, settings["dtype"])
    starts = {m.name: open_method(m, clip.scale, device, dtype) for m in methods}
    rows: dict[str, dict[str, Any]] = {}
    runs = len(methods) * (repeats + warmup + 1 + memory)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with Progress(runs, "benchmark", unit="run", quiet=quiet) as progress:

        def tell(name: str) -> None:
            progress.update(1, method=name)

        timed = time_methods(starts, clip, repeats, warmup, tell)
        for method in methods:
            upscaler = starts[method.name]()
            work, parameters = count_work(lambda u=upscaler: run_clip(u, clip.pixels(), clip.push))
            tell(method.name)
            rows[method.name] = {
                "name": method.name,
                "spec": method.spec,
                "in_use": getattr(upscaler, "in_use", {}),  # all a method must have is push and flush
                **summary(timed[method.name]),
                "flops_per_frame": work / clip.frames,
                "parameters": parameters,
            }
        starts.clear()
        for method in methods if memory else ():
            rows[method.name] |= memory_of(method, clip, device, dtype)
            tell(method.name)
    first = rows[methods[0].name]
    for row in rows.values():
        row["ratio"] = row["seconds_per_frame"] / first["seconds_per_frame"]
    return {
        "format": FORMAT,
        "machine": measure.machine(),
        "load": load,
        "settings": settings,
        "repeats": repeats,
        "warmup": warmup,
        "methods": list(rows.values()),
    }


def compare(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """What changed since: {same_machine, first, rows: [{method, what, old, new, ratio, worse}], unknown}.

    On the same machine times compare as they are; on another one as ratios to the first method of the new
    run, and memory is left out. `worse`: larger by more than `tolerance`; a count by anything at all.
    """
    same = all(old["machine"][key] == new["machine"][key] for key in OF_MACHINE)
    before = {row["name"]: row for row in old["methods"]}
    first = new["methods"][0]["name"]
    anchored = first in before
    rows: list[dict[str, Any]] = []
    for now in new["methods"]:
        if now["name"] not in before:
            continue
        then = before[now["name"]]

        def add(what: str, a: float | None, b: float | None, slack: float, name: str = now["name"]) -> None:
            if a is not None and b is not None:
                ratio = b / a if a else (1.0 if not b else float("inf"))
                rows.append(
                    {"method": name, "what": what, "old": a, "new": b, "ratio": ratio, "worse": b > slack}
                )

        for key, title in TIMES.items():
            a, b = then[key], now[key]
            if not same:
                if not anchored or now["name"] == first:
                    continue
                a, b = a / before[first][key], b / new["methods"][0][key]
                title = f"{title}, of {first}'s"
            add(title, a, b, a * (1 + tolerance))
        for key, title in COUNTS.items():
            add(title, then[key], now[key], then[key] * (1 + 1e-9))
        a, b = then.get("peak_bytes"), now.get("peak_bytes")
        if same and a is not None:
            add("peak memory", a, b, a * (1 + tolerance) + MEMORY_SLACK)
    unknown = [row["name"] for row in new["methods"] if row["name"] not in before]
    return {"same_machine": same, "first": first if anchored else None, "rows": rows, "unknown": unknown}


def said(findings: dict[str, Any], tolerance: float) -> list[str]:
    """A comparison in lines: what it compares, what got worse, or that nothing did."""
    lines = []
    if findings["same_machine"]:
        lines.append("Compared on the same machine.")
    elif findings["first"] is None:
        lines.append("The machines differ and the old file lacks the first method: times are not compared.")
    else:
        lines.append(
            f"The machines differ: times are compared as ratios to {findings['first']}, memory is not."
        )
    if findings["unknown"]:
        lines.append(f"Not in the old file: {', '.join(findings['unknown'])}.")
    worse = [row for row in findings["rows"] if row["worse"]]
    for row in worse:
        change = f"{row['old']:.4g} -> {row['new']:.4g} ({row['ratio']:.2f}x)"
        lines.append(f"WORSE  {row['method']}: {row['what']} {change}")
    if not worse:
        lines.append(
            f"Nothing got worse by more than {tolerance:.0%}, in {len(findings['rows'])} comparisons."
        )
    return lines


def protocol(found: dict[str, Any]) -> list[str]:
    """How the numbers came about, in sentences."""
    s, m = found["settings"], found["machine"]
    height, width = s["size"]
    measured = any("rss_bytes" in row for row in found["methods"])
    memory = "of loading and running, in a process of its own" if measured else "not measured"
    load = "" if found["load"] is None else f", load {found['load']:.1f} at the beginning"
    return [
        f"{s['frames']} frames of {width}x{height} (LQ, noise) to x{s['scale']}, {s['push']} pushed at a "
        f"time; {s['device']} in {s['dtype']}; medians of {found['repeats']} runs after {found['warmup']} to "
        f"warm up, the methods in turns.",
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['gpu'] or 'no GPU'}; torch "
        f"{m['torch']}, Python {m['python']}; {m['date']}{load}.",
        "Latency: from the last input frame needed to the output frame in the host's memory; how many frames "
        "must come in first is the delay (p50 and p95 without the first output). Loading is not timed.",
        f"Operations: useful ones, by torch's counter. Memory: {memory}.",
    ]


def table_of(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text."""
    heads = ["method", "first output ms", "p50 ms", "p95 ms", "delay frames", "ms/frame", "FPS",
             "steady FPS", f"of {found['methods'][0]['name']}'s time", "GFLOP/frame", "parameters M",
             "peak MiB", "reserved MiB", "RSS MiB"]  # fmt: skip
    rows = [
        [
            row["name"],
            f"{1e3 * row['first_output_seconds']:.1f} after {row['first_output_frames']}",
            f"{1e3 * row['latency_p50']:.1f}",
            f"{1e3 * row['latency_p95']:.1f}",
            f"{row['delay_frames']}{' (whole clip)' if row['waits_for_all'] else ''}",
            f"{1e3 * row['seconds_per_frame']:.2f}",
            f"{row['fps']:.2f}",
            "–" if row["steady_fps"] is None else f"{row['steady_fps']:.2f}",
            f"{row['ratio']:.2f}x",
            f"{row['flops_per_frame'] / 1e9:.3g}",
            f"{row['parameters'] / 1e6:.3g}",
            *(_mib(row.get(key)) for key in ("peak_bytes", "reserved_bytes", "rss_bytes")),
        ]
        for row in found["methods"]
    ]
    keep = [i for i in range(len(heads)) if any(row[i] != "–" for row in rows)]
    return [heads[i] for i in keep], [[row[i] for i in keep] for row in rows]


def _mib(value: int | None) -> str:
    return "–" if value is None else f"{value / MIB:.0f}"


def text_table(found: dict[str, Any]) -> str:
    """The table for a terminal."""
    heads, rows = table_of(found)
    wide = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
    return "\n".join(
        "  ".join([line[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(line[1:], wide[1:], strict=True))])
        for line in (heads, *rows)
    )


def write_page(path: Path, found: dict[str, Any], findings: dict[str, Any] | None) -> None:
    """The numbers as a page: table, latency of every frame, where the old run stood."""
    heads, rows = table_of(found)
    height, width = found["settings"]["size"]
    page = Page(f"Benchmark at {width}x{height}")
    columns = [(i, head, None) for i, head in enumerate(heads)]
    unranked = {i: [None] * len(rows) for i in range(1, len(heads))}  # numbers, of which none is the best
    page.table([dict(enumerate(row)) for row in rows], columns, ranks=unranked)
    page.protocol([*protocol(found), *(_in_use(row) for row in found["methods"])])
    names = [row["name"] for row in found["methods"]]
    series = {r["name"]: (list(range(len(r["per_frame"]))), r["per_frame"]) for r in found["methods"]}
    latency = charts.lines(series, "output frame", "latency in seconds", log=True, whole=True)
    speed = charts.dots(
        {name: [r["fps"] if r["name"] == name else None for r in found["methods"]] for name in names},
        names,
        "frames per second",
        log=True,
    )
    page.charts([("Latency of every output frame", latency), ("Throughput", speed)], names)
    if findings is not None:
        page.heading("Since the old run")
        page.table(
            [{**row, "worse": "worse" if row["worse"] else ""} for row in findings["rows"]],
            [("method", "method", None), ("what", "what", None), ("old", "old", ".4g"), ("new", "new", ".4g"),
             ("ratio", "new / old", ".3f"), ("worse", "", None)],
        )  # fmt: skip
    page.save(path)


def _in_use(row: Mapping[str, Any]) -> str:
    words = [f"`{row['spec']}`", *(f"{k.replace('_', ' ')} {v}" for k, v in row["in_use"].items())]
    return f"{row['name']}: {'; '.join(words)}"


if __name__ == "__main__":
    run(main)
