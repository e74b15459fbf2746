"""What the fused backends of `catalog_cross_entropy` share: one derivative, by recomputation."""

from collections.abc import Callable

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    """A gradient as it is; its own derivative in the inputs is an error, not zero."""

    @staticmethod
    def forward(ctx, gradient: Tensor, *inputs: Tensor):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *unused):
        raise RuntimeError(
            "catalog_cross_entropy: expected at most one derivative, got a second; "
            "the backend 'reference' has it"
        )


class Recomputed(torch.autograd.Function):
    """The loss by a pair of passes; between them, the inputs and some numbers per query stay.

    `apply` takes the passes and then the operation's arguments:

    - forward(*arguments) -> losses [B] and tensors to keep;
    - backward(*arguments, *kept, gradient, wanted) -> gradients in queries and vectors, or None
      where `wanted`, two flags, does not ask for them.
    """

    @staticmethod
    def forward(ctx, forward: Callable, backward: Callable, *arguments):
        losses, *kept = forward(*arguments)
        ctx.backward_pass = backward
        ctx.others = [None if isinstance(value, Tensor) else value for value in arguments]
        tensors = [value if isinstance(value, Tensor) else None for value in arguments]
        ctx.save_for_backward(*tensors, *kept)
        return losses

    @staticmethod
    def backward(ctx, gradient: Tensor):
        saved, count = ctx.saved_tensors, len(ctx.others)
        arguments = [b if a is None else a for a, b in zip(saved, ctx.others)]
        wanted = ctx.needs_input_grad[2:4]
        with torch.no_grad():
            found = ctx.backward_pass(*arguments, *saved[count:], gradient, wanted)
        if torch.is_grad_enabled():  # create_graph=True
            found = [
                None if part is None else _Refuse.apply(part, *arguments[:2]) for part in found
            ]
        return None, None, *found, *[None] * (count - 2)
