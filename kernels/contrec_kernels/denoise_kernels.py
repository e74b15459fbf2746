"""A denoiser's evaluation and its gradients: products with what stands around them.

`row` counts the batch's rows. With guidance AdaLN heads have two branches (`program_id(1)`), the
conditional rows and those of the null condition. Tables (`time`, `null`) have one row for all,
`STRIDE` 0, or one per row. Every product adds along the inner dimension in one fixed order, and
nothing is added by several programs: the same bits at every call.
"""

import triton
import triton.language as tl

from contrec_kernels.sampling_steps import gelu, normal_tail, per_column, silu, tile


@triton.jit
def accumulate(
    total, a, weight, row, column, INNER: tl.constexpr, COLUMNS: tl.constexpr,
    ALONG: tl.constexpr, ACROSS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`total` plus a tile of `a [rows, INNER]` times a matrix [INNER, COLUMNS], whose entries are
    ALONG elements apart along INNER and ACROSS along the columns."""
    inner = tl.arange(0, BLOCK_K)
    a_tile = a + row.to(tl.int64)[:, None] * INNER + inner[None, :]
    w_tile = weight + tl.minimum(column, COLUMNS - 1)[None, :] * ACROSS + inner[:, None] * ALONG
    # As in `sampling_steps.product`, program_id(2) is 0 and keeps the loop a loop.
    for k in range(0, INNER + tl.program_id(2), BLOCK_K):
        if INNER % BLOCK_K == 0:
            left, right = tl.load(a_tile), tl.load(w_tile)
        else:
            inside = k + inner < INNER
            left = tl.load(a_tile, mask=inside[None, :], other=0)
            right = tl.load(w_tile, mask=inside[:, None], other=0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a_tile += BLOCK_K
        w_tile += BLOCK_K * ALONG
    return total


@triton.jit
def of_rows(table, row, column, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Entries of a table's rows as float32 [BLOCK_M, BLOCK_N], zero past its columns."""
    place = row.to(tl.int64)[:, None] * STRIDE + column[None, :]
    return tl.load(table + place, mask=(column < COLUMNS)[None, :], other=0).to(tl.float32)


@triton.jit
def row_guidance(guidance, drop, row, HAS_DROP: tl.constexpr):
    """w of the rows [BLOCK_M, 1]: 0 where they are dropped."""
    w = guidance + tl.zeros((row.shape[0], 1), dtype=tl.float32)
    if HAS_DROP:
        w = tl.where(tl.load(drop + row)[:, None] != 0, 0.0, w)
    return w


@triton.jit
def gelu_gradient(x):
    """Derivative of GELU, `Phi(x) + x phi(x)`."""
    tail = normal_tail(tl.abs(x))
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return tl.where(x < 0, tail, 1 - tail) + x * density


@triton.jit(do_not_specialize=["rows"])
def hidden(
    out, of_condition, of_shared, x, condition, weight, time, null, drop, grad, output, guidance,
    rows, DIM: tl.constexpr, HIDDEN: tl.constexpr, STRIDE: tl.constexpr, GUIDED: tl.constexpr,
    HAS_DROP: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Folded hidden layer of an MLP [rows, HIDDEN]; with GRADIENT also the gradients of its
    pre-activations: of the condition's share (GUIDED) and of what both branches have in common.

    x, condition, grad: [rows, DIM], grad that of the network's output. weight: [HIDDEN, 3 DIM].
    output: [DIM, HIDDEN], the output layer's. time: table of HIDDEN columns, null: [HIDDEN].
    """
    row, column, inside = tile(rows, HIDDEN, BLOCK_M, BLOCK_N, tl.program_id(0))
    place = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    zeros = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    shared = accumulate(zeros, x, weight, row, column, DIM, HIDDEN, 1, 3 * DIM, BLOCK_K, PRECISION)
    added = zeros if GUIDED else shared
    added = accumulate(
        added, condition, weight + DIM, row, column, DIM, HIDDEN, 1, 3 * DIM, BLOCK_K, PRECISION
    )
    terms = of_rows(time, row, column, STRIDE, HIDDEN)
    if GUIDED:
        added += shared
    added += terms
    folded = gelu(added)
    if GUIDED:
        without = shared + terms + per_column(null, column, HIDDEN)
        w = row_guidance(guidance, drop, row, HAS_DROP)
        folded = (1 + w) * folded - w * gelu(without)
    tl.store(out + place, folded.to(out.dtype.element_ty), mask=inside)
    if GRADIENT:
        slope = accumulate(
            zeros, grad, output, row, column, DIM, HIDDEN, HIDDEN, 1, BLOCK_K, PRECISION
        )
        if GUIDED:
            conditional = (1 + w) * slope * gelu_gradient(added)
            total = conditional - w * slope * gelu_gradient(without)
            tl.store(of_condition + place, conditional.to(out.dtype.element_ty), mask=inside)
        else:
            total = slope * gelu_gradient(added)
        tl.store(of_shared + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def modulation(
    users, time, null, part, branch, row, column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    TIME: tl.constexpr, NULL: tl.constexpr, SEPARABLE: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    """Part `part` of the modulation of some rows of a branch, float32 [BLOCK_M, BLOCK_N].

    users: [rows, COLUMNS]. time, null: tables with row strides TIME and NULL.
    """
    inside, offset = (column < WIDTH)[None, :], part * WIDTH + column[None, :]
    line = row.to(tl.int64)[:, None]
    # Masks and no branch, as in `sampling_adaln.modulation`.
    value = tl.load(users + line * COLUMNS + offset, mask=inside & (branch == 0), other=0)
    value = value.to(tl.float32)
    if GUIDED:
        other = tl.load(null + line * NULL + offset, mask=inside & (branch != 0), other=0)
        value += other.to(tl.float32)
    if SEPARABLE:
        value += tl.load(time + line * TIME + offset, mask=inside, other=0).to(tl.float32)
    return value


@triton.jit
def normalised(state, place, column, WIDTH: tl.constexpr):
    """Whole rows without mean and scale, and 1 / standard deviation [BLOCK_M, 1]."""
    inside = (column < WIDTH)[None, :]
    x = tl.load(state + place, mask=inside, other=0).to(tl.float32)
    x = tl.where(inside, x - tl.sum(x, axis=1)[:, None] * (1 / WIDTH), 0)
    scale = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] * (1 / WIDTH) + 1e-6)
    return x * scale, scale


@triton.jit(do_not_specialize=["rows"])
def modulate(
    out, state, weight, bias, users, time, null, drop, guidance, rows, stride,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TIME: tl.constexpr, NULL: tl.constexpr,
    SEPARABLE: tl.constexpr, GUIDED: tl.constexpr, FOLDED: tl.constexpr, HAS_DROP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Modulated layer norm of a branch or, with FOLDED, of all, folded and without weights.

    state: [branches, rows, WIDTH], `stride` elements between branches. out: the same, contiguous,
    or [rows, WIDTH].
    """
    branch = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_W)
    inside, row = (first < rows)[:, None] & (column < WIDTH)[None, :], tl.minimum(first, rows - 1)
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    x, _ = normalised(state + branch * stride, place, column, WIDTH)
    if not FOLDED:
        x = x * per_column(weight, column, WIDTH) + per_column(bias, column, WIDTH)
    shift = modulation(
        users, time, null, 0, branch, row, column, WIDTH, COLUMNS, TIME, NULL, SEPARABLE, GUIDED
    )
    scale = modulation(
        users, time, null, 1, branch, row, column, WIDTH, COLUMNS, TIME, NULL, SEPARABLE, GUIDED
    )
    value = x * (1 + scale) + shift
    if FOLDED and GUIDED:
        x, _ = normalised(state + stride, place, column, WIDTH)
        shift = modulation(
            users, time, null, 0, 1, row, column, WIDTH, COLUMNS, TIME, NULL, SEPARABLE, GUIDED
        )
        scale = modulation(
            users, time, null, 1, 1, row, column, WIDTH, COLUMNS, TIME, NULL, SEPARABLE, GUIDED
        )
        w = row_guidance(guidance, drop, row, HAS_DROP)
        value = (1 + w) * value - w * (x * (1 + scale) + shift)
    target = out + branch * rows.to(tl.int64) * WIDTH
    tl.store(target + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def modulate_gradient(
    out, of_state, of_modulation, of_norm, state, weight, bias, users, time, null, drop, grad,
    after, guidance, rows, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    TIME: tl.constexpr, NULL: tl.constexpr, SEPARABLE: tl.constexpr, GUIDED: tl.constexpr,
    FOLDED: tl.constexpr, HAS_DROP: tl.constexpr, LINES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """`modulate` of a branch again (not FOLDED), and gradients, BLOCK_M rows LINES times over.

    grad: of `modulate`, [branches, rows, WIDTH] or FOLDED [rows, WIDTH]. after: added to of_state.
    of_modulation: [branches, rows, COLUMNS], parts 0 and 1. of_norm: float32 [branches, programs,
    2, WIDTH], sums over a program's rows of the gradients of weight and bias.
    """
    branch, column = tl.program_id(1), tl.arange(0, BLOCK_W)
    offset = branch * rows.to(tl.int64)
    of_weight = tl.zeros((BLOCK_W,), dtype=tl.float32)
    of_bias = tl.zeros((BLOCK_W,), dtype=tl.float32)
    for line in range(0, LINES + tl.program_id(2)):
        first = (tl.program_id(0) * LINES + line) * BLOCK_M + tl.arange(0, BLOCK_M)
        row = tl.minimum(first, rows - 1)
        inside = (first < rows)[:, None] & (column < WIDTH)[None, :]
        place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        x, deviation = normalised(state + branch * stride, place, column, WIDTH)
        scale = 1 + modulation(
            users, time, null, 1, branch, row, column, WIDTH, COLUMNS, TIME, NULL, SEPARABLE,
            GUIDED,
        )  # fmt: skip
        slope = tl.load(grad + (0 if FOLDED else offset * WIDTH) + place, mask=inside, other=0).to(
            tl.float32
        )
        if FOLDED and GUIDED:
            w = row_guidance(guidance, drop, row, HAS_DROP)
            slope *= tl.where(branch == 0, 1 + w, -w)
        value = x
        if not FOLDED:
            value = x * per_column(weight, column, WIDTH) + per_column(bias, column, WIDTH)
            shift = modulation(
                users, time, null, 0, branch, row, column, WIDTH, COLUMNS, TIME, NULL, SEPARABLE,
                GUIDED,
            )  # fmt: skip
            inner = value * scale + shift
            tl.store(out + offset * WIDTH + place, inner.to(out.dtype.element_ty), mask=inside)
        parts = of_modulation + (offset + row)[:, None] * COLUMNS + column[None, :]
        tl.store(parts, slope.to(out.dtype.element_ty), mask=inside)
        tl.store(parts + WIDTH, (slope * value).to(out.dtype.element_ty), mask=inside)
        slope *= scale
        if not FOLDED:
            of_weight += tl.sum(slope * x, axis=0)
            of_bias += tl.sum(slope, axis=0)
            slope *= per_column(weight, column, WIDTH)
        level = tl.sum(slope, axis=1)[:, None] * (1 / WIDTH)
        along = tl.sum(slope * x, axis=1)[:, None] * (1 / WIDTH)
        slope = deviation * (slope - level - x * along)
        if not FOLDED:
            slope += tl.load(after + offset * WIDTH + place, mask=inside, other=0).to(tl.float32)
        tl.store(of_state + offset * WIDTH + place, slope.to(out.dtype.element_ty), mask=inside)
    if not FOLDED:
        sums = of_norm + (branch * tl.num_programs(0) + tl.program_id(0)) * 2 * WIDTH + column
        tl.store(sums, of_weight, mask=column < WIDTH)
        tl.store(sums + WIDTH, of_bias, mask=column < WIDTH)


@triton.jit(do_not_specialize=["rows"])
def expand(
    active, before, operand, weight, bias, rows, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`before = operand weight^T + bias` and `silu(before)` [rows, WIDTH]."""
    row, column, inside = tile(rows, WIDTH, BLOCK_M, BLOCK_N, tl.program_id(0))
    value = accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), operand, weight, row, column, WIDTH, WIDTH,
        1, WIDTH, BLOCK_K, PRECISION,
    ) + per_column(bias, column, WIDTH)  # fmt: skip
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(before + place, value.to(before.dtype.element_ty), mask=inside)
    tl.store(active + place, silu(value).to(active.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def expand_gradient(
    out, active, grad, weight, before, rows, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`(grad weight) silu'(before)` and `silu(before)` [rows, WIDTH]."""
    row, column, inside = tile(rows, WIDTH, BLOCK_M, BLOCK_N, tl.program_id(0))
    slope = accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), grad, weight, row, column, WIDTH, WIDTH,
        WIDTH, 1, BLOCK_K, PRECISION,
    )  # fmt: skip
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    x = tl.load(before + place, mask=inside, other=0).to(tl.float32)
    share = tl.sigmoid(x)
    slope *= share * (1 + x * (1 - share))
    tl.store(out + place, slope.to(out.dtype.element_ty), mask=inside)
    tl.store(active + place, (x * share).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def residual(
    out, value, state, operand, weight, bias, users, time, null, rows, stride,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TIME: tl.constexpr, NULL: tl.constexpr,
    SEPARABLE: tl.constexpr, GUIDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`value = operand weight^T + bias` and `state + gate * value` [branches, rows, WIDTH]."""
    branch = tl.program_id(1)
    row, column, inside = tile(rows, WIDTH, BLOCK_M, BLOCK_N, tl.program_id(0))
    offset = branch * rows.to(tl.int64) * WIDTH
    found = accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), operand + offset, weight, row, column,
        WIDTH, WIDTH, 1, WIDTH, BLOCK_K, PRECISION,
    ) + per_column(bias, column, WIDTH)  # fmt: skip
    gate = modulation(
        users, time, null, 2, branch, row, column, WIDTH, COLUMNS, TIME, NULL, SEPARABLE, GUIDED
    )
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    x = tl.load(state + branch * stride + place, mask=inside, other=0).to(tl.float32)
    tl.store(value + offset + place, found.to(value.dtype.element_ty), mask=inside)
    tl.store(out + offset + place, (x + gate * found).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def residual_gradient(
    out, of_modulation, grad, value, users, time, null, rows, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, TIME: tl.constexpr, NULL: tl.constexpr, SEPARABLE: tl.constexpr,
    GUIDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`grad * gate` and, as part 2 of the modulation's gradient, `grad * value`."""
    branch = tl.program_id(1)
    row, column, inside = tile(rows, WIDTH, BLOCK_M, BLOCK_N, tl.program_id(0))
    gate = modulation(
        users, time, null, 2, branch, row, column, WIDTH, COLUMNS, TIME, NULL, SEPARABLE, GUIDED
    )
    line = (branch * rows.to(tl.int64) + row)[:, None]
    place = line * WIDTH + column[None, :]
    slope = tl.load(grad + place, mask=inside, other=0).to(tl.float32)
    found = tl.load(value + place, mask=inside, other=0).to(tl.float32)
    tl.store(out + place, (slope * gate).to(out.dtype.element_ty), mask=inside)
    part = of_modulation + line * COLUMNS + 2 * WIDTH + column[None, :]
    tl.store(part, (slope * found).to(out.dtype.element_ty), mask=inside)
