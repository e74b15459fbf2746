"""Counter-based normal noise inside kernels: what `contrec_fast.ops.noise` specifies.

Philox4x32-10 (Salmon et al., SC 2011), keyed by the 64-bit seed, on the counter `(column // 4,
step + 65536 * draw, user id low, user id high)`; the four integers of a counter make the normals of
four neighbouring columns. The integers are the reference's; the normals, worked out in float32, are
within 4 units in the last place of its float32 roundings.
"""

import triton
import triton.language as tl


@triton.jit
def quarter_turn(part):
    """`(cos, sin)` of `part / 2^22` quarter turns, `part` integer in 0..2^22-1.

    Own polynomials, because the library's have a slow path that takes stack. Beyond an eighth of a
    turn the complement is used, which is exact, so that the argument is at most 1/2.
    """
    beyond = part > 0x200000
    t = tl.where(beyond, 0x400000 - part, part).to(tl.float32) * 2.384185791015625e-07
    s = t * t
    # Chebyshev fits on 0..1/4 in s, of sin(pi/2 t) / t and (cos(pi/2 t) - 1) / s.
    sine = 1.58206298e-4 * s - 0.00468126638
    sine = t * (((sine * s + 0.0796925798) * s - 0.645964086) * s + 1.57079637)
    cosine = 1 + s * (((9.06739908e-4 * s - 0.0208615288) * s + 0.253669411) * s - 1.23370051)
    return tl.where(beyond, sine, cosine), tl.where(beyond, cosine, sine)


@triton.jit
def box_muller(first, second):
    """Two uint32 tensors to two float32 tensors of standard normals."""
    uniform = ((first >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08  # 2^-24, exact
    square = -2.0 * tl.log(uniform)
    # A square root by Newton's step: the library's exact one branches and takes stack.
    inverse = tl.rsqrt(tl.maximum(square, 1e-12))
    radius = square * inverse
    radius += 0.5 * inverse * tl.fma(-radius, radius, square)
    quarter = second >> 30
    cosine, sine = quarter_turn(((second >> 8) & 0x3FFFFF).to(tl.int32))
    odd = (quarter & 1) == 1
    turned = tl.where(odd, -sine, cosine)
    sine = tl.where(odd, cosine, sine)
    radius = tl.where(quarter >= 2, -radius, radius)
    return radius * turned, radius * sine


@triton.jit
def words(seed, users, draws, entry, first_column, COLUMNS: tl.constexpr):
    """Four uint32 tensors [M, COLUMNS // 4]: the integers of some rows and neighbouring columns.

    Args:
        seed: int64 scalar. users: [M] int64 stable ids. draws: [M] int32. entry: which noise of the
        chain, 0 for x_T. first_column: a multiple of 4, as COLUMNS is.
    """
    block = (first_column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :]
    column = (entry + 65536 * draws).to(tl.uint32)[:, None]
    low = (users & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = ((users >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    zero = (block ^ block) ^ (column ^ column)  # [M, COLUMNS // 4]: all words of one shape
    return tl.philox(seed, block + zero, column + zero, low + zero, high + zero)


@triton.jit
def normals(seed, users, draws, entry, first_column, COLUMNS: tl.constexpr):
    """Normals [M, COLUMNS] in float32; arguments of `words`."""
    first, second, third, fourth = words(seed, users, draws, entry, first_column, COLUMNS)
    n0, n1 = box_muller(first, second)
    n2, n3 = box_muller(third, fourth)
    # join adds a last axis of two: [M, COLUMNS // 4, 2, 2], in memory order n0 n1 n2 n3
    together = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return tl.reshape(together, (users.shape[0], COLUMNS))
