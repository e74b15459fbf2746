"""One-line errors that name the argument, what was expected and what came."""

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def check(name: str, tensor: Tensor, shape: tuple, dtypes: tuple, like: Tensor | None = None):
    """Refuse a tensor of another shape, dtype or device.

    Args:
        name: the argument's name, first word of the message.
        shape: sizes; a string stands for any size and names it in the message.
        dtypes: allowed dtypes.
        like: a tensor whose device must be shared.

    Raises:
        TypeError: not a tensor, or a wrong dtype. ValueError: wrong shape or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {allowed}, got {got}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")
