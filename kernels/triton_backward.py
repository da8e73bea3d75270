"""Triton kernels of the backward pass: one over dY, the mixing, one over x, one that adds up partial sums.

Sums over tokens are split in a fixed way: a program owns a range of tokens of one block and adds its tiles, in order,
to its own slice of a float32 buffer; `reduce_kernel` adds the slices in order. No atomics, so repeat runs are bitwise
equal. A slice is read back by the program that wrote it, one tile of tokens later, after a barrier.
"""

# mypy: ignore-errors
# (Triton's language is typed by its compiler.)

import triton
import triton.language as tl

from bora_fl.kernels.triton_forward import dot, keep_mask


@triton.jit(do_not_specialize=["T", "tiles"])
def dy_kernel(
    dy,  # [T, m]
    z,  # [T, b, r]; read with NEED_B
    B,  # [m, r]; read with NEED_Z
    dz,  # [T, b, r], written with NEED_Z; unscaled
    dB,  # [S, m, r] float32, written with NEED_B
    T,
    tiles,
    M: tl.constexpr,
    NB: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    RP: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_B: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dz_i = dY_i B_i and dB_i += dY_iᵀ z_i; one program takes `tiles` tiles of tokens of one row block."""
    Q: tl.constexpr = M // NB
    split = tl.program_id(0)
    i = tl.program_id(1)
    k = tl.arange(0, RP)
    slice_of_dB = dB + split.to(tl.int64) * M * R
    for tile in tl.range(0, tiles):
        t = (split * tiles + tile) * BT + tl.arange(0, BT)
        row = t.to(tl.int64)[:, None]
        of_rank = (row * NB + i) * R + k[None, :]
        rank_mask = (t < T)[:, None] & (k < R)[None, :]
        if NEED_B:
            z_i = tl.load(z + of_rank, mask=rank_mask, other=0.0)
        acc = tl.zeros([BT, RP], tl.float32)
        for offset in tl.range(0, Q, BC):
            place = offset + tl.arange(0, BC)
            c = i * Q + place
            grad = tl.load(dy + row * M + c[None, :], mask=(t < T)[:, None] & (place < Q)[None, :], other=0.0)
            factor_mask = (place < Q)[:, None] & (k < R)[None, :]
            factor = c[:, None] * R + k[None, :]
            if NEED_Z:
                B_i = tl.load(B + factor, mask=factor_mask, other=0.0)
                acc = dot(grad.to(B_i.dtype), B_i, acc, PRECISION, UPCAST)
            if NEED_B:
                so_far = tl.load(slice_of_dB + factor, mask=factor_mask & (tile > 0), other=0.0)
                part = dot(tl.trans(grad.to(z_i.dtype)), z_i, so_far, PRECISION, UPCAST)
                tl.store(slice_of_dB + factor, part, mask=factor_mask)
        if NEED_Z:
            tl.store(dz + of_rank, acc.to(dz.dtype.element_ty), mask=rank_mask)
        if NEED_B:
            tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "tiles"])
def mix_back_kernel(
    dz,  # [T, b, r], unscaled
    u,  # [T, b, r]; read with NEED_SIGMA
    Sigma,  # [b, b, r]; read with NEED_U
    du,  # [T, b, r], written with NEED_U
    dSigma,  # [S, b, b, r] float32, written with NEED_SIGMA
    T,
    tiles,
    scaling,
    NB: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    RP: tl.constexpr,
    NEED_U: tl.constexpr,
    NEED_SIGMA: tl.constexpr,
):
    """du_j = scaling · Σ_i Sigma[i,j] ∘ dz_i and dSigma[i,j] = scaling · Σ_t dz_i ∘ u_j, for one column block."""
    split = tl.program_id(0)
    j = tl.program_id(1)
    k = tl.arange(0, RP)
    slice_of_dSigma = dSigma + split.to(tl.int64) * NB * NB * R
    for tile in tl.range(0, tiles, num_stages=1, loop_unroll_factor=1):
        t = (split * tiles + tile) * BT + tl.arange(0, BT)
        row = t.to(tl.int64)[:, None] * NB
        mask = (t < T)[:, None] & (k < R)[None, :]
        if NEED_SIGMA:
            u_j = tl.load(u + (row + j) * R + k[None, :], mask=mask, other=0.0).to(tl.float32)
        acc = tl.zeros([BT, RP], tl.float32)
        for i in tl.range(0, NB, num_stages=1, loop_unroll_factor=1):
            dz_i = tl.load(dz + (row + i) * R + k[None, :], mask=mask, other=0.0).to(tl.float32)
            place = (i * NB + j) * R + k
            if NEED_U:
                acc += dz_i * tl.load(Sigma + place, mask=k < R, other=0.0).to(tl.float32)[None, :]
            if NEED_SIGMA:
                so_far = tl.load(slice_of_dSigma + place, mask=(k < R) & (tile > 0), other=0.0)
                tl.store(slice_of_dSigma + place, so_far + tl.sum(dz_i * u_j, axis=0) * scaling, mask=k < R)
        if NEED_U:
            tl.store(du + (row + j) * R + k[None, :], (acc * scaling).to(du.dtype.element_ty), mask=mask)
        if NEED_SIGMA:
            tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "tiles", "threshold"])
def x_kernel(
    x,  # [T, n], rows STRIDE_X apart; read with NEED_A
    du,  # [T, b, r]
    A,  # [r, n]; read with NEED_X
    dx,  # [T, n], written with NEED_X
    dA,  # [S, r, n] float32, written with NEED_A
    seed,  # [], int64; read with DROPOUT
    T,
    tiles,
    threshold,
    keep_scale,
    N: tl.constexpr,
    NB: tl.constexpr,
    R: tl.constexpr,
    STRIDE_X: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    RP: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_A: tl.constexpr,
    DROPOUT: tl.constexpr,
    PHILOX_ROUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dA_j += du_jᵀ x̂_j and dx_j = du_j A_j through the mask; one program takes `tiles` tiles of one column block."""
    P: tl.constexpr = N // NB
    SHIFT: tl.constexpr = DROPOUT and P % 8 != 0
    split = tl.program_id(0)
    j = tl.program_id(1)
    k = tl.arange(0, RP)
    slice_of_dA = dA + split.to(tl.int64) * R * N
    first = j * P
    start = first
    if SHIFT:
        start = first // 8 * 8
    for tile in tl.range(0, tiles):
        t = (split * tiles + tile) * BT + tl.arange(0, BT)
        row = t.to(tl.int64)[:, None]
        du_j = tl.load(du + (row * NB + j) * R + k[None, :], mask=(t < T)[:, None] & (k < R)[None, :], other=0.0)
        for offset in tl.range(0, P + 7 if SHIFT else P, BC):
            c = start + offset + tl.arange(0, BC)
            inside = c < first + P
            if SHIFT:
                inside = inside & (c >= first)
            mask = (t < T)[:, None] & inside[None, :]
            if DROPOUT:
                keep = keep_mask(tl.load(seed), t, start + offset, threshold, BT, BC, PHILOX_ROUNDS)
            if NEED_A:
                values = tl.load(x + row * STRIDE_X + c[None, :], mask=mask, other=0.0)
                if DROPOUT:
                    values = tl.where(keep, values.to(tl.float32) * keep_scale, 0.0)
                place = k[None, :] * N + c[:, None]
                factor_mask = (k < R)[None, :] & inside[:, None]
                so_far = tl.load(slice_of_dA + place, mask=factor_mask & (tile > 0), other=0.0)
                part = dot(tl.trans(values.to(du_j.dtype)), du_j, so_far, PRECISION, UPCAST)
                tl.store(slice_of_dA + place, part, mask=factor_mask)
            if NEED_X:
                A_j = tl.load(A + k[:, None] * N + c[None, :], mask=(k < R)[:, None] & inside[None, :], other=0.0)
                grad = dot(du_j, A_j, tl.zeros([BT, BC], tl.float32), PRECISION, UPCAST)
                if DROPOUT:
                    grad = tl.where(keep, grad * keep_scale, 0.0)
                tl.store(dx + row * N + c[None, :], grad.to(dx.dtype.element_ty), mask=mask)
        if NEED_A:
            tl.debug_barrier()


@triton.jit
def _add_slices(slices, out, place, count, SIZE: tl.constexpr, BC: tl.constexpr):
    total = tl.zeros([BC], tl.float32)
    for index in tl.range(0, count):
        total += tl.load(slices + index * SIZE + place, mask=place < SIZE, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < SIZE)


@triton.jit(do_not_specialize=["slices_A", "slices_Sigma", "slices_B"])
def reduce_kernel(
    dA_slices,  # [slices_A, r·n] float32
    dSigma_slices,  # [slices_Sigma, b·b·r] float32
    dB_slices,  # [slices_B, m·r] float32
    dA,  # [r, n], written
    dSigma,  # [b, b, r], written
    dB,  # [m, r], written
    slices_A,  # these follow the number of tokens, which differs from batch to batch: run-time numbers
    slices_Sigma,
    slices_B,
    SIZE_A: tl.constexpr,
    SIZE_SIGMA: tl.constexpr,
    SIZE_B: tl.constexpr,
    BC: tl.constexpr,
):
    """Add the slices of the three gradients in order; a size of 0 stands for one that is not wanted."""
    A_PROGRAMS: tl.constexpr = (SIZE_A + BC - 1) // BC
    SIGMA_PROGRAMS: tl.constexpr = (SIZE_SIGMA + BC - 1) // BC
    program = tl.program_id(0)
    lane = tl.arange(0, BC)
    if program < A_PROGRAMS:
        _add_slices(dA_slices, dA, program.to(tl.int64) * BC + lane, slices_A, SIZE_A, BC)
    elif program < A_PROGRAMS + SIGMA_PROGRAMS:
        place = (program - A_PROGRAMS).to(tl.int64) * BC + lane
        _add_slices(dSigma_slices, dSigma, place, slices_Sigma, SIZE_SIGMA, BC)
    else:
        place = (program - A_PROGRAMS - SIGMA_PROGRAMS).to(tl.int64) * BC + lane
        _add_slices(dB_slices, dB, place, slices_B, SIZE_B, BC)
