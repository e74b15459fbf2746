"""Attention of packed tokens by torch's variable-length kernel, on GPUs in 16 bits.

FlashAttention (arXiv 2307.08691) goes over sequences that follow one another: one call a layer, no
mask and no padding, where `packed.Block`s take several calls each. The keys and values that are
looked at are gathered from the cache first: paged caches would need FlashAttention 3.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from contrec_fast.ops.transfer import upload


class Runs(NamedTuple):
    """N stretches of packed tokens, each at consecutive positions of one sequence.

    rows, places: [S] int64 of the cache, what the runs look at, one run after another. queries,
    keys: [N + 1] int32 where each run begins among T tokens and among S places. longest: (of the
    runs, of what they look at).
    """

    rows: Tensor
    places: Tensor
    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]

    @classmethod
    def of(cls, rows: np.ndarray, positions: np.ndarray, device) -> "Runs":
        """The runs of T tokens at rows [T] of a cache and positions [T] of their sequences."""
        ends = np.append((np.diff(rows) != 0) | (np.diff(positions) != 1), True).nonzero()[0]
        lengths, reach = np.diff(ends, prepend=-1), positions[ends] + 1
        keys = np.append(0, reach.cumsum())
        places = np.arange(keys[-1]) - np.repeat(keys[:-1], reach)
        queries = np.append(0, lengths.cumsum())
        found = np.repeat(rows[ends], reach), places, np.int32(queries), np.int32(keys)
        tensors = (upload(torch.from_numpy(x), device) for x in found)
        return cls(*tensors, (int(lengths.max()), int(reach.max())))


def wanted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has such a kernel; which shapes it takes shows when it is tried."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def attend(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float | None) -> Tensor:
    """[T, heads, d] of queries [T, heads, d] over keys and values [rows, heads, places, d]."""
    key, value = (x.transpose(1, 2)[runs.rows, runs.places] for x in (key, value))
    options = {"enable_gqa": True} if key.shape[1] < query.shape[1] else {}  # from torch 2.12 on
    return varlen_attn(
        query, key, value, runs.queries, runs.keys, *runs.longest,
        scale=scale, window_size=(-1, 0), **options,
    )  # fmt: skip
