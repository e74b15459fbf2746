"""`gather_tokens`: text and continuous tokens side by side as input embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor

from contrec_fast.ops.checks import FLOATS, INTEGERS, check
from contrec_fast.ops.dispatch import implements, resolve


@implements("gather_tokens")
def _gather_tokens(
    token_ids: Tensor, rows: Tensor, text_table: Tensor, token_table: Tensor
) -> Tensor:
    continuous = rows != -1
    # Without continuous tokens no row exists: let the look-up refuse it as any other id.
    unused = 0 if len(token_table) else len(text_table)
    text = F.embedding(token_ids.masked_fill(continuous, unused), text_table)
    if len(token_table) == 0:
        return text
    tokens = F.embedding(rows.masked_fill(~continuous, 0), token_table)
    return torch.where(continuous[..., None], tokens, text)


def _registered(token_ids, rows, text_table, token_table, backend):
    arguments = (token_ids, rows, text_table, token_table)
    return resolve("gather_tokens", backend, *arguments)(*arguments)


_library = torch.library.Library("contrec", "FRAGMENT")
_library.define(
    "gather_tokens(Tensor token_ids, Tensor rows, Tensor text_table, Tensor token_table,"
    " str backend) -> Tensor"
)
_library.impl("gather_tokens", _registered, "CompositeImplicitAutograd")


def gather_tokens(
    token_ids: Tensor,
    rows: Tensor,
    text_table: Tensor,
    token_table: Tensor,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Input embeddings of a sequence that mixes text and continuous tokens.

    Differentiable in both tables. Bitwise independent of the batch.

    Args:
        token_ids: [B, L] int64 or int32 text token ids; ignored where `rows` is not -1.
        rows: [B, L] of the same dtype: row of `token_table`, or -1 for text.
        text_table: [V, H] the language model's input embeddings.
        token_table: [R, H] continuous tokens of items and users, in the same dtype.
        out: [B, L, H] to write to instead of allocating; only without gradients.

    Returns:
        [B, L, H] in the tables' dtype.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or backend, in one line. An id
        outside its table raises IndexError on the CPU and is not checked on a GPU.
    """
    check("token_ids", token_ids, ("B", "L"), INTEGERS)
    check("rows", rows, tuple(token_ids.shape), (token_ids.dtype,), like=token_ids)
    check("text_table", text_table, ("V", "H"), FLOATS, like=token_ids)
    width = text_table.shape[1]
    check("token_table", token_table, ("R", width), (text_table.dtype,), like=token_ids)
    arguments = (token_ids, rows, text_table, token_table)
    if torch.compiler.is_compiling():
        result = torch.ops.contrec.gather_tokens(*arguments, backend)
    else:
        result = resolve("gather_tokens", backend, *arguments)(*arguments)
    if out is None:
        return result
    check("out", out, tuple(result.shape), (result.dtype,), like=token_ids)
    if result.requires_grad:
        raise ValueError("out: expected no gradients with out=, got a table that requires them")
    return out.copy_(result)
