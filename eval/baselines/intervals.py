"""What chunking costs: `python -m eval.baselines.intervals LR [--hr HR] --network basicvsr --weights FILE`.

For every interval: how far the frames are from those of the whole clip, at seams (the frames on both sides of
a chunk's edge) and inside chunks, in 8-bit levels, and in PSNR when there is an HR clip; how many frames must
come in before one goes out; and how long it takes. Prints a Markdown table; --out writes all of it as JSON.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from eval.baselines.chunked import Chunked
from eval.baselines.weights import NETWORKS, Network, load_network
from eval.metrics.psnr import psnr_per_frame
from flashvsr.base.cli import Progress, UserError, run
from flashvsr.base.files import write_json
from flashvsr.base.measure import machine, timed
from flashvsr.base.video_io import probe, read_frames
from flashvsr.weights.tensors import DTYPES

Setting = tuple[int | None, int, bool]  # interval, overlap, carry
WHOLE: Setting = (None, 0, False)


def stream(network: Network, setting: Setting, frames: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """A clip pushed frame by frame: what comes out, and what it took.

    first_frames: pushed before the first frame came out; first_seconds: of the push that gave it (of flush
    if none did); chunk_seconds: median of those that gave frames; steady_ms: per frame, after the first
    chunk (of all, where there is one chunk only).
    """
    interval, overlap, carry = setting
    method = Chunked(network, interval=interval, overlap=overlap, carry=carry)
    given: list[tuple[int, float, np.ndarray]] = []  # frames pushed so far, seconds, frames that came out
    for i in range(len(frames) + 1):
        call = method.flush if i == len(frames) else lambda i=i: method.push(frames[i : i + 1])
        out, seconds = timed(call)
        if len(out):
            given.append((min(i + 1, len(frames)), seconds, out))
    later = given[1:] or given
    return np.concatenate([out for *_, out in given]), {
        "first_frames": given[0][0],
        "first_seconds": given[0][1],
        "chunk_seconds": statistics.median(seconds for _, seconds, _ in given),
        "steady_ms": 1000 * sum(seconds for _, seconds, _ in later) / sum(len(out) for *_, out in later),
    }


def seams(count: int, interval: int | None) -> np.ndarray:
    """Which of `count` frames stand beside a chunk's edge."""
    near = np.zeros(count, bool)
    if interval is not None:
        edges = np.arange(interval, count, interval)
        near[edges] = near[edges - 1] = True
    return near


def split_mean(values: np.ndarray, near: np.ndarray) -> dict[str, float | None]:
    """The mean over frames at seams and inside chunks; None where there is no such frame."""
    return {
        "seams": float(values[near].mean()) if near.any() else None,
        "inside": float(values[~near].mean()) if not near.all() else None,
    }


def measure(
    network: Network,
    lr: np.ndarray,
    hr: np.ndarray | None,
    settings: Sequence[Setting],
    *,
    fps: float,
    repeats: int = 1,
    quiet: bool = True,
) -> list[dict[str, Any]]:
    """A row for the whole clip and one for each setting; times are medians of `repeats` rounds in turns.

    lr: uint8 `F H W 3`; hr: uint8 `F 4H 4W 3`. difference: mean absolute one to the whole clip's frames, in
    8-bit levels. psnr_change: mean over frames of their PSNR less that of the whole clip's same frames, for
    frames differ in difficulty. delay_seconds: of a chunk's first frame, from when it is there, at `fps`,
    until it comes out.
    """
    rows: dict[Setting, dict[str, Any]] = {}
    times: dict[Setting, list[dict[str, float]]] = {s: [] for s in (WHOLE, *settings)}
    with Progress(repeats * len(times), network.name, "runs", quiet) as progress:
        for _ in range(repeats):
            for setting in times:  # the whole clip first
                out, took = stream(network, setting, lr)
                times[setting].append(took)
                if setting == WHOLE:
                    whole = out
                rows.setdefault(setting, _compared(setting, out, whole, hr))
                progress.update()
    for (interval, overlap, _), row in rows.items():
        taken = times[row.pop("setting")]
        row |= {key: statistics.median(t[key] for t in taken) for key in taken[0]}
        delay = len(lr) - 1 if interval is None else min(interval - 1 + overlap, len(lr) - 1)
        row |= {"delay_frames": delay, "delay_seconds": delay / fps + row["chunk_seconds"]}
    return list(rows.values())


def _compared(setting: Setting, out: np.ndarray, whole: np.ndarray, hr: np.ndarray | None) -> dict[str, Any]:
    interval, overlap, carry = setting
    near = seams(len(out), interval)
    off = [np.abs(a.astype(np.int16) - b) for a, b in zip(out, whole, strict=True)]
    row = {
        "setting": setting,
        "interval": interval,
        "overlap": overlap,
        "carry": carry,
        "max_difference": int(max(o.max() for o in off)),
        "difference": split_mean(np.array([o.mean() for o in off]), near),
    }
    if hr is None:
        return row
    psnr = psnr_per_frame(out, hr).numpy()
    change = psnr - psnr_per_frame(whole, hr).numpy()
    return row | {"psnr": float(psnr.mean()), "psnr_change": split_mean(change, near)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    scored = "psnr" in rows[0]
    titles = ["interval", "overlap", "carry", "off whole: seams", "inside", "max"]
    titles += ["PSNR", "its change: seams", "inside"] if scored else []
    titles += ["frames in before first out", "its push, s", "steady, ms/frame", "delay, s"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---:|" * len(titles)]
    for row in rows:
        cells = ["whole" if row["interval"] is None else str(row["interval"]), str(row["overlap"])]
        cells += ["yes" if row["carry"] else "no"]
        cells += [_number(row["difference"][part], 4) for part in ("seams", "inside")]
        cells += [str(row["max_difference"])]
        if scored:
            cells += [f"{row['psnr']:.3f}"]
            cells += [_number(row["psnr_change"][part], 4) for part in ("seams", "inside")]
        cells += [f"{row['first_frames']:.0f}", f"{row['first_seconds']:.3f}", f"{row['steady_ms']:.1f}"]
        cells += [f"{row['delay_seconds']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def parse_intervals(text: str) -> list[int]:
    """`1-15` or `1,5,15`; UserError for anything else."""
    first, dash, last = text.partition("-")
    numbers = [first, last] if dash else text.split(",")
    if not all(n.isdigit() and int(n) > 0 for n in numbers) or (dash and int(first) > int(last)):
        raise UserError(f"--intervals {text!r} must be like 1-15 or 1,5,15")
    return list(range(int(first), int(last) + 1)) if dash else [int(n) for n in numbers]


def read_clip(path: str, frames: int) -> np.ndarray:
    """The first `frames` frames, uint8 `F H W 3`."""
    clip = list(islice(read_frames(path), frames))
    if not clip:
        raise UserError(f"{path} holds no frames")
    return np.stack(clip)


def check_pair(lr: np.ndarray, hr: np.ndarray, path: str) -> None:
    """UserError when HR is not four times LR, or has another number of frames."""
    wanted = (len(lr), 4 * lr.shape[1], 4 * lr.shape[2])
    if hr.shape[:3] != wanted:
        raise UserError(
            f"--hr {path} has {hr.shape[0]} frames of {hr.shape[1]}x{hr.shape[2]}, to this LR belong "
            f"{wanted[0]} of {wanted[1]}x{wanted[2]}; make LR with `python -m eval prepare`"
        )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.baselines.intervals", description=__doc__)
    parser.add_argument("lr", metavar="LR", help="clip to upscale: a video or a folder of frames")
    parser.add_argument("--hr", help="the same clip four times as large, for PSNR")
    parser.add_argument("--network", choices=list(NETWORKS), default="basicvsr")
    parser.add_argument("--weights", help="checkpoint by BasicSR's names, or random for a demonstration")
    parser.add_argument("--intervals", default="1-15", help="like 1-15 or 1,5,15 (default: %(default)s)")
    parser.add_argument("--overlap", type=int, default=0, metavar="K", help="also with K frames of context")
    parser.add_argument("--carry", action="store_true", help="also with carried state (and the overlap)")
    parser.add_argument("--frames", type=int, default=45, help="of the clip (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="rounds; times are medians")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--out", help="also write the table as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    for name in ("frames", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1")
    intervals = parse_intervals(args.intervals)
    network = load_network(args.network, args.weights, device=args.device, dtype=DTYPES[args.dtype])
    lr = read_clip(args.lr, args.frames)
    hr = None if args.hr is None else read_clip(args.hr, len(lr))
    if hr is not None:
        check_pair(lr, hr, args.hr)
    settings: list[Setting] = [(i, 0, False) for i in intervals]
    settings += [(i, args.overlap, False) for i in intervals if args.overlap]
    settings += [(i, args.overlap, True) for i in intervals if args.carry]
    fps = float(probe(args.lr).fps)
    rows = measure(network, lr, hr, settings, fps=fps, repeats=args.repeats, quiet=args.quiet)
    said = {
        "network": network.name,
        "weights": network.weights,
        "precision": args.dtype,
        "clip": Path(args.lr).name,
        "frames": len(lr),
        "size": f"{lr.shape[1]}x{lr.shape[2]}",
        "fps": fps,
        "repeats": args.repeats,
        "machine": machine(),
    }
    print(table(rows))
    print(", ".join(f"{key} {value}" for key, value in said.items() if key != "machine"))
    if args.out:
        write_json(args.out, said | {"rows": rows})


if __name__ == "__main__":
    run(main)
