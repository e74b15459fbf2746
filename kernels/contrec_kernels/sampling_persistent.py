"""All steps of an `mlp` chain in one launch: a program carries a block of rows from x_T to x_0.

For narrow denoisers: every program reads all weights once per step, from its own cache if they fit.
Rows are those of `sampling_steps`.
"""

import triton
import triton.language as tl

from contrec_kernels.sampling_steps import at, chain_noise, fold, per_column, solver_step


@triton.jit
def matrix(
    weight, line, column, LINES: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Block of a matrix [LINES, COLUMNS], transposed, zero past its ends (WHOLE: it has none)."""
    place = line[None, :] * COLUMNS + column[:, None]
    if WHOLE:
        block = tl.load(weight + place)
    else:
        inside = (line < LINES)[None, :] & (column < COLUMNS)[:, None]
        block = tl.load(weight + place, mask=inside, other=0)
    return block


@triton.jit(do_not_specialize=["batch", "rows", "steps", "noises", "entries"])
def mlp_persistent(
    out, of_x, output, output_bias, conditional, null, times, coefficients, noise, seed, users,
    guidance, batch, rows, steps, noises, entries, DIM: tl.constexpr, HIDDEN: tl.constexpr,
    GUIDED: tl.constexpr, MULTISTEP: tl.constexpr, SCRIPTED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """x in registers, the hidden layer in blocks of BLOCK_H columns, BLOCK_D of at least DIM.

    out: [rows, DIM]. of_x: [HIDDEN, DIM]. output: [DIM, HIDDEN]. output_bias: [DIM].
    conditional: [batch, HIDDEN]. null: [HIDDEN]. times: [steps, HIDDEN].
    """
    WHOLE: tl.constexpr = (DIM % BLOCK_D == 0) and (HIDDEN % BLOCK_H == 0)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    column = tl.arange(0, BLOCK_D)
    bias = per_column(output_bias, column, DIM)
    x = chain_noise(noise, seed, users, batch, 0, entries, row, column, 0, DIM, SCRIPTED)
    x0 = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for step in range(steps):
        f = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        operand = x.to(of_x.dtype.element_ty)
        for begin in range(0, HIDDEN, BLOCK_H):
            unit = begin + tl.arange(0, BLOCK_H)
            shared = tl.dot(
                operand, matrix(of_x, unit, column, HIDDEN, DIM, WHOLE), input_precision=PRECISION
            )
            shared += per_column(times + step * HIDDEN, unit, HIDDEN)
            folded = fold(
                shared, at(conditional, row % batch, unit, HIDDEN), per_column(null, unit, HIDDEN),
                guidance, GUIDED,
            )  # fmt: skip
            last = matrix(output, column, unit, DIM, HIDDEN, WHOLE)
            f = tl.dot(folded.to(last.dtype), last, f, input_precision=PRECISION)
        x, x0 = solver_step(f + bias, x, x0, coefficients, step, MULTISTEP)
        if step + 1 < noises:
            drawn = chain_noise(
                noise, seed, users, batch, step + 1, entries, row, column, 0, DIM, SCRIPTED
            )
            x += tl.load(coefficients + 6 * step + 2) * drawn
    place = row.to(tl.int64)[:, None] * DIM + column[None, :]
    mask = inside[:, None] & (column < DIM)[None, :]
    tl.store(out + place, x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "rows", "steps", "noises", "entries"])
def mlp_persistent_preactivation(
    out, of_x, merged, merged_bias, output, output_bias, conditional, null, times, coefficients,
    noise, seed, users, guidance, batch, rows, steps, noises, entries, DIM: tl.constexpr,
    HIDDEN: tl.constexpr, GUIDED: tl.constexpr, MULTISTEP: tl.constexpr, SCRIPTED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The pre-activation `a = W_x x` in registers: the noise's product waits for no step.

    Arguments as for `mlp_persistent`; merged: [HIDDEN, HIDDEN] and merged_bias: [HIDDEN] of
    `pre_activation`; BLOCK_H of at least HIDDEN. The network must predict x0.
    """
    WHOLE: tl.constexpr = (DIM % BLOCK_D == 0) and (HIDDEN % BLOCK_H == 0)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    column, unit = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    user = at(conditional, row % batch, unit, HIDDEN)
    without = per_column(null, unit, HIDDEN)
    bias = per_column(merged_bias, unit, HIDDEN)
    first = matrix(of_x, unit, column, HIDDEN, DIM, WHOLE)
    start = chain_noise(noise, seed, users, batch, 0, entries, row, column, 0, DIM, SCRIPTED)
    a = tl.dot(start.to(of_x.dtype.element_ty), first, input_precision=PRECISION)
    a0 = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    for step in range(steps - 1):
        shared = a + per_column(times + step * HIDDEN, unit, HIDDEN)
        folded = fold(shared, user, without, guidance, GUIDED).to(merged.dtype.element_ty)
        f = tl.dot(
            folded, matrix(merged, unit, unit, HIDDEN, HIDDEN, WHOLE), input_precision=PRECISION
        )
        a, a0 = solver_step(f + bias, a, a0, coefficients, step, MULTISTEP)
        if step + 1 < noises:
            drawn = chain_noise(
                noise, seed, users, batch, step + 1, entries, row, column, 0, DIM, SCRIPTED
            )
            added = tl.dot(drawn.to(of_x.dtype.element_ty), first, input_precision=PRECISION)
            a += tl.load(coefficients + 6 * step + 2) * added
    shared = a + per_column(times + (steps - 1) * HIDDEN, unit, HIDDEN)
    folded = fold(shared, user, without, guidance, GUIDED).to(output.dtype.element_ty)
    y = tl.dot(folded, matrix(output, column, unit, DIM, HIDDEN, WHOLE), input_precision=PRECISION)
    y += per_column(output_bias, column, DIM)
    place = row.to(tl.int64)[:, None] * DIM + column[None, :]
    mask = inside[:, None] & (column < DIM)[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)
