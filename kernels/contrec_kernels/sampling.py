"""Samplers from plain tensors: which kernels a chain of steps launches, and with what blocks.

The hoisted weights are the tuples of `contrec_fast.ops.hoisting`, contiguous. Nothing here waits
for the GPU, so that a CUDA graph can capture a whole chain.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from contrec_kernels.sampling_adaln import adaln_embed, adaln_modulate, adaln_residual, affine
from contrec_kernels.sampling_persistent import mlp_persistent, mlp_persistent_preactivation
from contrec_kernels.sampling_steps import draw, mlp_hidden, mlp_preactivation, update

FORMS = ("persistent", "persistent-pre", "cooperative-pre", "step-pre", "step")
CHUNK_BYTES = 256 * 2**20  # of what is worked out beforehand for several steps at once


class Chain(NamedTuple):
    """The users' side of a call, and the solver.

    coefficients: [steps, 6] float32 of `sampling_steps.solver_step`. noise: scripted, [samples,
    entries, batch, D], or None for the counter-based noise of `seed` and `users` [batch].
    noises: how many the chain takes. multistep: whether steps use the x0 before. guidance: w.
    """

    condition: Tensor
    seed: Tensor
    users: Tensor
    samples: int
    noise: Tensor | None
    coefficients: Tensor
    noises: int
    multistep: bool
    guidance: float

    @property
    def rows(self) -> int:
        return self.samples * len(self.condition)

    @property
    def steps(self) -> int:
        return len(self.coefficients)

    @property
    def script(self) -> tuple[Tensor, int, bool]:
        """Noise tensor (of the right dtype in any case), its entries, whether it is scripted."""
        if self.noise is None:
            return self.condition, 1, False
        return self.noise, self.noise.shape[1], True


class Blocks(NamedTuple):
    """Rows, columns and inner columns of a tile, warps of a program, stages of its pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def sizes(self) -> dict:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k} | self.options

    @property
    def options(self) -> dict:
        return {"num_warps": self.warps, "num_stages": self.stages}

    def tiles(self, rows: int, columns: int) -> int:
        return -(-rows // self.m) * -(-columns // self.n)


BLOCKS = {  # by dtype: (most rows, blocks)
    torch.bfloat16: [
        (128, Blocks(16, 32, 128, 4, 3)),
        (2048, Blocks(64, 64, 64, 4, 4)),
        (None, Blocks(128, 64, 64, 8, 3)),
    ],
    torch.float32: [(128, Blocks(16, 32, 64, 4, 3)), (None, Blocks(64, 64, 32, 4, 3))],
}
ELEMENTWISE = Blocks(16, 64, 16, 4, 1)
PERSISTENT_ROWS = 16


def blocks_for(rows: int, dtype: torch.dtype) -> Blocks:
    return next(blocks for most, blocks in BLOCKS[dtype] if most is None or rows <= most)


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: three tf32 products are as exact and use the tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def product(
    operand: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, activated=False
) -> Tensor:
    """`operand [.., K] @ weight [N, K]^T + bias` in `dtype`, through SiLU with `activated`."""
    rows, (columns, inner) = operand.numel() // operand.shape[-1], weight.shape
    out = operand.new_empty(*operand.shape[:-1], columns, dtype=dtype)
    blocks = blocks_for(rows, operand.dtype)
    affine[blocks.tiles(rows, columns),](
        out, operand, weight, bias, rows, INNER=inner, COLUMNS=columns, ACTIVATED=activated,
        PRECISION=precision(operand.dtype), **blocks.sizes,
    )  # fmt: skip
    return out


def draw_noise(chain: Chain, first: int, entries: int, state: Tensor | None = None) -> Tensor:
    """Noises `first` to `first + entries - 1` [entries, rows, D] in the condition's dtype.

    state: [rows, D] float32 that gets a copy of a single one.
    """
    (batch, dim), (noise, scripted_entries, scripted) = chain.condition.shape, chain.script
    out = chain.condition.new_empty(entries, chain.rows, dim)
    draw[ELEMENTWISE.tiles(chain.rows, dim), entries](
        out, state, noise, chain.seed, chain.users, batch, chain.rows, first, scripted_entries,
        DIM=dim, SCRIPTED=scripted, HAS_STATE=state is not None, BLOCK_M=ELEMENTWISE.m,
        BLOCK_N=ELEMENTWISE.n, **ELEMENTWISE.options,
    )  # fmt: skip
    return out


def philox_normal(seed: Tensor, users: Tensor, dim: int, step: int, draw: int = 0) -> Tensor:
    """`contrec_fast.ops.noise.philox_normal` as one kernel: [B, D] float32 within 4 ulp of it."""
    condition = torch.empty(len(users), dim, dtype=torch.float32, device=users.device)
    empty = Chain(condition, seed, users, 1, None, condition, 0, False, 0.0)
    return draw_noise(empty, step + 65536 * draw, 1)[0] if len(users) else condition


def stepped(chain: Chain, network) -> Tensor:
    """The chain [rows, D] by `network(x, step) -> (operand, weight, bias, conditional)` of the
    network's last layer: `operand @ weight^T + bias` ([D], or [steps, D]) `+ conditional` [B, D].
    """
    dim, (noise, entries, scripted) = chain.condition.shape[1], chain.script
    state = chain.condition.new_empty(chain.rows, dim, dtype=torch.float32)
    previous = torch.empty_like(state) if chain.multistep else None
    x = draw_noise(chain, 0, 1, state)[0]
    after = torch.empty_like(x)
    blocks = blocks_for(chain.rows, x.dtype)
    for step in range(chain.steps):
        operand, weight, bias, conditional = network(x, step)
        update[blocks.tiles(chain.rows, dim),](
            after, state, previous, operand, weight, bias, conditional, chain.coefficients, noise,
            chain.seed, chain.users, len(chain.condition), chain.rows, step, chain.noises, entries,
            INNER=weight.shape[1], DIM=dim, PER_STEP=bias.dim() == 2,
            PER_USER=conditional is not None, MULTISTEP=chain.multistep, SCRIPTED=scripted,
            PRECISION=precision(x.dtype), **blocks.sizes,
        )  # fmt: skip
        x, after = after, x
    return x


def sample_linear(chain: Chain, hoisted) -> Tensor:
    """[rows, D] of a `HoistedLinear`."""
    w = chain.guidance
    conditional = product(chain.condition, hoisted.of_condition, None, torch.float32)
    conditional = (1 + w) * conditional - w * hoisted.null
    return stepped(chain, lambda x, step: (x, hoisted.of_x, hoisted.times, conditional))


def choose_form(rows: int, dim: int, dtype: torch.dtype, predicts_x0: bool) -> str:
    """Which of `FORMS` an `mlp` chain takes. By reasoning, not yet by measurement: narrow weights
    stay in a program's caches; few rows of wide ones are a matter of latency."""
    if dim <= 64:
        return "persistent-pre" if predicts_x0 and dtype == torch.bfloat16 else "persistent"
    if dim <= 128:
        return "persistent"
    return "cooperative-pre" if rows <= 128 and predicts_x0 else "step"


def sample_mlp(chain: Chain, hoisted, pre=None, form: str | None = None) -> Tensor:
    """[rows, D] of a `HoistedMLP`.

    Args:
        pre: its `PreActivation`, the matrix in the model's dtype; None if the network does not
        predict x0, which the pre-activation forms need. form: of `FORMS`; None chooses.
    """
    dtype, dim = chain.condition.dtype, chain.condition.shape[1]
    form = form or choose_form(chain.rows, dim, dtype, pre is not None)
    conditional = product(chain.condition, hoisted.of_condition, None, torch.float32)
    if form.startswith("persistent"):
        return _persistent(chain, hoisted, pre if form == "persistent-pre" else None, conditional)
    if form != "step":
        return _preactivation(chain, hoisted, pre, conditional, form == "cooperative-pre")
    hidden = len(hoisted.null)
    folded = chain.condition.new_empty(chain.rows, hidden)
    blocks = blocks_for(chain.rows, dtype)

    def network(x: Tensor, step: int):
        mlp_hidden[blocks.tiles(chain.rows, hidden),](
            folded, x, hoisted.of_x, conditional, hoisted.null, hoisted.times, chain.guidance,
            len(chain.condition), chain.rows, step, DIM=dim, HIDDEN=hidden,
            GUIDED=chain.guidance != 0, PRECISION=precision(dtype), **blocks.sizes,
        )  # fmt: skip
        return folded, hoisted.output, hoisted.output_bias, None

    return stepped(chain, network)


def persistent_blocks(dim: int, hidden: int, dtype: torch.dtype, pre: bool) -> dict:
    """Block sizes, warps and stages of the persistent kernels."""
    wide = power_of_two(dim)
    if pre:
        units = power_of_two(hidden)
    else:
        widest = 64 if dtype == torch.float32 and wide > 64 else 128
        units = min(power_of_two(hidden), widest if wide <= 128 else 32)
    narrow = wide <= 64 and units <= 128 and dtype == torch.bfloat16
    return {
        "BLOCK_M": PERSISTENT_ROWS,
        "BLOCK_D": wide,
        "BLOCK_H": units,
        "num_warps": 4 if narrow else 8,
        "num_stages": 2,
    }


def _persistent(chain: Chain, hoisted, pre, conditional: Tensor) -> Tensor:
    dim, (noise, entries, scripted) = chain.condition.shape[1], chain.script
    out = chain.condition.new_empty(chain.rows, dim)
    shared = (
        conditional, hoisted.null, hoisted.times, chain.coefficients, noise, chain.seed,
        chain.users, chain.guidance, len(chain.condition), chain.rows, chain.steps, chain.noises,
        entries,
    )  # fmt: skip
    options = {
        "DIM": dim,
        "HIDDEN": len(hoisted.null),
        "GUIDED": chain.guidance != 0,
        "MULTISTEP": chain.multistep,
        "SCRIPTED": scripted,
        "PRECISION": precision(out.dtype),
    }
    options |= persistent_blocks(dim, len(hoisted.null), out.dtype, pre is not None)
    grid = (-(-chain.rows // PERSISTENT_ROWS),)
    last = hoisted.output, hoisted.output_bias
    if pre is None:
        mlp_persistent[grid](out, hoisted.of_x, *last, *shared, **options)
    else:
        mlp_persistent_preactivation[grid](out, hoisted.of_x, *pre, *last, *shared, **options)
    return out


def _preactivation(chain: Chain, hoisted, pre, conditional: Tensor, cooperative: bool) -> Tensor:
    hidden, rows, device = len(hoisted.null), chain.rows, chain.condition.device
    state = torch.empty(rows, hidden, dtype=torch.float32, device=device)
    previous = torch.empty_like(state) if chain.multistep else None
    folded = chain.condition.new_empty(2, rows, hidden)
    blocks = blocks_for(rows, folded.dtype)
    tiles = blocks.tiles(rows, hidden)
    programs, launch = tiles, {}
    if cooperative and device.type == "cuda":
        programs = min(tiles, torch.cuda.get_device_properties(device).multi_processor_count)
        launch["launch_cooperative_grid"] = True
    elif cooperative:  # the interpreter runs one program after the other
        programs = 1

    def run(first: int, last: int, noise: Tensor):
        together = cooperative and last - first > 1
        mlp_preactivation[programs if together else tiles,](
            folded, state, previous, *pre, conditional, hoisted.null, hoisted.times,
            chain.coefficients, noise, torch.zeros(1, dtype=torch.int32, device=device),
            chain.guidance, len(chain.condition), rows, first, last, chain.noises, HIDDEN=hidden,
            GUIDED=chain.guidance != 0, MULTISTEP=chain.multistep,
            PRECISION=precision(folded.dtype), **blocks.sizes, **(launch if together else {}),
        )  # fmt: skip

    def projected(first: int, entries: int) -> Tensor:
        return product(draw_noise(chain, first, entries), hoisted.of_x, None, torch.float32)

    run(-1, 0, projected(0, 1))
    chunk, done = max(1, CHUNK_BYTES // (4 * rows * hidden)), chain.steps - 1
    for first in range(0, done, chunk):
        last = min(first + chunk, done)
        noise = projected(first + 1, last - first) if chain.noises > 1 else state
        if cooperative:
            run(first, last, noise)
        else:
            for step in range(first, last):
                run(step, step + 1, noise[step - first] if chain.noises > 1 else state)
    return product(folded[done % 2], hoisted.output, hoisted.output_bias, folded.dtype)


def sample_adaln(chain: Chain, hoisted, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """[rows, D] of a `HoistedAdaLN`.

    chunk_bytes: bound of the joint modulations worked out at once (one step's at least): those of
    all steps would be [steps, B, M].
    """
    batch, rows, dtype = len(chain.condition), chain.rows, chain.condition.dtype
    columns, width = hoisted.modulation.shape
    depth, branches = len(hoisted.expand), 2 if chain.guidance else 1
    separable = hoisted.time_modulation is not None
    embedded = product(
        chain.condition, hoisted.condition, hoisted.condition_bias,
        dtype if separable else torch.float32, activated=separable,
    )  # fmt: skip
    chunk = 1 if separable else max(1, chunk_bytes // (batch * columns * dtype.itemsize))
    state = torch.empty(branches, rows, width, dtype=torch.float32, device=chain.condition.device)
    inner = chain.condition.new_empty(branches, rows, width)
    blocks = blocks_for(branches * rows, dtype)
    line = Blocks(1, 0, 0, 8, 1) if width > 512 else Blocks(4, 0, 0, 4, 1)
    common = {"WIDTH": width, "COLUMNS": columns, "SEPARABLE": separable}
    held: dict = {"first": None}

    def modulations(step: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """[B, M] of the users, [M] of the time and [M] of the null branch."""
        first = 0 if separable else step - step % chunk
        if held["first"] != first:
            act = embedded
            if not separable:
                steps = min(chunk, chain.steps - first)
                act = chain.condition.new_empty(steps, batch, width)
                adaln_embed[ELEMENTWISE.tiles(batch, width), steps](
                    act, hoisted.times[first], embedded, batch, WIDTH=width, BLOCK_M=ELEMENTWISE.m,
                    BLOCK_N=ELEMENTWISE.n, **ELEMENTWISE.options,
                )  # fmt: skip
            held["first"] = first
            held["users"] = product(act, hoisted.modulation, hoisted.modulation_bias, dtype)
        if separable:
            return held["users"], hoisted.time_modulation[step], hoisted.null_modulation[step]
        return held["users"][step - first], None, hoisted.null_modulation[step]

    def modulate(source: Tensor, stride: int, parts: tuple, part: int, norm: Tensor | None):
        last = norm is None
        grid = -(-rows // line.m), 1 if last else branches
        adaln_modulate[grid](
            inner, source, norm, *parts, chain.guidance, part, batch, rows, stride, **common,
            AFFINE=not last, FOLDED=last and branches == 2, BLOCK_M=line.m,
            BLOCK_W=power_of_two(width), **line.options,
        )  # fmt: skip

    def network(x: Tensor, step: int):
        parts = modulations(step)
        source, stride = product(x, hoisted.input, hoisted.input_bias, torch.float32), 0
        for i in range(depth):
            modulate(source, stride, parts, 3 * i, hoisted.norm[i])
            act = product(inner, hoisted.expand[i], hoisted.expand_bias[i], dtype, activated=True)
            adaln_residual[blocks.tiles(rows, width), branches](
                state, source, act, hoisted.contract[i], hoisted.contract_bias[i], *parts,
                3 * i + 2, batch, rows, stride, **common, PRECISION=precision(dtype),
                **blocks.sizes,
            )  # fmt: skip
            source, stride = state, rows * width
        modulate(state, stride, parts, 3 * depth, None)
        return inner[0], hoisted.output, hoisted.output_bias, None

    return stepped(chain, network)
