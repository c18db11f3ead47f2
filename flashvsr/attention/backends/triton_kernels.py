"""The Triton kernels of block-sparse attention: forward, and a backward without atomics.

A *row* is one batch entry, head and block, in that order; its list (`offsets`, `columns`) names the blocks
it meets: key blocks of a query block (`forward`, `query_gradient`), query blocks of a key block
(`key_gradient`, on the transposed selection). One program owns one tile of one row's block and walks its
list, so every sum has one owner and one order: results repeat bit for bit.

With s = q.k / sqrt(d), p = exp(s - lse), o = p v, delta = rowsum(do * o):
dv = p^T do, ds = p * (do v^T - delta), dq = ds k / sqrt(d), dk = ds^T q / sqrt(d). Source: FlashAttention-2
(Dao 2023), sections 3.1 and 3.2. Exponentials are base 2: `scale` is log2(e) / sqrt(d), `lse` is in bits.

All tensors are `B heads T d` with d contiguous and strides `_b`, `_h`, `_t` in elements. Tokens always fill
whole blocks, so no tile is ragged; only d is padded to `WIDTH`, a power of two. Products inside a tile are
32-bit; what depends on a list entry is one 64-bit multiplication per step. `columns` is read one step ahead,
so that its latency hides behind the products.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("heads", "rows", "queries", "tokens")  # another value is no reason to compile again


@triton.jit
def _row(order, TILES: tl.constexpr):
    """Which row, and which tile of its block, this program owns: the tiles of a row run side by side."""
    return tl.load(order + tl.program_id(0) // TILES), tl.program_id(0) % TILES


@triton.jit
def _tile(SIZE: tl.constexpr, WIDTH: tl.constexpr, stride):
    """Offsets of a tile of SIZE tokens."""
    return tl.arange(0, SIZE)[:, None] * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _read(pointers, d, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A tile, zeros beyond d."""
    if PADDED:
        return tl.load(pointers, mask=tl.arange(0, WIDTH)[None, :] < d, other=0.0)
    return tl.load(pointers)


@triton.jit
def _write(pointers, values, d, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    values = values.to(pointers.dtype.element_ty)
    if PADDED:
        tl.store(pointers, values, mask=tl.arange(0, WIDTH)[None, :] < d)
    else:
        tl.store(pointers, values)


@triton.jit(do_not_specialize=SIZES)
def forward(
    q, k, v, out, lse, order, offsets, columns, scale, d, heads, rows,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out` and `lse` (float32 `B heads T`, contiguous) of M queries; `rows`: query blocks per head."""
    row, tile = _row(order, BLOCK // M)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    head = row // rows
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    first = (row % rows).to(tl.int64) * BLOCK + tile * M

    queries = _read(q + b * q_b + h * q_h + first * q_t + _tile(M, WIDTH, q_t), d, WIDTH, PADDED)
    keys = k + b * k_b + h * k_h
    values = v + b * v_b + h * v_h
    key_tile, value_tile = _tile(N, WIDTH, k_t), _tile(N, WIDTH, v_t)

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, WIDTH], tl.float32)
    PARTS: tl.constexpr = BLOCK // N
    column = tl.load(columns + begin, mask=begin < end, other=0)
    for i in tl.range(begin * PARTS, end * PARTS, num_stages=STAGES):
        token = column.to(tl.int64) * BLOCK + i % PARTS * N
        column = tl.load(columns + (i + 1) // PARTS, mask=i + 1 < end * PARTS, other=0)
        kt = _read(keys + token * k_t + key_tile, d, WIDTH, PADDED)
        s = tl.dot(queries, tl.trans(kt), input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        vt = _read(values + token * v_t + value_tile, d, WIDTH, PADDED)
        sums = tl.dot(p.to(vt.dtype), vt, sums * shrink[:, None], input_precision=PRECISION)
        top = new_top

    # nothing selected: zeros, and 0 bits, which nobody reads
    some = total > 0
    total = tl.where(some, total, 1.0)
    sums = sums / total[:, None]
    _write(out + b * out_b + h * out_h + first * out_t + _tile(M, WIDTH, out_t), sums, d, WIDTH, PADDED)
    bits = tl.where(some, top + tl.log2(total), 0.0)
    tl.store(lse + head.to(tl.int64) * rows * BLOCK + first + tl.arange(0, M), bits)


@triton.jit(do_not_specialize=SIZES)
def row_products(
    out, do, delta, d, heads, tokens, out_b, out_h, out_t, do_b, do_h, do_t,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """`delta` = rowsum(do * out), float32 `B heads T`, M tokens of one head."""
    tiles = tokens // M
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * M
    b, h = head // heads, head % heads
    x = _read(out + b * out_b + h * out_h + first * out_t + _tile(M, WIDTH, out_t), d, WIDTH, PADDED)
    y = _read(do + b * do_b + h * do_h + first * do_t + _tile(M, WIDTH, do_t), d, WIDTH, PADDED)
    products = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta + head * tokens + first + tl.arange(0, M), products)


@triton.jit(do_not_specialize=SIZES)
def query_gradient(
    q, k, v, do, dq, lse, delta, order, offsets, columns, scale, d, heads, rows,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dq_b, dq_h, dq_t,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq` of M queries; arguments as in `forward`."""
    row, tile = _row(order, BLOCK // M)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    head = row // rows
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    first = (row % rows).to(tl.int64) * BLOCK + tile * M

    queries = _read(q + b * q_b + h * q_h + first * q_t + _tile(M, WIDTH, q_t), d, WIDTH, PADDED)
    grads = _read(do + b * do_b + h * do_h + first * do_t + _tile(M, WIDTH, do_t), d, WIDTH, PADDED)
    each = head.to(tl.int64) * rows * BLOCK + first + tl.arange(0, M)
    bits = tl.load(lse + each)
    deltas = tl.load(delta + each)
    keys = k + b * k_b + h * k_h
    values = v + b * v_b + h * v_h
    key_tile, value_tile = _tile(N, WIDTH, k_t), _tile(N, WIDTH, v_t)

    sums = tl.zeros([M, WIDTH], tl.float32)
    PARTS: tl.constexpr = BLOCK // N
    column = tl.load(columns + begin, mask=begin < end, other=0)
    for i in tl.range(begin * PARTS, end * PARTS, num_stages=STAGES):
        token = column.to(tl.int64) * BLOCK + i % PARTS * N
        column = tl.load(columns + (i + 1) // PARTS, mask=i + 1 < end * PARTS, other=0)
        kt = _read(keys + token * k_t + key_tile, d, WIDTH, PADDED)
        vt = _read(values + token * v_t + value_tile, d, WIDTH, PADDED)
        s = tl.dot(queries, tl.trans(kt), input_precision=PRECISION)
        dp = tl.dot(grads, tl.trans(vt), input_precision=PRECISION)
        p = tl.exp2(s * scale - bits[:, None])
        ds = p * (dp - deltas[:, None])
        sums = tl.dot(ds.to(kt.dtype), kt, sums, input_precision=PRECISION)

    sums *= scale * 0.6931471805599453  # ln 2: back to 1 / sqrt(d)
    _write(dq + b * dq_b + h * dq_h + first * dq_t + _tile(M, WIDTH, dq_t), sums, d, WIDTH, PADDED)


@triton.jit(do_not_specialize=SIZES)
def key_gradient(
    q, k, v, do, dk, dv, lse, delta, order, offsets, columns, scale, d, heads, rows, queries,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv` of N keys; the lists are the transposed selection's, `rows`: key blocks, `queries`: query
    blocks per head. Everything is held transposed, keys x queries, so that no product needs p^T."""
    row, tile = _row(order, BLOCK // N)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    head = row // rows
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    first = (row % rows).to(tl.int64) * BLOCK + tile * N

    kt = _read(k + b * k_b + h * k_h + first * k_t + _tile(N, WIDTH, k_t), d, WIDTH, PADDED)
    vt = _read(v + b * v_b + h * v_h + first * v_t + _tile(N, WIDTH, v_t), d, WIDTH, PADDED)
    q_head = q + b * q_b + h * q_h
    do_head = do + b * do_b + h * do_h
    query_tile, grad_tile = _tile(M, WIDTH, q_t), _tile(M, WIDTH, do_t)
    bits_head = lse + head.to(tl.int64) * queries * BLOCK + tl.arange(0, M)
    delta_head = delta + head.to(tl.int64) * queries * BLOCK + tl.arange(0, M)

    sums_k = tl.zeros([N, WIDTH], tl.float32)
    sums_v = tl.zeros([N, WIDTH], tl.float32)
    PARTS: tl.constexpr = BLOCK // M
    column = tl.load(columns + begin, mask=begin < end, other=0)
    for i in tl.range(begin * PARTS, end * PARTS, num_stages=STAGES):
        token = column.to(tl.int64) * BLOCK + i % PARTS * M
        column = tl.load(columns + (i + 1) // PARTS, mask=i + 1 < end * PARTS, other=0)
        qt = _read(q_head + token * q_t + query_tile, d, WIDTH, PADDED)
        gt = _read(do_head + token * do_t + grad_tile, d, WIDTH, PADDED)
        bits = tl.load(bits_head + token)
        deltas = tl.load(delta_head + token)
        s = tl.dot(kt, tl.trans(qt), input_precision=PRECISION)
        p = tl.exp2(s * scale - bits[None, :])
        sums_v = tl.dot(p.to(gt.dtype), gt, sums_v, input_precision=PRECISION)
        dp = tl.dot(vt, tl.trans(gt), input_precision=PRECISION)
        ds = p * (dp - deltas[None, :])
        sums_k = tl.dot(ds.to(qt.dtype), qt, sums_k, input_precision=PRECISION)

    sums_k *= scale * 0.6931471805599453
    _write(dk + b * dk_b + h * dk_h + first * dk_t + _tile(N, WIDTH, dk_t), sums_k, d, WIDTH, PADDED)
    _write(dv + b * dv_b + h * dv_h + first * dv_t + _tile(N, WIDTH, dv_t), sums_v, d, WIDTH, PADDED)
