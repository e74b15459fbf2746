"""Sampler steps as tiled products: what a step does around a product happens in its epilogue.

`rows` are draws times users, draw by draw, so `row % batch` is the user. Operands are bfloat16 or
float32, `x`, products and everything added to them float32. A row's result depends on no other row
and every product adds along the inner dimension in one fixed order: the bits do not depend on the
batch as long as the block sizes do not.
"""

import triton
import triton.language as tl

from contrec_kernels.philox import normals


@triton.jit
def product(
    a, weight, row, column, INNER: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of `a [rows, INNER] @ weight [COLUMNS, INNER]^T`; `row` within the rows."""
    inner = tl.arange(0, BLOCK_K)
    a_tile = a + row.to(tl.int64)[:, None] * INNER + inner[None, :]
    w_tile = weight + tl.minimum(column, COLUMNS - 1)[None, :] * INNER + inner[:, None]
    total = tl.zeros((row.shape[0], column.shape[0]), dtype=tl.float32)
    # The grid has two axes, so program_id(2) is 0. The compiler does not know it, and leaves the
    # loop a loop: unrolled as a whole, epilogues of large tiles spill registers.
    for k in range(0, INNER + tl.program_id(2), BLOCK_K):
        if INNER % BLOCK_K == 0:
            left, right = tl.load(a_tile), tl.load(w_tile)
        else:
            inside = k + inner < INNER
            left = tl.load(a_tile, mask=inside[None, :], other=0)
            right = tl.load(w_tile, mask=inside[:, None], other=0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a_tile += BLOCK_K
        w_tile += BLOCK_K
    return total


@triton.jit
def tile(rows, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, index):
    """Rows (those past the end repeat the last one) and columns of a tile, and where to store."""
    across: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    row = (index // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (index % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    return tl.minimum(row, rows - 1), column, inside


@triton.jit
def per_column(table, column, COLUMNS: tl.constexpr):
    """Entries of a row [COLUMNS] as float32 [1, BLOCK_N], zero past the end."""
    return tl.load(table + column, mask=column < COLUMNS, other=0).to(tl.float32)[None, :]


@triton.jit
def at(table, row, column, COLUMNS: tl.constexpr):
    """Entries of a table [.., COLUMNS] as float32 [BLOCK_M, BLOCK_N], zero past its columns."""
    place = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    return tl.load(table + place, mask=(column < COLUMNS)[None, :], other=0).to(tl.float32)


@triton.jit
def chain_noise(
    noise, seed, users, batch, entry, entries, row, column, first_column, DIM: tl.constexpr,
    SCRIPTED: tl.constexpr,
):  # fmt: skip
    """Noise `entry` of a tile, rounded to the model's dtype as the specification has it.

    noise: [draws, entries, batch, DIM] of scripted noise, else anything of that dtype.
    """
    if SCRIPTED:
        line = ((row // batch) * entries + entry).to(tl.int64) * batch + row % batch
        drawn = at(noise, line, column, DIM)
    else:
        drawn = normals(
            tl.load(seed), tl.load(users + row % batch), row // batch, entry, first_column,
            column.shape[0],
        ).to(noise.dtype.element_ty).to(tl.float32)  # fmt: skip
    return drawn


@triton.jit
def normal_tail(size):
    """Phi(-size) of a size that is not negative: without a branch, unlike the library's erf.

    log2 of it is a Chebyshev fit on 0..5.5, beyond which Phi is below 2e-8.
    """
    a = tl.minimum(size, 5.5)
    p = (6.80955736e-8 * a - 1.78332618e-6) * a + 1.76142366e-5
    p = ((p * a - 5.26271797e-5) * a - 5.40515815e-4) * a + 0.00772875082
    p = (((p * a - 0.0530908778) * a - 0.45894596) * a - 1.15114963) * a - 0.999998748
    return tl.exp2(p)


@triton.jit
def gelu(x):
    """Exact GELU, as `max(x, 0) - |x| Phi(-|x|)`.

    The error is below 3e-7, the mean one half that of `torch.nn.functional.gelu` in float32.
    """
    size = tl.abs(x)
    return tl.maximum(x, 0.0) - size * normal_tail(size)


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def fold(shared, conditional, null, guidance, GUIDED: tl.constexpr):
    """`(1 + w) gelu(shared + conditional) - w gelu(shared + null)`: guidance before the output."""
    folded = gelu(shared + conditional)
    if GUIDED:
        folded = (1 + guidance) * folded - guidance * gelu(shared + null)
    return folded


@triton.jit
def solver_step(f, x, x0, coefficients, step, MULTISTEP: tl.constexpr):
    """A step of the solver without its noise, and the prediction x0 that a later step may use.

    coefficients: [steps, 6] float32 of f, x, noise and the x0 before; then of x0: of x and f.
    """
    c = coefficients + 6 * step
    after = tl.load(c) * f + tl.load(c + 1) * x
    if MULTISTEP:
        after += tl.load(c + 3) * x0
        x0 = tl.load(c + 4) * x + tl.load(c + 5) * f
    return after, x0


@triton.jit(do_not_specialize=["entry", "entries", "batch", "rows"])
def draw(
    out, state, noise, seed, users, batch, rows, entry, entries, DIM: tl.constexpr,
    SCRIPTED: tl.constexpr, HAS_STATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Noise of one entry in the model's dtype and, if asked, as the float32 state."""
    row, column, inside = tile(rows, DIM, BLOCK_M, BLOCK_N, tl.program_id(0))
    place = row.to(tl.int64)[:, None] * DIM + column[None, :]
    first = tl.program_id(0) % ((DIM + BLOCK_N - 1) // BLOCK_N) * BLOCK_N
    entry += tl.program_id(1)
    drawn = chain_noise(
        noise, seed, users, batch, entry, entries, row, column, first, DIM, SCRIPTED
    )
    target = out + tl.program_id(1).to(tl.int64) * rows * DIM
    tl.store(target + place, drawn.to(out.dtype.element_ty), mask=inside)
    if HAS_STATE:
        tl.store(state + place, drawn, mask=inside)


@triton.jit(do_not_specialize=["step", "batch", "rows"])
def mlp_hidden(
    out, x, weight, conditional, null, time, guidance, batch, rows, step, DIM: tl.constexpr,
    HIDDEN: tl.constexpr, GUIDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Folded hidden layer [rows, HIDDEN] of x [rows, DIM].

    weight: [HIDDEN, DIM] of x. conditional: [batch, HIDDEN] and null: [HIDDEN], the condition's
    share. time: [steps, HIDDEN], the time's with the bias.
    """
    row, column, inside = tile(rows, HIDDEN, BLOCK_M, BLOCK_N, tl.program_id(0))
    shared = product(x, weight, row, column, DIM, HIDDEN, BLOCK_K, PRECISION)
    shared += per_column(time + step * HIDDEN, column, HIDDEN)
    folded = fold(
        shared, at(conditional, row % batch, column, HIDDEN), per_column(null, column, HIDDEN),
        guidance, GUIDED,
    )  # fmt: skip
    place = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.store(out + place, folded.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["step", "batch", "rows", "noises", "entries"])
def update(
    out, state, previous, operand, weight, bias, conditional, coefficients, noise, seed, users,
    batch, rows, step, noises, entries, INNER: tl.constexpr, DIM: tl.constexpr,
    PER_STEP: tl.constexpr, PER_USER: tl.constexpr, MULTISTEP: tl.constexpr,
    SCRIPTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The network's last layer, the solver's step and its noise.

    out: [rows, DIM], the new x in the model's dtype. state, previous: [rows, DIM] float32, x and
    the x0 before, in place. operand: [rows, INNER]. weight: [DIM, INNER]. bias: [DIM], or
    [steps, DIM] with PER_STEP. conditional: [batch, DIM], added with PER_USER.
    """
    row, column, inside = tile(rows, DIM, BLOCK_M, BLOCK_N, tl.program_id(0))
    f = product(operand, weight, row, column, INNER, DIM, BLOCK_K, PRECISION)
    if PER_STEP:
        bias += step * DIM
    f += per_column(bias, column, DIM)
    if PER_USER:
        f += at(conditional, row % batch, column, DIM)
    place = row.to(tl.int64)[:, None] * DIM + column[None, :]
    x = tl.load(state + place, mask=inside, other=0)
    x0 = f
    if MULTISTEP:
        x0 = tl.load(previous + place, mask=inside & (step > 0), other=0)
    x, x0 = solver_step(f, x, x0, coefficients, step, MULTISTEP)
    if step + 1 < noises:
        first = tl.program_id(0) % ((DIM + BLOCK_N - 1) // BLOCK_N) * BLOCK_N
        drawn = chain_noise(
            noise, seed, users, batch, step + 1, entries, row, column, first, DIM, SCRIPTED
        )
        x += tl.load(coefficients + 6 * step + 2) * drawn
    tl.store(state + place, x, mask=inside)
    if MULTISTEP:
        tl.store(previous + place, x0, mask=inside)
    tl.store(out + place, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def barrier(ticket, arrivals):
    """Until all programs of a cooperative launch have come here; `arrivals` counts on."""
    tl.debug_barrier()
    tl.atomic_add(ticket, 1, sem="release", scope="gpu")
    while tl.atomic_add(ticket, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["first", "last", "batch", "rows", "noises"])
def mlp_preactivation(
    hidden, state, previous, weight, bias, conditional, null, time, coefficients, noise, ticket,
    guidance, batch, rows, first, last, noises, HIDDEN: tl.constexpr, GUIDED: tl.constexpr,
    MULTISTEP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Steps `first` to `last - 1` on the pre-activation `a = W_x x`: one product each.

    More than one step needs a cooperative launch. Step -1 only starts the chain: `a = noise[0]`.

    hidden: [2, rows, HIDDEN], folded hidden layers; step s reads half `s % 2` and writes the other.
    state, previous: [rows, HIDDEN] float32. weight: `W_x W_2` [HIDDEN, HIDDEN]. bias: `W_x b_2`.
    conditional, null, time: as for `mlp_hidden`. noise: [last - first, rows, HIDDEN] float32,
    `W_x` times the noise that the steps add. ticket: int32 zero.
    """
    across: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    tiles = (rows + BLOCK_M - 1) // BLOCK_M * across
    half = rows.to(tl.int64) * HIDDEN
    for step in range(first, last):
        for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
            row, column, inside = tile(rows, HIDDEN, BLOCK_M, BLOCK_N, index)
            place = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
            added = noise + (step - first) * half
            if step < 0:
                a = tl.load(added + place, mask=inside, other=0)
            else:
                source = hidden + (step % 2) * half
                f = product(source, weight, row, column, HIDDEN, HIDDEN, BLOCK_K, PRECISION)
                f += per_column(bias, column, HIDDEN)
                a = tl.load(state + place, mask=inside, other=0)
                x0 = f
                if MULTISTEP:
                    x0 = tl.load(previous + place, mask=inside & (step > 0), other=0)
                a, x0 = solver_step(f, a, x0, coefficients, step, MULTISTEP)
                if MULTISTEP:
                    tl.store(previous + place, x0, mask=inside)
                if step + 1 < noises:
                    sigma = tl.load(coefficients + 6 * step + 2)
                    a += sigma * tl.load(added + place, mask=inside, other=0)
            tl.store(state + place, a, mask=inside)
            shared = a + per_column(time + (step + 1) * HIDDEN, column, HIDDEN)
            folded = fold(
                shared, at(conditional, row % batch, column, HIDDEN),
                per_column(null, column, HIDDEN), guidance, GUIDED,
            )  # fmt: skip
            target = hidden + ((step + 1) % 2) * half
            tl.store(target + place, folded.to(hidden.dtype.element_ty), mask=inside)
        if last - first > 1:
            barrier(ticket, (step - first + 1) * tl.num_programs(0))
