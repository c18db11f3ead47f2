"""What methods cost: values against closed forms on a clock of our own, counts against formulas."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eval.benchmark import compare, main, read_benchmark, said, table_of, write_page
from eval.methods import parse_method
from eval.speed import Call, Clip, count_work, memory_of, run_clip, summary, time_methods
from flashvsr.attention import sparse_attention
from flashvsr.attention.selection import causal_chunks, pool, select
from flashvsr.base import measure
from flashvsr.base.cli import UserError
from flashvsr.bench.models import Subject
from flashvsr.bench.pipeline import running, step_work


class Clocked:
    """Gives frames in chunks of `chunk` (None: all at flush), and takes `cost(frames given)` seconds of a
    clock that only this class moves."""

    def __init__(self, clock, chunk, cost):
        self.clock, self.chunk, self.cost, self.held = clock, chunk, cost, 0

    def _give(self, count):
        self.clock[0] += self.cost(count)
        self.held -= count
        return np.zeros((count, 8, 8, 3), np.uint8)

    def push(self, frames):
        self.held += len(frames)
        return self._give(self.held // self.chunk * self.chunk if self.chunk else 0)

    def flush(self):
        return self._give(self.held)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    return now


def cost(count):
    return 0.001 if count == 0 else 0.1 + 0.05 * count


def test_latency_delay_and_speed_of_a_method_in_chunks(clock):
    calls = run_clip(Clocked(clock, 4, cost), np.zeros((10, 2, 2, 3), np.uint8), push=1)
    assert [c.given for c in calls] == [0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 2]
    assert [c.taken for c in calls] == [*range(1, 11), 10] and calls[-1].flush and not calls[-2].flush
    row = summary([calls])
    assert row["first_output_seconds"] == pytest.approx(0.3) and row["first_output_frames"] == 4
    assert row["delay_frames"] == 3  # frame 0 waits for 1, 2 and 3; frame 8 only for 9
    assert not row["waits_for_all"]
    assert row["latency_p50"] == pytest.approx(0.3)  # of 4 frames at 0.3 s and 2 at 0.2 s
    assert row["latency_p95"] == pytest.approx(0.3)
    assert row["per_frame"] == pytest.approx([0.3] * 8 + [0.2] * 2)
    total = 2 * 0.3 + 0.2 + 8 * 0.001
    assert row["seconds_per_frame"] == pytest.approx(total / 10) and row["fps"] == pytest.approx(10 / total)
    assert row["steady_fps"] == pytest.approx(4 / (0.3 + 5 * 0.001))  # pushes 5 to 10, not the flush


def test_a_method_of_whole_clips_says_that_it_waits(clock):
    row = summary([run_clip(Clocked(clock, None, cost), np.zeros((6, 2, 2, 3), np.uint8), push=4)])
    assert row["waits_for_all"] and row["steady_fps"] is None
    assert (row["first_output_frames"], row["delay_frames"]) == (6, 5)
    assert row["latency_p50"] == row["latency_p95"] == row["first_output_seconds"] == pytest.approx(0.4)


def test_medians_are_of_runs_and_the_first_output_stands_apart():
    def run(first, later):
        return [Call(1, 1, first, False), Call(2, 1, later, False), Call(2, 0, 0.0, True)]

    row = summary([run(9.0, 1.0), run(3.0, 2.0), run(5.0, 30.0)])
    assert (row["first_output_seconds"], row["latency_p50"]) == (5.0, 2.0)
    assert row["latency_p95"] == pytest.approx(np.percentile([1.0, 2.0, 30.0], 95))
    assert row["seconds_per_frame"] == 10.0 / 2  # totals 10, 5, 35
    assert row["per_frame"] == [5.0, 2.0]


def test_methods_take_turns_and_the_warm_up_does_not_count(clock):
    seen = []

    def start(name, seconds):
        seen.append(name)
        first = seen.count(name) == 1
        return Clocked(clock, 1, lambda count: count * (100.0 if first else seconds))

    starts = {"a": lambda: start("a", 1.0), "b": lambda: start("b", 4.0)}
    runs = time_methods(starts, Clip(2, 2, 3), repeats=2, warmup=1)
    assert "".join(seen) == "ab" + "ab" + "ba"
    assert [len(own) for own in runs.values()] == [2, 2]
    assert {n: summary(own)["seconds_per_frame"] for n, own in runs.items()} == {"a": 1.0, "b": 4.0}


def test_lost_frames_are_refused(clock):
    loses = Clocked(clock, 2, cost)
    loses.flush = lambda: np.zeros((0, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="method 'x': 3 frames went in, 2 came out"):
        time_methods({"x": lambda: loses}, Clip(2, 2, 3), repeats=1, warmup=0)


def test_operations_and_parameters_are_counted():
    conv, unused = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Linear(7, 7)
    tied = torch.nn.Sequential(conv, torch.nn.Identity(), torch.nn.Conv2d(5, 2, 1))
    assert unused.weight.numel() == 49

    def call():
        with torch.inference_mode():
            y = tied(torch.zeros(2, 3, 8, 6))
            conv(torch.zeros(1, 3, 4, 4))
            q = torch.zeros(1, 2, 16, 4)
            F.scaled_dot_product_attention(q, q, q)
        return y

    work, parameters = count_work(call)
    assert work == 2 * (2 * 48 * 5 * 27 + 2 * 48 * 2 * 5 + 16 * 5 * 27) + 4 * 2 * 16 * 16 * 4
    assert parameters == 5 * 27 + 5 + 2 * 5 + 2


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_sparse_attention_counts_the_pairs_selected(backend):
    torch.manual_seed(0)
    chunks, per, block, heads, width = 3, 4, 8, 2, 16
    q, k, v = (torch.randn(2, heads, chunks * per * block, width) for _ in range(3))
    pooled = pool(k, block).unflatten(2, (-1, per))
    visible = [tuple(row.nonzero().flatten().tolist()) for row in causal_chunks(chunks, chunks)]
    selection = select(
        pool(q, block),
        lambda seen: pooled[:, :, list(seen)].flatten(2, 3),
        visible,
        [c * per for c in range(chunks)],
        key_blocks=chunks * per,
        per_chunk=per,
        block_tokens=block,
        ratio=0.5,
    )
    from flashvsr.attention import backends

    original = backends.sparse_attention
    work, _ = count_work(lambda: backends.sparse_attention(q, k, v, selection, backend=backend))
    pairs = selection.density * (chunks * per * block) ** 2  # per sample and head
    assert work == pytest.approx(4 * 2 * heads * pairs * width, rel=1e-6)
    assert backends.sparse_attention is original is sparse_attention


def test_a_streaming_step_counts_as_the_formulas_say():
    subject = Subject("tiny", (128, 128), torch.device("cpu"), torch.float32)
    model = subject.model("dit", "lr_projector", "tc_decoder")
    upscaler, frames = running(model, subject, local_range=None)
    work, parameters = count_work(lambda: upscaler.push(frames))
    # Beyond them is what the formulas leave out: the embedding of sigma and the choice of blocks.
    assert work == pytest.approx(sum(step_work(subject, model).values()), rel=1e-4)
    parts = (model.dit, model.lr_projector, model.tc_decoder)
    assert parameters == sum(p.numel() for part in parts for p in part.parameters())


def found(**times):
    """A benchmark.json with the seconds per frame of its methods; all other times are ten times that."""
    row = {
        "spec": "x", "in_use": {}, "first_output_frames": 25, "delay_frames": 24, "waits_for_all": False,
        "flops_per_frame": 2e9, "parameters": 10, "peak_bytes": 2**30, "reserved_bytes": None,
        "rss_bytes": 2**31, "steady_fps": None, "per_frame": [0.5, 0.25],
    }  # fmt: skip
    base = next(iter(times.values()))
    return {
        "format": 1,
        "machine": measure.machine(),
        "load": 0.5,
        "settings": {"size": [32, 48], "frames": 9, "push": 1, "scale": 4, "device": "cpu",
                     "dtype": "float32"},
        "repeats": 3,
        "warmup": 1,
        "methods": [
            {"name": name, **row, "seconds_per_frame": s, "fps": 1 / s, "ratio": s / base,
             **dict.fromkeys(("first_output_seconds", "latency_p50", "latency_p95"), 10 * s)}
            for name, s in times.items()
        ],
    }  # fmt: skip


def worse(old, new, tolerance=0.1):
    return [(r["method"], r["what"]) for r in compare(old, new, tolerance)["rows"] if r["worse"]]


def test_on_the_same_machine_times_compare_as_they_are():
    old = found(a=1.0, b=2.0)
    assert worse(old, found(a=1.09, b=2.0)) == []
    times = ["seconds per frame", "first output", "latency p50"]
    assert worse(old, found(a=1.11, b=2.0)) == [("a", what) for what in times]
    assert worse(old, found(a=1.11, b=2.0), tolerance=0.2) == []
    assert len(compare(old, found(a=1.0, b=2.0), 0.1)["rows"]) == 2 * (3 + 4 + 1)
    text = "\n".join(said(compare(old, found(a=1.11, c=1.0), 0.1), 0.1))
    assert "same machine" in text and "Not in the old file: c." in text
    assert "WORSE  a: seconds per frame 1 -> 1.11 (1.11x)" in text


def test_on_another_machine_only_ratios_to_the_first_method_compare():
    old = found(a=1.0, b=2.0)
    old["machine"]["cpu"] = "another"
    old["methods"][0]["peak_bytes"] = 1
    assert worse(old, found(a=10.0, b=20.0)) == []  # ten times slower, but alike
    assert worse(old, found(a=0.5, b=1.2)) == [
        ("b", f"{what}, of a's") for what in ("seconds per frame", "first output", "latency p50")
    ]
    assert (
        "The machines differ: times are compared as ratios to a"
        in said(compare(old, old | found(a=1.0), 0.1), 0.1)[0]
    )
    without = found(c=1.0, b=9.0)
    assert worse(old, without) == []
    assert "times are not compared" in said(compare(old, without, 0.1), 0.1)[0]


def test_counts_may_not_grow_at_all_and_memory_has_its_slack():
    old, new = found(a=1.0), found(a=1.0)
    new["methods"][0] |= {"delay_frames": 25, "flops_per_frame": 2.001e9, "peak_bytes": int(1.11 * 2**30)}
    assert worse(old, new) == [("a", "delay in frames"), ("a", "operations per frame")]
    new["methods"][0]["peak_bytes"] = int(1.12 * 2**30)  # beyond 10 % and 16 MiB
    assert worse(old, new)[-1] == ("a", "peak memory")
    del new["methods"][0]["peak_bytes"]
    assert ("a", "peak memory") not in worse(old, new)
    assert worse(new, old) == []


def test_the_table_and_the_page_hold_every_number(tmp_path):
    new = found(a=0.5, b=0.25)
    heads, rows = table_of(new)
    assert dict(zip(heads, rows[1], strict=True)) == {
        "method": "b", "first output ms": "2500.0 after 25", "p50 ms": "2500.0", "p95 ms": "2500.0",
        "delay frames": "24", "ms/frame": "250.00", "FPS": "4.00", "of a's time": "0.50x", "GFLOP/frame": "2",
        "parameters M": "1e-05", "peak MiB": "1024", "RSS MiB": "2048",
    }  # fmt: skip
    write_page(tmp_path / "b.html", new, compare(found(a=0.1, b=0.25), new, 0.1))
    html = (tmp_path / "b.html").read_text()
    assert all(f">{cell}</td>" in html for row in rows for cell in row)
    assert "9 frames of 48x32" in html and "load 0.5 at the beginning" in html
    assert "Memory: of loading and running" in html
    assert html.count(">worse</td>") == 3 and ">5.000</td>" in html


def test_the_command_measures_compares_and_refuses(tmp_path, capsys):
    argv = ["--method", "bicubic", "--method", "lanczos", "--size", "8x12", "--frames", "3", "--repeats", "2",
            "--no-memory", "--quiet"]  # fmt: skip
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    first = read_benchmark(tmp_path / "one" / "benchmark.json")
    assert [row["name"] for row in first["methods"]] == ["bicubic", "lanczos"]
    assert first["methods"][0]["ratio"] == 1 and first["methods"][1]["ratio"] > 0
    assert first["methods"][0]["delay_frames"] == 0 and first["methods"][0]["parameters"] == 0
    assert len(first["methods"][0]["per_frame"]) == 3 and first["machine"]["torch"] == torch.__version__
    assert "Memory: not measured." in capsys.readouterr().out

    slower = copy.deepcopy(first)
    for row in slower["methods"]:
        row |= {key: row[key] / 1000 for key in ("seconds_per_frame", "first_output_seconds", "latency_p50")}
    (tmp_path / "old.json").write_text(json.dumps(slower))
    again = [*argv, "--out", str(tmp_path / "two"), "--compare", str(tmp_path / "old.json")]
    assert main(again) == 1
    assert "WORSE  lanczos: seconds per frame" in capsys.readouterr().out
    assert main([*again, "--tolerance", "1e9"]) == 0

    for change, complaint in (
        (["--size", "8x16"], r"size \[8, 12\], this run has \[8, 16\]"),
        (["--frames", "0"], "--frames must be at least 1, got 0"),
        (["--method", "bicubic"], "two methods are named 'bicubic'"),
        (["--method", f"done={tmp_path / 'one'}"], "finished outputs: it has no speed"),
    ):
        with pytest.raises(UserError, match=complaint):
            main([*again, *change])
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(UserError, match="no benchmark.json"):
        main(again)


def test_memory_is_of_a_process_of_its_own():
    ballast = np.ones(300 * 2**20, np.uint8)  # held here, so not there
    clip = Clip(64, 96, 8)
    found = memory_of(parse_method("bicubic"), clip, "cpu", torch.float32)
    assert found["reserved_bytes"] is None and found["rss_bytes"] > 50 * 2**20
    one = 16 * 64 * 96 * 3  # bytes of an output frame
    assert found["peak_bytes"] is None or one < found["peak_bytes"] < 100 * 2**20 < ballast.nbytes
