"""The steps of a recomputing `denoise` by Triton: which kernels they launch, with what blocks.

`TritonSteps` has the methods of `contrec_fast.ops.denoise_steps.Steps`, in whose docstrings their
arguments are told; all tensors are contiguous but for `state`, whose branches may share memory.
Products that nothing surrounds stay the library's. Nothing here waits for the GPU.
"""

import torch
from torch import Tensor

from contrec_kernels import denoise_kernels as kernels
from contrec_kernels.sampling import (
    ELEMENTWISE,
    Blocks,
    blocks_for,
    power_of_two,
    precision,
)

LINES = 8  # times BLOCK_M rows whose shares of a layer norm's weight gradients one program adds up


def stride_of(table: Tensor | None) -> int:
    """Elements between rows of a table; 0 if one row serves all."""
    return 0 if table is None or len(table) == 1 else table.stride(0)


def line_blocks(width: int) -> Blocks:
    """Of kernels that hold whole rows: rows, warps."""
    return Blocks(1, 0, 0, 8, 1) if width > 512 else Blocks(4, 0, 0, 4, 1)


class TritonSteps:
    """See `contrec_fast.ops.denoise_steps.Steps`."""

    by_index = False

    def hidden(self, x, condition, weight, time, null, rows) -> Tensor:
        return self._hidden(x, condition, weight, time, null, rows, None, None)[0]

    def hidden_gradient(self, x, condition, weight, time, null, rows, grad, output):
        return self._hidden(x, condition, weight, time, null, rows, grad, output)

    def _hidden(self, x, condition, weight, time, null, rows, grad, output):
        (count, dim), units = x.shape, len(weight)
        out = x.new_empty(count, units)
        of_shared = out if grad is None else torch.empty_like(out)
        of_condition = of_shared if grad is None or null is None else torch.empty_like(out)
        blocks = hidden_blocks(count, x.dtype, grad is not None)
        kernels.hidden[blocks.tiles(count, units),](
            out, of_condition, of_shared, x, condition, weight, time, null, rows.drop, grad,
            output, rows.guidance, count, DIM=dim, HIDDEN=units, STRIDE=stride_of(time),
            GUIDED=null is not None, HAS_DROP=rows.drop is not None, GRADIENT=grad is not None,
            PRECISION=precision(x.dtype), **blocks.sizes,
        )  # fmt: skip
        return out, of_condition, of_shared

    def modulate(self, state, norm, modulation, rows) -> Tensor:
        return _modulate(state, norm, modulation, rows, state.new_empty(state.shape))

    def fold(self, state, modulation, rows) -> Tensor:
        return _modulate(state, None, modulation, rows, state.new_empty(state.shape[1:]))

    def modulate_gradient(self, state, norm, modulation, rows, grad, after, of_modulation):
        inner, of_state = torch.empty_like(grad), torch.empty_like(grad)
        of_norm = _modulate_gradient(
            inner, of_state, of_modulation, state, norm, modulation, rows, grad, after
        )
        return inner, of_state, *of_norm.sum(0).to(state.dtype)

    def fold_gradient(self, state, modulation, rows, grad):
        of_state = state.new_empty(state.shape)
        of_modulation = state.new_empty(*state.shape[:2], modulation.users.shape[1])
        _modulate_gradient(
            of_state, of_state, of_modulation, state, None, modulation, rows, grad, None
        )
        return self.fold(state, modulation, rows), of_state, of_modulation

    def expand(self, inner, weight, bias) -> tuple[Tensor, Tensor]:
        active, before = torch.empty_like(inner), torch.empty_like(inner)
        self._product(kernels.expand, inner, active, before, inner, weight, bias)
        return active, before

    def expand_gradient(self, grad, weight, before) -> tuple[Tensor, Tensor]:
        out, active = torch.empty_like(grad), torch.empty_like(grad)
        self._product(kernels.expand_gradient, grad, out, active, grad, weight, before)
        return out, active

    def _product(self, kernel, operand, *tensors):
        width = operand.shape[-1]
        count = operand.numel() // width
        blocks = blocks_for(count, operand.dtype)
        kernel[blocks.tiles(count, width),](
            *tensors, count, WIDTH=width, PRECISION=precision(operand.dtype), **blocks.sizes
        )

    def residual(self, state, active, weight, bias, modulation, rows) -> tuple[Tensor, Tensor]:
        branches, count, width = state.shape
        after, value = torch.empty_like(active), torch.empty_like(active)
        blocks = blocks_for(branches * count, active.dtype)
        kernels.residual[blocks.tiles(count, width), branches](
            after, value, state, active, weight, bias, *modulation_of(modulation), count,
            state.stride(0), WIDTH=width, PRECISION=precision(active.dtype),
            **constants(modulation), **blocks.sizes,
        )  # fmt: skip
        return after, value

    def residual_gradient(self, grad, value, modulation, rows, of_modulation) -> Tensor:
        (branches, count, width), out = grad.shape, torch.empty_like(grad)
        kernels.residual_gradient[ELEMENTWISE.tiles(count, width), branches](
            out, of_modulation, grad, value, *modulation_of(modulation), count, WIDTH=width,
            **constants(modulation), BLOCK_M=ELEMENTWISE.m, BLOCK_N=ELEMENTWISE.n,
            **ELEMENTWISE.options,
        )  # fmt: skip
        return out

    def sum_rows(self, values, table, rows) -> Tensor:
        return values.sum(0, keepdim=True) if len(table) == 1 else values


def hidden_blocks(rows: int, dtype: torch.dtype, gradient: bool) -> Blocks:
    """Gradients need three tiles of sums, which fill the registers of more warps."""
    blocks = blocks_for(rows, dtype)
    if not gradient or blocks.m < 64:
        return blocks
    return Blocks(64, 64, 64, 8, 3) if dtype == torch.bfloat16 else Blocks(64, 32, 32, 8, 3)


def modulation_of(modulation) -> tuple:
    return modulation.users, modulation.time, modulation.null


def constants(modulation) -> dict:
    """What kernels are specialised for."""
    return {
        "COLUMNS": modulation.users.shape[1],
        "TIME": stride_of(modulation.time),
        "NULL": stride_of(modulation.null),
        "SEPARABLE": modulation.time is not None,
        "GUIDED": modulation.null is not None,
    }


def _modulate(state, norm, modulation, rows, out) -> Tensor:
    branches, count, width = state.shape
    blocks, folded = line_blocks(width), norm is None
    weight, bias = norm or (None, None)
    kernels.modulate[-(-count // blocks.m), 1 if folded else branches](
        out, state, weight, bias, *modulation_of(modulation), rows.drop, rows.guidance, count,
        state.stride(0), WIDTH=width, FOLDED=folded, HAS_DROP=rows.drop is not None,
        **constants(modulation), BLOCK_M=blocks.m, BLOCK_W=power_of_two(width), **blocks.options,
    )  # fmt: skip
    return out


def _modulate_gradient(
    inner, of_state, of_modulation, state, norm, modulation, rows, grad, after
) -> Tensor:
    """Sums of the gradients of the norm's weight and bias, [programs, 2, W] float32."""
    branches, count, width = state.shape
    blocks, folded = line_blocks(width), norm is None
    weight, bias = norm or (None, None)
    programs = -(-count // (blocks.m * LINES))
    shape = branches * programs, 2, width
    of_norm = torch.empty(shape, dtype=torch.float32, device=state.device)
    kernels.modulate_gradient[programs, branches](
        inner, of_state, of_modulation, of_norm, state, weight, bias, *modulation_of(modulation),
        rows.drop, grad, after, rows.guidance, count, state.stride(0), WIDTH=width, FOLDED=folded,
        HAS_DROP=rows.drop is not None, LINES=LINES, **constants(modulation), BLOCK_M=blocks.m,
        BLOCK_W=power_of_two(width), **blocks.options,
    )  # fmt: skip
    return of_norm
