"""Run by test_triton.py in a process with TRITON_INTERPRET=1: the kernels against float64, as JSON.

Prints {case: {"errors": of out, dq, dk, dv, as parts of the largest value; "repeats": whether the same bits
came again}}. A case that breaks another rule of `attention_cases.errors` ends the process.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from triton.runtime import interpreter

from flashvsr.attention import Selection
from flashvsr.attention.backends import triton
from tests.flashvsr.attention_cases import CASES, Case, errors, expected, make, repeats, run


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


def shrunk(case: Case) -> Case:
    """As many tokens as an interpreter bears: of float32 up to two tiles to a block; whole wide blocks of
    half precision."""
    most = 8 if 40 in (case.queries, case.keys) else 3
    case = replace(case, queries=min(case.queries, most), keys=min(case.keys, most))
    if case.batch * case.heads > 2 and not case.strided:
        case = replace(case, heads=1)
    if case.dtype == torch.float32:
        return replace(case, block_tokens=min(case.block_tokens, 64 if case.kind == "ragged" else 32))
    return case


def falling_int32(selection: Selection) -> Selection:
    rows = selection.columns.split([*selection.counts.flatten().tolist(), 3])
    return replace(selection, columns=torch.cat([row.flip(0) for row in rows]).int())


def unusual() -> dict[str, list[float]]:
    """What a caller may also hand over."""
    case = Case("empty rows", head_dim=12, block_tokens=16, queries=4, keys=3)
    data = make(case)
    spread = torch.randn(1, 2, 3 * 16, 24)[..., ::2]  # head dimension not contiguous
    variants = {
        "columns int32, falling": replace(data, selection=falling_int32(data.selection)),
        "every second element": replace(data, k=spread, v=-spread),
        "one gradient for all": replace(data, grad=torch.ones(1).expand(data.q.shape)),
    }
    return {
        name: [
            ((a - b).abs().max() / b.abs().max().clamp_min(1)).item()
            for a, b in zip(run(triton.attention, variant), expected(variant), strict=True)
        ]
        for name, variant in variants.items()
    }


def strides() -> bool:
    """Whether the output is laid out as q, so that joining the heads copies nothing."""
    data = make(Case("one key", head_dim=32, block_tokens=16, strided=True))
    return triton.attention(*data.inputs, data.selection).stride() == data.q.stride()


if __name__ == "__main__":
    assert triton.interpreted()
    triton.FEW_ROWS = 9  # both orders occur
    multiply_bfloat16()
    cases = [shrunk(case) for case in CASES]
    found = {
        "errors": {f"{case}-{i}": errors(triton.attention, case) for i, case in enumerate(cases)} | unusual(),
        "repeats": {str(case): repeats(triton.attention, case) for case in (cases[1], cases[15])},
        "as q": strides(),
    }
    print(json.dumps(found))
