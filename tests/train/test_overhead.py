"""What the loop costs beside forward, backward and optimiser: against a bare loop, in turns within a run."""

import statistics
import time

import pytest
import torch

from data import build
from flashvsr.base.draws import Draw
from train import loop
from train.config import compose
from train.launch import World
from train.turns import Losses

WORLD = World(0, 1, 0, torch.device("cpu"))
# Models of scale=small on short clips and single samples: steps are shorter than the scale's own, so that a
# fixed cost weighs more.
SMALL = [
    "scale=small", "precision=fp32", "data.height=64", "data.width=64", "data.short_side=96",
    "data.latents_per_clip=6", "data.images=0", "data.slots=2", "data.val_slots=1", "data.workers=0",
    "scale.train.vae.crop=32", "scale.lpips_net=alex", "global_batch_size=1", "micro_batch_size=1",
    "optim.warmup=0", "log.quiet=true", "save_every=1000", "validate_every=1000",
]  # fmt: skip
LIMIT = 0.03


def bare(stage, micros, step):
    """The same models, batches and optimisers; one backward of the sum, nothing looked at."""
    draws = [Draw(stage.config.seed, step, micro["counters"].tolist()) for micro in micros]
    inputs = [stage.prepare(micro, draw) for micro, draw in zip(micros, draws, strict=True)]
    for role, loss in stage.turns(step):
        engine = stage.roles[role]
        for one, draw in zip(inputs, draws, strict=True):
            losses = loss(one, draw)
            terms = [losses.weights[name] * value.sum() for name, value in losses.terms.items()]
            (sum(terms) / stage.config.global_batch_size).backward()
        torch.nn.utils.clip_grad_norm_(engine.trained().values(), engine.clip)
        engine.optimizer.step()
        engine.optimizer.zero_grad(set_to_none=True)
        if role == stage.main and stage.ema is not None:
            stage.ema.update(engine.trained())
    return {}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The stages that those measured start from, a step each."""
    folder = tmp_path_factory.mktemp("overhead")
    build.build([], folder / "data", synthetic_clips=2, quiet=True)
    for stage in ("vae", "teacher", "sparse_causal"):
        assert loop.run(config(stage, folder, "steps=1", "data.val_pictures=0"), WORLD) == 0
    return folder


def config(stage, folder, *overrides):
    return compose(stage, [f"runs_dir={folder}", f"data.shards={folder}/data", *SMALL, *overrides])


def clocks():
    # Processor time: what other processes do on a busy machine counts neither here nor there.
    return time.process_time(), time.perf_counter()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cycle"), [("teacher", 1), ("one_step", 25)])
def test_the_loop_costs_at_most_three_percent_of_a_step(before, monkeypatch, capsys, name, cycle):
    """`cycle` steps of our loop, then as many bare ones, in turns; the rest of the loop goes around both. In
    25 steps of stage 3 the student has five turns, and in one of them its terms are taken apart."""
    rounds, own, spent = 4 if cycle == 1 else 2, loop.train_step, {"own": [], "bare": [], "around": []}
    of = Losses.of
    last = []

    def step_of_either(stage, micros, step):
        kind = "bare" if step // cycle % 2 else "own"
        if last and step > 1:
            spent["around"].append([now - then for now, then in zip(clocks(), last[-1], strict=True)])
        begin = clocks()
        if kind == "own":
            record = own(stage, micros, step)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(Losses, "of", lambda outputs: Losses(list(outputs), list(outputs)))
                bare(stage, micros, step)
            record = {"loss/x": 1.0, "grad_norm/x": 1.0}
        last.append(clocks())
        spent[kind].append([now - then for now, then in zip(last[-1], begin, strict=True)])
        return record

    monkeypatch.setattr(loop, "train_step", step_of_either)
    steps = 2 * cycle * (rounds + 1)
    overrides = [f"steps={steps}", "optim.lr=1e-6", f"run=default{name}", "data.val_pictures=0"]
    overrides += [f"init={before}/default/stage1/export"] if name == "teacher" else []
    overrides += (
        [f"init={before}/default/stage2/export", f"teacher={before}/default/stage1/export"]
        if name == "one_step"
        else []
    )
    assert loop.run(config(name, before, *overrides), WORLD) == 0
    assert Losses.of == of

    def per_step(kind, clock):
        values = [times[clock] for times in spent[kind]]
        cycles = [sum(values[i : i + cycle]) for i in range(cycle, len(values), cycle)]  # the first warms up
        return statistics.median(cycles) / cycle

    with capsys.disabled():
        for clock, words in enumerate(("processor time", "time")):
            ours, least = per_step("own", clock), per_step("bare", clock)
            around = statistics.median(times[clock] for times in spent["around"])
            share = (ours + around - least) / least
            print(
                f"\n{name}, {words}: a bare step {least:.3f} s, ours {ours:.3f} s and "
                f"{1e3 * around:.1f} ms around it: {share:+.1%}",
                end="",
            )
            if clock == 0:
                assert share <= LIMIT
