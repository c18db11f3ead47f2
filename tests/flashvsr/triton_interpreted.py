"""Run by test_triton.py in a process with TRITON_INTERPRET=1: the kernels against float64, as JSON.

Prints {case: {what: largest error, as a part of the largest value expected}}; "repeats" is whether a second
run gave the same bits, "zeros" whether rows without keys, and their gradients, are exactly zero.
"""

from __future__ import annotations

import json

import torch
from triton.runtime import interpreter

from flashvsr.attention import Selection
from flashvsr.attention.backends import reference, triton

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def multiply_bfloat16() -> None:
    """Teaches the interpreter, which multiplies bfloat16 by its bit patterns."""
    import triton.language as tl

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (
                interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)
                for x in (a, b)
            )
        return plain(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def ragged(batch: int, heads: int, queries: int, keys: int) -> torch.Tensor:
    mask = torch.rand(batch, heads, queries, keys) < torch.rand(batch, heads, queries, 1)
    mask[0, 0, 1], mask[-1, -1, 0] = False, True
    mask[:, 0, :, 2] = False  # keys that nobody chose
    return mask


def single(batch: int, heads: int, queries: int, keys: int) -> torch.Tensor:
    mask = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    return mask.scatter_(3, torch.randint(keys, (batch, heads, queries, 1)), True)


def slack(selection: Selection) -> Selection:
    """int32 columns, falling within a row, entries behind the last that mean nothing."""
    rows = selection.columns.split(selection.counts.flatten().tolist())
    columns = torch.cat([*(row.flip(0) for row in rows), torch.tensor([30000, -1])]).int()
    return Selection(selection.counts, columns, selection.key_blocks, selection.block_tokens)


# block tokens, head dimension, dtype, mask `B heads Q K`, what is done to selection, inputs
CASES = {
    "ragged": (32, 64, F32, (ragged, 2, 2, 3, 4), None, "heads last"),
    "several tiles to a block": (64, 32, F32, (ragged, 1, 2, 2, 3), None, "plain"),
    "padded head": (32, 96, F32, (ragged, 1, 2, 3, 4), None, "heads last"),
    "odd head": (16, 12, F32, (ragged, 1, 2, 2, 3), None, "plain"),
    "single": (32, 32, F32, (single, 1, 2, 3, 4), None, "plain"),
    "all": (32, 32, F32, (lambda *n: torch.ones(n, dtype=torch.bool), 1, 1, 2, 3), None, "plain"),
    "none": (32, 32, F32, (lambda *n: torch.zeros(n, dtype=torch.bool), 1, 1, 2, 3), None, "plain"),
    "slack": (32, 32, F32, (ragged, 1, 2, 3, 4), slack, "plain"),
    "strided": (32, 32, F32, (ragged, 2, 2, 2, 3), None, "every second"),
    "expanded": (32, 32, F32, (ragged, 1, 2, 2, 3), None, "expanded gradient"),
    "large scores": (32, 32, F32, (ragged, 1, 2, 2, 3), None, "large"),
    "wide block, float16": (128, 128, F16, (ragged, 1, 2, 2, 3), None, "heads last"),
    "wide block, bfloat16": (128, 128, BF16, (ragged, 1, 2, 2, 3), None, "heads last"),
    "small block, bfloat16": (32, 64, BF16, (ragged, 1, 2, 2, 3), None, "plain"),
}


def inputs(how: str, sizes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, each `B heads T d`."""
    made = []
    for b, h, t, d in sizes:
        x = torch.randn(b, h, t, d)
        if how == "heads last":
            x = torch.randn(b, t, h, d).transpose(1, 2)
        elif how == "every second":
            x = torch.randn(b, h, t, 2 * d)[..., ::2]
        elif how == "large" and len(made) < 2:
            x = 12 * x
        made.append(x.to(dtype))
    if how == "expanded gradient":
        made[-1] = torch.ones(1, dtype=dtype).expand(sizes[-1])
    return [x.detach().requires_grad_() for x in made[:3]] + made[3:]


def run(n, d, dtype, mask, change, how) -> dict[str, float | bool]:
    torch.manual_seed(0)
    make, *shape = mask
    mask = make(*shape)
    selection = Selection.from_mask(mask, n)
    selection = change(selection) if change else selection
    b, heads, queries, keys = shape
    sizes = [(b, heads, blocks * n, d) for blocks in (queries, keys, keys, queries)]
    *leaves, gradient = inputs(how, sizes, dtype)

    def both(module, leaves, gradient):
        out = module.attention(*leaves, selection)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    ours, again = (both(triton, leaves, gradient) for _ in range(2))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = both(reference, exact, gradient.double())
    result = {
        what: float((a.double() - e).abs().max() / e.abs().max().clamp_min(1))
        for what, a, e in zip(("out", "dq", "dk", "dv"), ours, expected, strict=True)
    }
    result["repeats"] = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    result["zeros"] = all(
        not x[~chosen.repeat_interleave(n, 2)].any()
        for x, chosen in zip(ours, [mask.any(3), mask.any(3), mask.any(2), mask.any(2)], strict=True)
    )
    result["layout"] = ours[0].stride() == leaves[0].stride() or how == "every second"
    return result


if __name__ == "__main__":
    assert triton.interpreted()
    multiply_bfloat16()
    print(json.dumps({name: run(*case) for name, case in CASES.items()}))
