"""`gather_tokens`: text and continuous tokens side by side as input embeddings."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import contrec_fast.ops.triton_gather  # noqa: F401, registers itself
from contrec_fast import native
from contrec_fast.ops.checks import FLOATS, INTEGERS, check
from contrec_fast.ops.dispatch import CPP, implements, resolve, transformed


class FactoredTable(NamedTuple):
    """Continuous tokens before their encoders' last layer: row r is
    `weight[r % K] @ hidden[r] + bias[r % K]`.

    As large as its F-wide hidden rows, H / F times smaller than the tokens themselves.

    Args:
        hidden: [R, F], R a multiple of K. weight: [K, H, F]. bias: [K, H]. All of one dtype.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    def whole(self) -> Tensor:
        """The tokens themselves, [R, H]."""
        hidden = self.hidden.unflatten(0, (-1, len(self.weight))).transpose(0, 1)
        return (
            torch.baddbmm(self.bias[:, None], hidden, self.weight.mT).transpose(0, 1).flatten(0, 1)
        )


# Implementations write to `out`; `weight` and `bias` are None for a whole table. Without `out` the
# reference returns what it makes, as nothing else can be transformed.


@implements("gather_tokens")
def _gather_tokens(
    token_ids: Tensor,
    rows: Tensor,
    text_table: Tensor,
    token_table: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    continuous = rows != -1
    # Without continuous tokens no row exists: let the look-up refuse it as any other id.
    unused = 0 if len(token_table) else len(text_table)
    text = F.embedding(token_ids.masked_fill(continuous, unused), text_table)
    if len(token_table) == 0:
        return text if out is None else out.copy_(text)
    found = rows.masked_fill(~continuous, 0)
    tokens = F.embedding(found, token_table)
    if weight is not None:
        # Every position by every layer, so that nothing waits for a GPU to count positions.
        layer = (found % len(weight))[..., None]
        hidden, tokens = tokens, torch.zeros_like(text)
        for k in range(len(weight)):
            tokens = torch.where(layer == k, F.linear(hidden, weight[k], bias[k]), tokens)
    return torch.where(continuous[..., None], tokens, text, out=out)


@implements("gather_tokens_backward")
def _backward(
    gradient: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    words: int,
    tokens: int,
    of_text: bool,
    of_tokens: bool,
) -> tuple[Tensor | None, Tensor | None]:
    continuous = rows != -1

    def summed(ids: Tensor, shown: Tensor, count: int) -> Tensor:
        if count == 0:
            return gradient.new_zeros(0, gradient.shape[2])
        # The gradient of F.embedding: in a fixed order.
        return torch.ops.aten.embedding_dense_backward(
            gradient.masked_fill(~shown[..., None], 0.0),
            ids.masked_fill(~shown, 0),
            count,
            -1,
            False,
        )

    return (
        summed(token_ids, ~continuous, words) if of_text else None,
        summed(rows, continuous, tokens) if of_tokens else None,
    )


def _no_extension(tensor: Tensor) -> str | None:
    if native.serves(tensor):
        return None
    return native.why_missing() or "tensors on the CPU"


def _obstacle(
    token_ids: Tensor, rows: Tensor, text_table: Tensor, token_table: Tensor, weight, bias, out
) -> str | None:
    if weight is not None and text_table.dtype not in (torch.float32, torch.bfloat16):
        got = str(text_table.dtype).removeprefix("torch.")
        return f"a factored table of float32 or bfloat16, got {got}"
    return _no_extension(token_ids)


implements("gather_tokens", CPP, obstacle=_obstacle)(native.gather_tokens)
implements("gather_tokens_backward", CPP, obstacle=lambda gradient, *_: _no_extension(gradient))(
    native.gather_tokens_backward
)


@torch.library.custom_op("contrec::gather_tokens_out", mutates_args=("out",))
def _registered_out(
    token_ids: Tensor,
    rows: Tensor,
    text_table: Tensor,
    token_table: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    backend: str,
) -> None:
    arguments = (token_ids, rows, text_table, token_table, weight, bias, out)
    resolve("gather_tokens", backend, *arguments)(*arguments)


@torch.library.custom_op("contrec::gather_tokens", mutates_args=())
def _registered(
    token_ids: Tensor,
    rows: Tensor,
    text_table: Tensor,
    token_table: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    out = text_table.new_empty(*token_ids.shape, text_table.shape[1])
    arguments = (token_ids, rows, text_table, token_table, weight, bias, out)
    resolve("gather_tokens", backend, *arguments)(*arguments)
    return out


@_registered.register_fake
def _(token_ids, rows, text_table, *rest):
    return text_table.new_empty(*token_ids.shape, text_table.shape[1])


@torch.library.custom_op("contrec::gather_tokens_backward", mutates_args=())
def _registered_backward(
    gradient: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    words: int,
    tokens: int,
    of_text: bool,
    of_tokens: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of whole tables of so many rows; no numbers where not asked for."""
    arguments = (gradient, token_ids, rows, words, tokens, of_text, of_tokens)
    found = resolve("gather_tokens_backward", backend, *arguments)(*arguments)
    return tuple(gradient.new_empty(0) if part is None else part for part in found)


@_registered_backward.register_fake
def _(gradient, token_ids, rows, words, tokens, of_text, of_tokens, backend):
    shapes = (
        ((words, gradient.shape[2]) if of_text else (0,)),
        ((tokens, gradient.shape[2]) if of_tokens else (0,)),
    )
    return tuple(gradient.new_empty(shape) for shape in shapes)


def _remember(ctx, inputs, output):
    token_ids, rows, text_table, token_table, weight, _, ctx.backend = inputs
    ctx.words, ctx.tokens = len(text_table), len(token_table)
    ctx.factored = weight is not None
    ctx.save_for_backward(token_ids, rows, *((token_table, weight) if ctx.factored else ()))


def _differentiate(ctx, gradient):
    token_ids, rows, *factors = ctx.saved_tensors
    _, _, of_text, of_table, of_weight, of_bias, _ = ctx.needs_input_grad
    text, tokens = torch.ops.contrec.gather_tokens_backward(
        gradient, token_ids, rows, ctx.words, ctx.tokens,
        of_text, of_table or of_weight or of_bias, ctx.backend,
    )  # fmt: skip
    text = text if of_text else None
    if not ctx.factored:
        return None, None, text, tokens if of_table else None, None, None, None
    # What belongs to the tokens themselves, by layer: [K, R / K, H].
    hidden, weight = factors
    tokens = tokens.unflatten(0, (-1, len(weight))).transpose(0, 1)
    hidden = hidden.unflatten(0, (-1, len(weight))).transpose(0, 1)
    return (
        None,
        None,
        text,
        (tokens @ weight).transpose(0, 1).flatten(0, 1) if of_table else None,
        tokens.mT @ hidden if of_weight else None,
        tokens.sum(1) if of_bias else None,
        None,
    )


_registered.register_autograd(_differentiate, setup_context=_remember)


def gather_tokens(
    token_ids: Tensor,
    rows: Tensor,
    text_table: Tensor,
    token_table: Tensor | FactoredTable,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Input embeddings of a sequence that mixes text and continuous tokens.

    Differentiable in both tables; gradients of their rows are summed in the order of the
    positions, whatever the threads. Bitwise independent of the batch, except for factored tables
    in the reference, whose products are the library's.

    Args:
        token_ids: [B, L] int64 or int32 text token ids; ignored where `rows` is not -1.
        rows: [B, L] of the same dtype: row of `token_table`, or -1 for text.
        text_table: [V, H] the language model's input embeddings.
        token_table: [R, H] continuous tokens of items and users, in the same dtype, or a
            FactoredTable of them.
        out: [B, L, H] to write to instead of allocating, its last stride 1; only without
            gradients.

    Returns:
        [B, L, H] in the tables' dtype.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or backend, in one line; an `out` whose
        numbers share memory with each other or with an argument. An id outside its table raises
        IndexError on the CPU, before anything is written, and is not checked on a GPU.
    """
    check("token_ids", token_ids, ("B", "L"), INTEGERS)
    check("rows", rows, tuple(token_ids.shape), (token_ids.dtype,), like=token_ids)
    check("text_table", text_table, ("V", "H"), FLOATS, like=token_ids)
    width, dtype, factors = text_table.shape[1], (text_table.dtype,), (None, None)
    if isinstance(token_table, FactoredTable):
        token_table, *factors = token_table
        weight, bias = factors
        check("token_table.weight", weight, ("K", width, "F"), dtype, like=token_ids)
        check("token_table.bias", bias, (weight.shape[0], width), dtype, like=token_ids)
        check("token_table.hidden", token_table, ("R", weight.shape[2]), dtype, like=token_ids)
        if len(weight) == 0 or len(token_table) % len(weight):
            raise ValueError(
                f"token_table.hidden: expected rows for each of {len(weight)} layers, "
                f"got {len(token_table)}"
            )
    else:
        check("token_table", token_table, ("R", width), dtype, like=token_ids)
    tables = (text_table, token_table, *factors)
    differentiable = torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in tables
    )
    if out is None:
        arguments = (token_ids, rows, *tables)
        if torch.compiler.is_compiling():
            return torch.ops.contrec.gather_tokens(*arguments, backend)
        if transformed():
            arguments = (*arguments, None)
            return resolve("gather_tokens", backend, *arguments)(*arguments)
        if differentiable:
            return torch.ops.contrec.gather_tokens(*arguments, backend)
        out = text_table.new_empty(*token_ids.shape, width)
    else:
        check("out", out, (*token_ids.shape, width), dtype, like=token_ids)
        _check_memory(out, (token_ids, rows, *tables))
        if differentiable:
            raise ValueError("out: expected no gradients with out=, got a table that requires them")
        if torch.compiler.is_compiling():
            torch.ops.contrec.gather_tokens_out(token_ids, rows, *tables, out, backend)
            return out
    arguments = (token_ids, rows, *tables, out)
    resolve("gather_tokens", backend, *arguments)(*arguments)
    return out


def _check_memory(out: Tensor, arguments: tuple[Tensor | None, ...]) -> None:
    """Refuse an `out` that cannot be written row by row in any order."""
    if out.requires_grad:
        raise ValueError("out: expected no gradients with out=, got one that requires them")
    if 0 in out.shape:
        return
    if out.shape[2] > 1 and out.stride(2) != 1:
        raise ValueError(f"out: expected 1 as the last stride, got {out.stride(2)}")
    reach = 1
    for stride, size in sorted(zip(out.stride(), out.shape)):
        if size > 1 and stride < reach:
            raise ValueError(
                f"out: expected numbers of its own at every place, got strides {out.stride()}"
            )
        reach += stride * (size - 1)
    if torch.compiler.is_compiling() or out.is_meta:  # no addresses
        return
    first, last = _span(out)
    for other in arguments:
        if other is not None and other.numel():
            start, stop = _span(other)
            if first < stop and start < last:
                raise ValueError("out: expected memory of its own, got an argument's")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor that is not empty, and the first one behind it."""
    reach = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape))
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
