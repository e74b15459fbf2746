"""What a decoder layer does between its matrix products, in C++ (csrc/cpu/layers.h).

All tensors are float32 or int64, on the CPU and, but for positions and rows, without gaps. Callers
see to that, and that positions and rows lie within the cache: nothing is checked here.
"""

import torch
from torch import Tensor

from contrec_fast.native import _C, _address


def layer_instruction_sets() -> list[str]:
    """Values of `isa` below that this processor has, best first; none without the extension."""
    return [] if _C is None else _C.layer_instruction_sets()


def layer_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, out: Tensor, isa: str | None = None
) -> Tensor:
    """Add to x [T, H] in place; out becomes its RMS norm (Zhang and Sennrich, arXiv 1910.07467)."""
    _C.layer_norm(
        x.data_ptr(), _address(added), weight.data_ptr(), eps, out.data_ptr(), *x.shape,
        torch.get_num_threads(), isa,
    )  # fmt: skip
    return out


def layer_rotary(
    queries: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    turns: tuple[Tensor, Tensor],
    positions: Tensor,
    rows: Tensor,
    stored: tuple[Tensor, Tensor],
    isa: str | None = None,
) -> None:
    """Norm and rotate queries in place; store normed and rotated keys, and values.

    Args:
        queries: [T, heads * d]. keys, values: [T, key heads * d], both or neither. norms: weights
        [d] for queries and keys. turns: cosines and sines [places, d]. positions, rows: [T].
        stored: keys and values [rows, key heads, places, d].
    """
    key_heads, places, dim = stored[0].shape[1:]
    positions, rows = positions.contiguous(), rows.contiguous()
    _C.layer_rotary(
        _address(queries), _address(keys), _address(values), *map(_address, norms), eps,
        turns[0].data_ptr(), turns[1].data_ptr(), positions.data_ptr(), rows.data_ptr(),
        stored[0].data_ptr(), stored[1].data_ptr(), len(positions),
        0 if queries is None else queries.shape[1] // dim, key_heads, dim, places,
        torch.get_num_threads(), isa,
    )  # fmt: skip


def layer_attention(
    queries: Tensor,
    stored: tuple[Tensor, Tensor],
    positions: Tensor,
    rows: Tensor,
    starts: Tensor,
    scale: float,
    isa: str | None = None,
) -> Tensor:
    """Causal attention [T, heads * d] of packed queries over rows of the cache.

    Args:
        starts: [B + 1] the first token of each sequence, and T. The rest: see `layer_rotary`.
    """
    key_heads, places, dim = stored[0].shape[1:]
    positions, rows, out = positions.contiguous(), rows.contiguous(), torch.empty_like(queries)
    _C.layer_attention(
        queries.data_ptr(), stored[0].data_ptr(), stored[1].data_ptr(), positions.data_ptr(),
        rows.data_ptr(), starts.data_ptr(), out.data_ptr(), scale, len(starts) - 1,
        queries.shape[1] // dim, key_heads, dim, places, torch.get_num_threads(), isa,
    )  # fmt: skip
    return out


def layer_gate(gate: Tensor, up: Tensor, isa: str | None = None) -> Tensor:
    """SiLU(gate) * up of [T, F], in place (Shazeer, arXiv 2002.05202)."""
    _C.layer_gate(gate.data_ptr(), up.data_ptr(), *gate.shape, torch.get_num_threads(), isa)
    return gate


def choose_tokens(hidden: Tensor, weight: Tensor, isa: str | None = None) -> Tensor:
    """Argmax [T] of hidden [T, H] @ weight [V, H].T, the first one where several are largest."""
    out = torch.empty(len(hidden), dtype=torch.int64)
    _C.choose_tokens(
        hidden.data_ptr(), weight.data_ptr(), out.data_ptr(), len(hidden), *weight.shape,
        torch.get_num_threads(), isa,
    )  # fmt: skip
    return out
