"""Steps of an AdaLN head: modulated layer norms, and products with what follows them.

Rows are those of `sampling_steps`; with guidance the null branch has `rows` rows of its own behind
the conditional ones (`program_id(1)`, the branch, is 1 there).
"""

import triton
import triton.language as tl

from contrec_kernels.sampling_steps import at, per_column, product, silu, tile


@triton.jit
def modulation(
    conditional, time, null, part, branch, user, column, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, SEPARABLE: tl.constexpr,
):  # fmt: skip
    """Part `part` of the modulation of some users or, in branch 1, of the null condition.

    conditional: [batch, COLUMNS]. time, null: [COLUMNS], of the step; `time` with SEPARABLE.
    """
    inside, of_users = (column < WIDTH)[None, :], branch == 0
    offset = part * WIDTH + column[None, :]
    line = user.to(tl.int64)[:, None] * COLUMNS
    # Masks and no branch, around which ptxas spills.
    value = tl.load(conditional + line + offset, mask=inside & of_users, other=0).to(tl.float32)
    if SEPARABLE:
        value += tl.load(time + offset, mask=inside & of_users, other=0)
    return value + tl.load(null + offset, mask=inside & (branch != 0), other=0)


@triton.jit
def modulated(
    state, norm, conditional, time, null, part, branch, place, user, column, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, SEPARABLE: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """`layer_norm(state) (1 + scale) + shift` of whole rows, in float32."""
    inside = (column < WIDTH)[None, :]
    x = tl.load(state + place, mask=inside, other=0)
    centred = tl.where(inside, x - tl.sum(x, axis=1)[:, None] * (1 / WIDTH), 0)
    variance = tl.sum(centred * centred, axis=1)[:, None] * (1 / WIDTH)
    x = centred * tl.rsqrt(variance + 1e-6)
    if AFFINE:
        x = x * per_column(norm, column, WIDTH) + per_column(norm + WIDTH, column, WIDTH)
    shift = modulation(
        conditional, time, null, part, branch, user, column, WIDTH, COLUMNS, SEPARABLE
    )
    scale = modulation(
        conditional, time, null, part + 1, branch, user, column, WIDTH, COLUMNS, SEPARABLE
    )
    return x * (1 + scale) + shift


@triton.jit(do_not_specialize=["batch"])
def adaln_embed(
    out, times, embedded, batch, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """`silu(times[step] + embedded)` [steps, batch, WIDTH], steps along `program_id(1)`."""
    step = tl.program_id(1)
    row, column, inside = tile(batch, WIDTH, BLOCK_M, BLOCK_N, tl.program_id(0))
    value = at(embedded, row, column, WIDTH) + per_column(times + step * WIDTH, column, WIDTH)
    place = (step.to(tl.int64) * batch + row)[:, None] * WIDTH + column[None, :]
    tl.store(out + place, silu(value).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["part", "batch", "rows"])
def adaln_modulate(
    out, state, norm, conditional, time, null, guidance, part, batch, rows, stride,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SEPARABLE: tl.constexpr, AFFINE: tl.constexpr,
    FOLDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Input of a block's first layer, or with FOLDED the guided input of the output layer.

    out: [branches, rows, WIDTH], one branch with FOLDED. state: [branches, rows, WIDTH] float32,
    `stride` elements between branches (0: both have the same). norm: [2, WIDTH] with AFFINE.
    """
    branch = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_W)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    row = tl.minimum(row, rows - 1)
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    value = modulated(
        state + branch * stride, norm, conditional, time, null, part, branch, place, row % batch,
        column, WIDTH, COLUMNS, SEPARABLE, AFFINE,
    )  # fmt: skip
    if FOLDED:
        without = modulated(
            state + stride, norm, conditional, time, null, part, 1, place, row % batch, column,
            WIDTH, COLUMNS, SEPARABLE, AFFINE,
        )  # fmt: skip
        value = (1 + guidance) * value - guidance * without
    target = out + branch * rows.to(tl.int64) * WIDTH
    tl.store(target + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def affine(
    out, operand, weight, bias, rows, INNER: tl.constexpr, COLUMNS: tl.constexpr,
    ACTIVATED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`operand [rows, INNER] @ weight [COLUMNS, INNER]^T + bias`, through SiLU with ACTIVATED."""
    row, column, inside = tile(rows, COLUMNS, BLOCK_M, BLOCK_N, tl.program_id(0))
    value = product(operand, weight, row, column, INNER, COLUMNS, BLOCK_K, PRECISION)
    if bias is not None:
        value += per_column(bias, column, COLUMNS)
    if ACTIVATED:
        value = silu(value)
    place = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["part", "batch", "rows"])
def adaln_residual(
    out, state, operand, weight, bias, conditional, time, null, part, batch, rows, stride,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SEPARABLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`state + gate * (operand @ weight^T + bias)`: the end of a block.

    out: [branches, rows, WIDTH] float32; it may be `state`, which is as for `adaln_modulate`.
    """
    branch = tl.program_id(1)
    row, column, inside = tile(rows, WIDTH, BLOCK_M, BLOCK_N, tl.program_id(0))
    offset = branch * rows.to(tl.int64) * WIDTH
    value = product(operand + offset, weight, row, column, WIDTH, WIDTH, BLOCK_K, PRECISION)
    value += per_column(bias, column, WIDTH)
    gate = modulation(
        conditional, time, null, part, branch, row % batch, column, WIDTH, COLUMNS, SEPARABLE
    )
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    x = tl.load(state + branch * stride + place, mask=inside, other=0)
    tl.store(out + offset + place, x + gate * value, mask=inside)
