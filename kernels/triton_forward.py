"""Triton kernels of the forward pass: down-projection, Sigma mixing, up-projection.

Names, shapes and formulas are those of `reference.py`; upper-case arguments are compile-time numbers. `RP` is the rank
padded to a power of two that `tl.dot` takes, and stands in the N position of the dots of the long products, where
the hardware's matrix instructions accept as few as 16. Addresses are 64-bit: a token times a row can pass 2³¹.

`UPCAST` is for Triton's interpreter, whose bfloat16 arithmetic is wrong: operands are then widened before they meet.
"""

# mypy: ignore-errors
# (Triton's language is typed by its compiler.)

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Return `acc + a b`, accumulated in float32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def keep_mask(
    seed, token, column_start, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PHILOX_ROUNDS: tl.constexpr
):
    """Return the dropout mask `[ROWS, COLUMNS]` of `dropout.py`; `column_start` is a multiple of 8, token `[ROWS]`."""
    group = (column_start // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
    zero = tl.zeros([ROWS, COLUMNS // 8], tl.uint32)
    c0 = zero + group[None, :]
    c1 = zero + token.to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero, PHILOX_ROUNDS)
    # Bits of an element's place in its group of eight: half, then the high and the low bit of the word.
    even = tl.join(tl.join(w0 & 0xFFFF, w0 >> 16), tl.join(w2 & 0xFFFF, w2 >> 16))
    odd = tl.join(tl.join(w1 & 0xFFFF, w1 >> 16), tl.join(w3 & 0xFFFF, w3 >> 16))
    bits = tl.reshape(tl.join(even, odd), [ROWS, COLUMNS])
    return bits >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["T", "threshold"])
def down_kernel(
    x,  # [T, n], rows STRIDE_X apart
    A,  # [r, n]
    u,  # [T, b, r], written
    seed,  # [], int64; read with DROPOUT
    T,
    threshold,
    keep_scale,
    N: tl.constexpr,
    NB: tl.constexpr,
    R: tl.constexpr,
    STRIDE_X: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    RP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PHILOX_ROUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """u_j = x̂_j A_jᵀ; one program takes BT tokens of one column block."""
    P: tl.constexpr = N // NB
    # A dropout counter covers eight aligned columns: where blocks are not aligned, tiles start a little before them.
    SHIFT: tl.constexpr = DROPOUT and P % 8 != 0
    j = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, RP)
    row = t.to(tl.int64)[:, None]
    first = j * P
    start = first
    if SHIFT:
        start = first // 8 * 8
    acc = tl.zeros([BT, RP], tl.float32)
    for offset in tl.range(0, P + 7 if SHIFT else P, BC):
        c = start + offset + tl.arange(0, BC)
        inside = c < first + P
        if SHIFT:
            inside = inside & (c >= first)
        tile = tl.load(x + row * STRIDE_X + c[None, :], mask=(t < T)[:, None] & inside[None, :], other=0.0)
        if DROPOUT:
            keep = keep_mask(tl.load(seed), t, start + offset, threshold, BT, BC, PHILOX_ROUNDS)
            tile = tl.where(keep, tile.to(tl.float32) * keep_scale, 0.0)
        A_t = tl.load(A + k[None, :] * N + c[:, None], mask=(k < R)[None, :] & inside[:, None], other=0.0)
        acc = dot(tile.to(A_t.dtype), A_t, acc, PRECISION, UPCAST)
    tl.store(u + (row * NB + j) * R + k[None, :], acc.to(u.dtype.element_ty), mask=(t < T)[:, None] & (k < R)[None, :])


@triton.jit(do_not_specialize=["T"])
def mix_kernel(
    u,  # [T, b, r]
    Sigma,  # [b, b, r]
    z,  # [T, b, r], written
    T,
    scaling,
    NB: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    RP: tl.constexpr,
):
    """z_i = scaling · Σ_j Sigma[i,j] ∘ u_j; one program takes BT tokens of one row block."""
    i = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, RP)
    row = t.to(tl.int64)[:, None] * NB
    mask = (t < T)[:, None] & (k < R)[None, :]
    acc = tl.zeros([BT, RP], tl.float32)
    for j in tl.range(0, NB):
        weight = tl.load(Sigma + (i * NB + j) * R + k, mask=k < R, other=0.0).to(tl.float32)
        acc += weight[None, :] * tl.load(u + (row + j) * R + k[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(z + (row + i) * R + k[None, :], (acc * scaling).to(z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def up_kernel(
    z,  # [T, b, r]
    B,  # [m, r]
    bias,  # [m]; read with BIAS
    y,  # [T, m], written
    T,
    M: tl.constexpr,
    NB: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    RP: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y_i = z_i B_iᵀ (+ bias_i); one program takes BT tokens of BC columns of one row block."""
    Q: tl.constexpr = M // NB
    i = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, RP)
    place = tl.program_id(2) * BC + tl.arange(0, BC)
    c = i * Q + place
    row = t.to(tl.int64)[:, None]
    z_i = tl.load(z + (row * NB + i) * R + k[None, :], mask=(t < T)[:, None] & (k < R)[None, :], other=0.0)
    B_t = tl.load(B + c[None, :] * R + k[:, None], mask=(place < Q)[None, :] & (k < R)[:, None], other=0.0)
    out = dot(z_i, B_t, tl.zeros([BT, BC], tl.float32), PRECISION, UPCAST)
    if BIAS:
        out += tl.load(bias + c, mask=place < Q, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row * M + c[None, :], out.to(y.dtype.element_ty), mask=(t < T)[:, None] & (place < Q)[None, :])
