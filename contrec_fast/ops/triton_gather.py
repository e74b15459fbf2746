"""`gather_tokens` by the Triton kernels of `contrec_kernels`, imported at the first call."""

import torch
from torch import Tensor

from contrec_fast.ops.checks import FLOATS
from contrec_fast.ops.dispatch import implements
from contrec_fast.ops.triton_sampling import obstacle

MOST_POSITIONS = (1 << 10, 1 << 14, 1 << 18)  # bounds of the classes of calls that are measured
SOURCES = ("contrec_kernels.gather", "contrec_fast.ops.triton_gather")


def _obstacle(token_ids, rows, text_table: Tensor, token_table, weight, bias, out) -> str | None:
    factored = weight is not None
    return obstacle(text_table, FLOATS[1:] if factored else FLOATS)


def _bucket(token_ids, rows, text_table: Tensor, token_table, weight, bias, out) -> str:
    """Widths and dtype; the class of the number of positions."""
    inner = "" if weight is None else f" F={weight.shape[2]}"
    return _shape(text_table.shape[1], text_table.dtype, token_ids.numel()) + inner


def _shape(width: int, dtype: torch.dtype, count: int) -> str:
    last = MOST_POSITIONS[-1]
    most = next((f"<={most}" for most in MOST_POSITIONS if count <= most), f">{last}")
    return f"H={width} {str(dtype).removeprefix('torch.')} positions{most}"


@implements("gather_tokens", "triton", _obstacle, _bucket, SOURCES)
def _gather_tokens(*arguments) -> None:
    from contrec_kernels import gather

    gather.gather_tokens(*arguments)


def _backward_obstacle(gradient: Tensor, *rest) -> str | None:
    return obstacle(gradient, FLOATS)


def _backward_bucket(gradient: Tensor, token_ids: Tensor, *rest) -> str:
    return _shape(gradient.shape[2], gradient.dtype, token_ids.numel())


@implements("gather_tokens_backward", "triton", _backward_obstacle, _backward_bucket, SOURCES)
def _backward(*arguments) -> tuple[Tensor | None, Tensor | None]:
    from contrec_kernels import gather

    return gather.gather_tokens_backward(*arguments)
