"""Selections that catch a wrong attention backend, and the oracle: softmax over tokens in float64.

Any test may use them: `for case in CASES: check(attention, case, device)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashvsr.attention import Selection

Attention = Callable[[Tensor, Tensor, Tensor, Selection], Tensor]

# Largest error of outputs and gradients, relative to the largest expected value (at least 1). Half precision:
# a few roundings of inputs of the products, 2^-9 and 2^-12 each.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}


@dataclass(frozen=True)
class Case:
    """A kind of selection at a size. `strided`: inputs are transposed views, as the transformer gives them;
    `sharp`: queries are so many times longer, scores of a hundred must not overflow."""

    kind: str
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    block_tokens: int = 128
    batch: int = 1
    heads: int = 2
    queries: int = 5
    keys: int = 7
    strided: bool = False
    sharp: float = 1.0

    def __str__(self) -> str:
        name = f"{self.kind}-{str(self.dtype).removeprefix('torch.')}-d{self.head_dim}-n{self.block_tokens}"
        flags = {"b2": self.batch == 2, "strided": self.strided, "sharp": self.sharp != 1}
        return "-".join([name, *(flag for flag, on in flags.items() if on)])


def mask_of(case: Case) -> Tensor:
    """Boolean `B heads Q K`."""
    draw = torch.Generator().manual_seed(0)
    shape = (case.batch, case.heads, case.queries, case.keys)
    ragged = torch.rand(shape, generator=draw) < torch.rand(*shape[:3], 1, generator=draw)
    one = torch.zeros(shape, dtype=torch.bool)
    one.scatter_(3, torch.randint(case.keys, (*shape[:3], 1), generator=draw), True)
    if case.kind == "ragged":
        ragged[..., 0, :] = True
        return ragged
    if case.kind == "empty rows":
        ragged[:, :, 1::2] = False
        ragged[0, 0] = False
        return ragged
    if case.kind == "one key":
        return one
    if case.kind == "one key for all":  # a key block with every query, all others with none
        return torch.zeros(shape, dtype=torch.bool).index_fill(3, torch.tensor([case.keys - 1]), True)
    if case.kind == "one long row":
        return one.index_fill(2, torch.tensor([2]), True)
    if case.kind == "all":
        return torch.ones(shape, dtype=torch.bool)
    if case.kind == "none":
        return torch.zeros(shape, dtype=torch.bool)
    raise AssertionError(case.kind)


KINDS = ("ragged", "empty rows", "one key", "one key for all", "one long row", "all", "none")
HALF = (torch.bfloat16, torch.float16)
CASES = [
    *(Case(kind) for kind in KINDS),
    *(Case(kind, dtype, head_dim=128) for kind in ("ragged", "empty rows") for dtype in HALF),
    *(Case("ragged", head_dim=d, block_tokens=32, batch=2) for d in (32, 64, 96, 128)),
    *(Case("empty rows", dtype, head_dim=d, block_tokens=32) for d in (32, 96) for dtype in HALF),
    *(Case("ragged", dtype, strided=True, batch=2, block_tokens=32) for dtype in (torch.float32, *HALF)),
    Case("empty rows", head_dim=128, strided=True),
    Case("ragged", sharp=25.0),
    Case("ragged", heads=3, queries=1, keys=40, block_tokens=16, head_dim=32),
    Case("ragged", heads=3, queries=40, keys=2, block_tokens=16, head_dim=32),
]


@dataclass
class Data:
    """Inputs, the gradient that comes back, and what is to be chosen."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    mask: Tensor
    selection: Selection

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def make(case: Case, device: torch.device | str = "cpu", *, slack: int = 3) -> Data:
    """Random inputs. The selection has `slack` entries behind its rows that mean nothing."""
    draw = torch.Generator().manual_seed(1)
    n, mask = case.block_tokens, mask_of(case)

    def tensor(blocks: int) -> Tensor:
        shape = (case.batch, case.heads, blocks * n, case.head_dim)
        if case.strided:
            shape = (shape[0], shape[2], shape[1], shape[3])
        x = torch.randn(shape, generator=draw).to(device, case.dtype)
        return x.transpose(1, 2) if case.strided else x

    q, k, v, grad = (tensor(x) for x in (case.queries, case.keys, case.keys, case.queries))
    q = q * case.sharp
    exact = Selection.from_mask(mask.to(device), n)
    junk = torch.full((slack,), 2**15 - 1, dtype=exact.columns.dtype, device=device)
    selection = replace(exact, columns=torch.cat([exact.columns, junk]))
    return Data(q, k, v, grad, mask.to(device), selection)


def run(attention: Attention, data: Data) -> list[Tensor]:
    """Output, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in data.inputs]
    out = attention(*leaves, data.selection)
    if not out.requires_grad:  # nothing was selected anywhere
        return [out, *(torch.zeros_like(x) for x in leaves)]
    back = torch.autograd.grad(out, leaves, data.grad, allow_unused=True, materialize_grads=True)
    return [out.detach(), *back]


def expected(data: Data) -> list[Tensor]:
    """The same in float64 from the same (rounded) inputs: softmax over the chosen tokens, written out."""
    n = data.selection.block_tokens
    q, k, v, grad = (x.detach().double() for x in (*data.inputs, data.grad))
    mask = data.mask.repeat_interleave(n, 2).repeat_interleave(n, 3)
    scale = q.shape[-1] ** -0.5
    weight = torch.where(mask, (q @ k.transpose(2, 3) * scale).exp(), 0.0)
    total = weight.sum(-1, keepdim=True)
    p = torch.where(total > 0, weight / total.clamp_min(1e-300), 0.0)
    out = p @ v
    dp = grad @ v.transpose(2, 3)
    ds = p * (dp - (grad * out).sum(-1, keepdim=True)) * scale
    return [out, ds @ k, ds.transpose(2, 3) @ q, p.transpose(2, 3) @ grad]


def errors(attention: Attention, case: Case, device: torch.device | str = "cpu") -> list[float]:
    """Of output, dq, dk, dv: the largest error over the largest expected value (at least 1)."""
    data = make(case, device)
    ours, theirs = run(attention, data), expected(data)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == case.dtype and a.isfinite().all()
    empty = ~data.mask.any(-1).repeat_interleave(case.block_tokens, 2)
    assert (ours[0][empty] == 0).all() and (ours[1][empty] == 0).all(), "rows without keys are zero"
    unseen = ~data.mask.any(-2).repeat_interleave(case.block_tokens, 2)
    assert (ours[2][unseen] == 0).all() and (ours[3][unseen] == 0).all(), "keys nobody chose get no gradient"
    return [
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1)).item()
        for a, b in zip(ours, theirs, strict=True)
    ]


def check(attention: Attention, case: Case, device: torch.device | str = "cpu") -> None:
    """Output and gradients within `TOLERANCE` of the oracle."""
    found = errors(attention, case, device)
    assert max(found) <= TOLERANCE[case.dtype] * case.sharp, f"{case}: errors of out, dq, dk, dv: {found}"


def repeats(attention: Attention, case: Case, device: torch.device | str = "cpu") -> list[bool]:
    """Whether output, dq, dk, dv are the same bits when computed again."""
    data = make(case, device)
    return [torch.equal(a, b) for a, b in zip(run(attention, data), run(attention, data), strict=True)]
