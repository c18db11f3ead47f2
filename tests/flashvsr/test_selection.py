"""The selection rule, against the rule written out pair by pair in float64."""

import math

import pytest
import torch

from flashvsr.attention import Selection, sparse_attention
from flashvsr.attention.plans import CachedStreaming, SparseCausal
from flashvsr.attention.ring import Ring
from flashvsr.attention.selection import budget, causal_chunks, choose, local_window, pool, select


def literal_choice(q, k, s, ratio, local):
    """One head, one query chunk: q `s d`, k `K d` -> boolean `s K`. Loops, no tensor tricks."""
    keys = len(k)
    p = [[0.0] * keys for _ in range(s)]
    for i in range(s):
        legal = [j for j in range(keys) if local is None or local[i][j % s]]
        scores = {
            j: sum(a * b for a, b in zip(q[i], k[j], strict=True)) / math.sqrt(len(q[i])) for j in legal
        }
        total = sum(math.exp(x) for x in scores.values())
        for j in legal:
            p[i][j] = math.exp(scores[j]) / total
    if ratio is None:
        return [[p[i][j] > 0 for j in range(keys)] for i in range(s)]
    n = s * keys  # pairs, counted before locality
    kept = max(1, min(int(s * s * ratio) - 1, n - 1))
    threshold = sorted((x for row in p for x in row), reverse=True)[kept]
    return [[x > threshold for x in row] for row in p]


@pytest.mark.parametrize("chunks", [1, 3, 4])
@pytest.mark.parametrize("ratio", [None, 0.01, 0.5, 0.75, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("window", [None, 2, 3])
def test_choose_equals_the_literal_rule(chunks, ratio, window):
    rows, columns, heads, d = 2, 3, 2, 8
    s = rows * columns
    torch.manual_seed(chunks)
    q, k = torch.randn(1, heads, s, d), torch.randn(1, heads, s * chunks, d)
    local = None if window is None else local_window(rows, columns, window)
    ours = choose(q, k, per_chunk=s, ratio=ratio, local=local)
    for h in range(heads):
        expected = literal_choice(
            q[0, h].double().tolist(), k[0, h].double().tolist(), s, ratio,
            None if local is None else local.tolist(),
        )  # fmt: skip
        assert ours[0, h].tolist() == expected


def test_budget():
    assert budget(per_chunk=8, pairs=8 * 24, ratio=0.75) == 47  # int(64 * 0.75) - 1
    assert budget(per_chunk=4, pairs=16, ratio=2.0) == 15  # never all pairs
    assert budget(per_chunk=2, pairs=12, ratio=0.1) == 1  # never none
    assert budget(per_chunk=60, pairs=60 * 240, ratio=2.0) == 7199


def test_without_locality_one_pair_is_always_dropped_and_with_it_all_legal_ones_may_stay():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
    assert choose(q, k, per_chunk=9, ratio=100.0).sum() == 80
    local = local_window(3, 3, 3)
    assert torch.equal(choose(q, k, per_chunk=9, ratio=100.0, local=local)[0, 0], local)
    assert choose(q, k, per_chunk=9, ratio=None).all()


def test_the_budget_is_the_chunks_not_the_rows():
    """One query block that scores far above the others takes nearly all of it; rows may stay empty."""
    q = torch.zeros(1, 1, 4, 2)
    q[..., 0, 0] = 1
    k = torch.zeros(1, 1, 4, 2)
    k[..., 0] = torch.tensor([9.0, 3.0, 2.0, 1.0])
    kept = choose(q, k, per_chunk=4, ratio=0.25)[0, 0]  # k = 3: the three largest P
    assert kept.sum() <= 3 and kept[0, 0]


def test_select_puts_each_chunk_where_its_keys_are():
    """A ring need not be in time order; what is chosen is the same pairs."""
    s, d = 4, 8
    torch.manual_seed(3)
    q, k = torch.randn(1, 2, s, d), torch.randn(1, 2, 3 * s, d)
    slots = {5: 2, 6: 0, 7: 1}  # chunk -> slot
    held = torch.empty_like(k)
    for i, slot in enumerate(slots.values()):
        held[:, :, slot * s : (slot + 1) * s] = k[:, :, i * s : (i + 1) * s]
    selection = select(
        q,
        lambda chunks: torch.cat([held[:, :, slots[c] * s : (slots[c] + 1) * s] for c in chunks], 2),
        [[5, 6, 7]],
        {c: slot * s for c, slot in slots.items()},
        key_blocks=3 * s,
        per_chunk=s,
        block_tokens=4,
        ratio=1.0,
    )
    in_time = torch.cat([selection.mask()[..., slot * s : (slot + 1) * s] for slot in slots.values()], -1)
    assert torch.equal(in_time, choose(q, k, per_chunk=s, ratio=1.0))


def test_causal_chunks():
    seen = causal_chunks(6, 3)
    expected = [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert seen.int().tolist() == expected
    assert causal_chunks(3, 1).all()


@pytest.mark.parametrize(
    "size,boundary", [(3, "truncated"), (4, "truncated"), (3, "preserved"), (9, "preserved")]
)
def test_local_window(size, boundary):
    rows, columns = 4, 6
    mask = local_window(rows, columns, size, boundary)

    def sees(a, b, n):
        first = a - size // 2
        if boundary == "preserved":
            first = min(max(first, 0), max(n - size, 0))
        return first <= b < first + size

    for r in range(rows):
        for c in range(columns):
            for r2 in range(rows):
                for c2 in range(columns):
                    expected = sees(r, r2, rows) and sees(c, c2, columns)
                    assert mask[r * columns + c, r2 * columns + c2] == expected


def test_pool_is_the_mean_in_float32():
    x = torch.arange(16, dtype=torch.bfloat16).reshape(1, 1, 8, 2)
    pooled = pool(x, 4)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, torch.tensor([[[[3.0, 4.0], [11.0, 12.0]]]]))


def test_exact_ties_at_the_threshold_are_all_dropped():
    """Only what is above the (k+1)-th largest stays: of equal pairs none, though the budget has room."""
    s = 4
    q, k = torch.zeros(1, 1, s, 2), torch.zeros(1, 1, s, 2)
    q[0, 0, :, 0] = torch.tensor([4.0, 1.0, 1.0, 1.0])
    k[0, 0, :, 0] = torch.tensor([3.0, 1.0, 1.0, 1.0])
    # P: row 0 nearly all on key 0; rows 1 to 3 alike, each with three equal keys
    for ratio, kept in [(3 / 16, 1), (5 / 16, 4), (10 / 16, 4), (1.0, 13)]:
        mask = choose(q, k, per_chunk=s, ratio=ratio)[0, 0]
        assert mask.tolist() == literal_choice(q[0, 0].tolist(), k[0, 0].tolist(), s, ratio, None)
        assert mask.sum() == kept


@pytest.mark.parametrize("ratio", [0.4, None])
@pytest.mark.parametrize("window", [None, 3])
def test_chunks_chosen_together_equal_chunks_chosen_alone(ratio, window):
    """The first three share their keys, later ones see equally many: one product for each of the two runs."""
    rows, columns, heads, d = 2, 3, 2, 8
    s, chunks = rows * columns, 7
    torch.manual_seed(5)
    q, k = (torch.randn(2, heads, s * chunks, d, dtype=torch.float64) for _ in range(2))
    local = None if window is None else local_window(rows, columns, window)
    visible = [row.nonzero().flatten().tolist() for row in causal_chunks(chunks, 4)]
    by_chunk = k.unflatten(2, (chunks, s))
    selection = select(
        q,
        lambda seen: by_chunk[:, :, list(seen)].flatten(2, 3),
        visible,
        [c * s for c in range(chunks)],
        key_blocks=chunks * s,
        per_chunk=s,
        block_tokens=4,
        ratio=ratio,
        local=local,
    )
    whole = selection.mask().unflatten(3, (chunks, s))
    for i, seen in enumerate(visible):
        mine = whole[:, :, i * s : (i + 1) * s]
        keys = by_chunk[:, :, seen].flatten(2, 3)
        alone = choose(q[:, :, i * s : (i + 1) * s], keys, per_chunk=s, ratio=ratio, local=local)
        assert torch.equal(mine[:, :, :, seen].flatten(3), alone)
        assert mine.sum() == alone.sum(), "nothing outside what it sees"
    assert selection.density <= selection.most
    if ratio is None:
        assert selection.density == selection.most


def test_a_selection_put_into_a_plan_is_used():
    """Both sparse plans read a layer's selection before they choose one."""
    block, rows, columns, heads, d = (2, 2, 2), 4, 4, 2, 12
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2 * rows * columns, heads, d) for _ in range(3))
    given = Selection.from_mask(torch.rand(1, heads, 4, 4) < 0.5, 8)
    clip = SparseCausal((2, rows, columns), block=block, head_dim=d, ratio=0.4)
    stream = CachedStreaming((2, rows, columns), 0, Ring(2, 1, 32, 4), block=block, head_dim=d, ratio=0.4)
    inside = torch.zeros(1, heads, 4, 12, dtype=torch.bool)  # the ring has room for three chunks
    inside[..., :4] = given.mask()
    clip.selections[0], stream.selections[0] = given, Selection.from_mask(inside, 8)
    args = [x.transpose(1, 2) for x in (q, k, v)]
    expected = sparse_attention(*args, given, backend="reference").transpose(1, 2)
    for plan in (clip, stream):
        assert (plan.attend(0, q, k, v) - expected).abs().max() < 1e-6
    assert torch.equal(stream.ring.keys[0][:, :, :32], args[1]), "keys are written all the same"
