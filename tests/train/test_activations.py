"""What blocks keep and compute again, offloaded and compiled: the same numbers, less memory, two graphs."""

import copy

import pytest
import torch

from flashvsr.attention.plans import PackedDense, SparseCausal
from flashvsr.config import PRESETS
from train import footprint
from train.config import compose
from train.parallel import activations

TINY = PRESETS["tiny"]
GRIDS = [(4, 8, 8), (1, 8, 8)]
WAYS = [("full", False), ("selective", False), ("full", True), ("selective", True)]


def config(*overrides):
    return compose("teacher", ["scale=tiny", "data.height=128", "data.width=128", *overrides])


def module_of(*overrides):
    torch.manual_seed(0)
    c = config(*overrides)
    return c, footprint.make_denoiser(c, TINY, projector=False, mode="clip")


def velocities(c, module, sparse, grids=None):
    torch.manual_seed(1)
    grids = grids or (GRIDS[:1] if sparse else GRIDS)
    latents = [torch.randn(1, 16, f, 2 * h, 2 * w) for f, h, w in grids]
    dit = TINY.dit
    features = [[torch.randn(1, *grid, dit.dim).requires_grad_() for grid in grids]]
    if sparse:
        plan = SparseCausal(grids[0], block=dit.block, head_dim=dit.head_dim, ratio=0.5)
    else:
        plan = PackedDense(grids, dit.head_dim)
    with footprint.autocast(c):
        return module(latents, torch.full((1, len(grids)), 0.5), plan, features=features)


def gradients(c, module, sparse=False, grids=None):
    sum(x.float().square().mean() for x in velocities(c, module, sparse, grids)).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("precision", "sparse"), [("fp32", True), ("bf16", False)])
def test_gradients_are_the_same_bits_whatever_is_kept(precision, sparse):
    """Also with an adapter; under block-sparse attention the recomputation reads the blocks chosen before."""
    common = [f"precision={precision}", "stage.lora_rank=4"]
    wanted = gradients(*module_of("checkpointing=none", *common), sparse)
    assert len(wanted) > 20 and all(g.abs().max() > 0 for n, g in wanted.items() if "lora_B" in n)
    for kind, offload in WAYS:
        found = gradients(*module_of(f"checkpointing={kind}", f"offload={offload}", *common), sparse)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), (kind, offload)


def test_what_is_kept_shrinks_and_selective_attends_once(monkeypatch):
    kept, attended = {}, {}
    plain = PackedDense.attend
    for kind, offload in [("none", False), *WAYS]:
        c, module = module_of(f"checkpointing={kind}", f"offload={offload}")
        calls = []
        monkeypatch.setattr(PackedDense, "attend", lambda *a, calls=calls: calls.append(0) or plain(*a))
        with footprint.Saved(module) as saved:
            loss = sum(x.square().mean() for x in velocities(c, module, False))
        kept[kind, offload] = saved.bytes
        loss.backward()
        attended[kind, offload] = len(calls) / TINY.dit.layers
    assert kept["full", False] < kept["selective", False] < kept["none", False] / 2
    assert kept["selective", True] == kept["full", True] < kept["full", False]
    assert attended["none", False] == attended["selective", False] == attended["selective", True] == 1
    assert attended["full", False] == attended["full", True] == 2


def test_offloaded_storages_are_copied_once_and_let_go():
    base = torch.randn(6, 4, requires_grad=True)
    sent = []
    real = activations.to_host
    activations.to_host = lambda storage: sent.append(storage.nbytes()) or real(storage)
    try:
        x = base * 1
        hooks = activations.OnHost([])
        with hooks:
            y = x[:3] * x[3:] + (x[1:4] * x[2:5])  # four views of one storage
        assert sent == [x.untyped_storage().nbytes()] and not hooks.parked
    finally:
        activations.to_host = real
    y.sum().backward()
    found, base.grad = base.grad, None
    x = base * 1
    (x[:3] * x[3:] + (x[1:4] * x[2:5])).sum().backward()
    assert torch.equal(found, base.grad)


def test_a_copy_runs_its_own_weights():
    """Roles are deep-copied for validation and for what a stage leaves."""
    c, module = module_of("checkpointing=full", "compile=true")
    other = copy.deepcopy(module)
    for block in other.dit.blocks:
        assert block.forward.__self__ is block
        assert block.before.__self__ is block and block.after.__self__ is block


@pytest.fixture
def eager_dynamo(monkeypatch):
    """torch.compile that traces and guards as always but generates no code; counts what it traces."""
    import torch._dynamo as dynamo

    from flashvsr.models import dit

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compiled(part):
        return torch.compile(getattr(dit.Block, part), dynamic=False, backend=backend)

    made = {part: compiled(part) for part in ("before", "after")}
    monkeypatch.setattr(dit, "_compiled", made.__getitem__)
    dynamo.reset()
    yield graphs
    dynamo.reset()


@pytest.mark.parametrize(("rank", "kind"), [(0, "none"), (4, "full"), (4, "selective")])
def test_compiled_blocks_are_traced_once_for_all_layers_and_windows(eager_dynamo, rank, kind):
    """`before` and `after`, one graph each, whatever the layer, the step and the recomputation; the numbers
    are those of the plain path."""
    common = [f"checkpointing={kind}", f"stage.lora_rank={rank}"]
    wanted = gradients(*module_of(*common), True)
    c, module = module_of(*common, "compile=true")
    found = gradients(c, module, True)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-7)
    assert len(eager_dynamo) == 2
    for window in (3, 4):
        latent, dit = torch.randn(1, 16, 8, 16, 16), TINY.dit
        plan = SparseCausal((8, 8, 8), block=dit.block, head_dim=dit.head_dim, ratio=0.5, window=window)
        features = torch.randn(1, 8, 8, 8, dit.dim).requires_grad_()
        (v,) = module([latent], torch.ones(1, 1), plan, features=[[features]])
        v.square().mean().backward()
    assert len(eager_dynamo) == 4  # another clip length, once; another window, never


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "selective"])
def test_inductor_gives_the_same_gradients(kind):
    """Takes a minute and a C++ compiler."""
    wanted = gradients(*module_of("stage.lora_rank=4"))
    found = gradients(*module_of("stage.lora_rank=4", "compile=true", f"checkpointing={kind}"))
    size = sum(g.square().sum() for g in wanted.values()).sqrt()
    off = sum((found[n] - wanted[n]).square().sum() for n in wanted).sqrt()
    assert off < 1e-4 * size


@pytest.mark.parametrize("way", ["none", "full", "selective"])
def test_what_must_stay_float32_does_under_autocast(way, monkeypatch):
    """Noise-level embedding, modulation, RoPE, pooled queries and keys; q and k themselves are bfloat16."""
    seen = {}
    c, module = module_of("precision=bf16", f"checkpointing={way}", "stage.lora_rank=4")

    def spy(owner, name):
        real = getattr(owner, name)

        def watched(*args, **kwargs):
            out = real(*args, **kwargs)
            seen.setdefault(name, set()).update(t.dtype for t in (out if isinstance(out, tuple) else (out,)))
            return out

        monkeypatch.setattr(owner, name, watched)

    from flashvsr.attention import plans
    from flashvsr.models import dit

    spy(module.dit, "embed_time")
    spy(dit, "_layer_norm")
    spy(plans, "pool")
    block = module.dit.blocks[0]
    spy(block, "before")
    grads = gradients(c, module, sparse=True)
    for name in ("embed_time", "_layer_norm", "pool"):
        assert seen[name] == {torch.float32}, name
    assert seen["before"] == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {g.dtype for g in grads.values()} == {torch.float32}
    rope = PackedDense(GRIDS, TINY.dit.head_dim).rope
    assert {t.dtype for t in rope} == {torch.float32}
