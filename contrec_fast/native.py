"""The optional C++ extension ``contrec_fast._C``: whether it is there, and its CPU kernels.

The package works without it; an installation without a C++ compiler leaves it out.
"""

from pathlib import Path

# Before the extension: on Linux it then shares the OpenMP threads that torch brings.
import torch
from torch import Tensor

# The latest of each operation: what an outdated build lacks.
_KERNELS = ("philox_instruction_sets", "cosine_topk", "sample", "gather_tokens", "cross_entropy")
_KERNELS += ("denoise_hidden", "choose_tokens")

try:
    import contrec_fast._C as _C
except ModuleNotFoundError as error:
    _C = None
    _missing = (
        f"{error}: not built in {Path(__file__).parent}; "
        "install contrec-fast where a C++17 compiler is found"
    )
except ImportError as error:  # built, but it cannot be loaded: another Python, a missing library
    _C = None
    _missing = str(error)
else:
    _missing = None
    if _lacking := [name for name in _KERNELS if not hasattr(_C, name)]:
        _missing = (
            f"{_C.__file__}: expected {_lacking[0]}, got a build of older sources; "
            "install contrec-fast again"
        )
        _C = None


def build_info() -> dict | None:
    """What the extension was built with and what it finds on this machine; None without it.

    Keys: ``compiler`` (str, name and version), ``openmp`` (bool), ``openmp_max_threads`` (int),
    ``cpu_features`` (dict of bool: instruction sets that the processor and the operating system
    support).
    """
    return None if _C is None else _C.build_info()


def why_missing() -> str | None:
    """One line: why the extension could not be imported; None where it was."""
    return None if _missing is None else " ".join(_missing.split())


def serves(tensor: Tensor) -> bool:
    """Whether the kernels below can take this tensor: extension there, on the CPU, run eagerly."""
    return _C is not None and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def empty(*shape: int) -> Tensor:
    """Memory that kernels write float32 to, whatever PyTorch's default dtype and device."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def philox_normal(seed: Tensor, user_ids: Tensor, dim: int, step: int, draw: int = 0) -> Tensor:
    """`contrec_fast.ops.noise.philox_normal` in C++, for tensors that `serves` accepts.

    The integers are identical; the normals, computed in float32, are within 4 units in the last
    place of the reference's (97 in 100 within one), and zeros are the same.

    Args:
        seed: int64 scalar tensor. user_ids: [B] int64. dim: width D. step, draw: below 65,536.

    Returns:
        [B, D] float32; the same bits whatever the batch, the number of threads and the processor.
    """
    user_ids = user_ids.contiguous()
    out = empty(len(user_ids), dim)
    _C.philox_normal(
        seed=int(seed) % 2**64,
        user_ids=user_ids.data_ptr(),
        batch=len(user_ids),
        dim=dim,
        column=step + 65536 * draw,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


def topk_instruction_sets() -> list[str]:
    """Values of `isa` below that this processor has, best first; none without the extension."""
    return [] if _C is None else _C.topk_instruction_sets()


def topk_statistics() -> dict[str, int]:
    """How the latest `cosine_topk` of this process went; empty before the first.

    Keys: ``kept`` (times the scan kept an item), ``rescored`` (exact scores computed), ``crowded``
    (times that bounds alone could not thin out the kept items of a query, so that they were
    scored exactly before the scan's end). Which items are kept depends on the threads' timing.
    """
    return dict(_topk_statistics)


_topk_statistics: dict[str, int] = {}
_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # order of Dtype in C++


def cosine_topk(
    queries: Tensor,
    vectors: Tensor,
    norms: Tensor,
    scan: Tensor,
    errors: Tensor,
    groups: Tensor,
    eligible: Tensor,
    k: int,
    matched: Tensor | None,
    pi: float,
    seen_offsets: Tensor | None,
    seen_ids: Tensor | None,
    seen_rows: Tensor | None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The operation `cosine_topk` in C++, for checked tensors that `serves` accepts.

    The lists are the reference's, bit for bit, whatever the threads and the instruction set.

    Args:
        isa: one of `topk_instruction_sets()`, the best if not given.

    Raises:
        ValueError: an instruction set this processor lacks. IndexError: a row beyond the seen
        lists.
    """
    catalog = [part.contiguous() for part in (vectors, norms, scan, errors, groups, eligible)]
    vectors, norms, scan, errors, groups, eligible = catalog
    queries = queries.contiguous()
    matched = None if matched is None else matched.contiguous()
    seen_rows = None if seen_rows is None else seen_rows.long().contiguous()
    scores = empty(len(queries), k)
    ids = torch.empty(len(queries), k, dtype=torch.int64, device="cpu")

    statistics = _C.cosine_topk(
        queries=queries.data_ptr(),
        query_dtype=_DTYPES.index(queries.dtype),
        batch=len(queries),
        vectors=vectors.data_ptr(),
        vector_dtype=_DTYPES.index(vectors.dtype),
        rows=vectors.shape[0],
        dim=vectors.shape[1],
        norms=norms.data_ptr(),
        scan=scan.data_ptr(),
        errors=errors.data_ptr(),
        groups=groups.data_ptr(),
        eligible=eligible.data_ptr(),
        k=k,
        matched=_address(matched),
        matched_groups=0 if matched is None else matched.shape[1],
        pi=pi,
        seen_offsets=_address(seen_offsets),
        seen_users=0 if seen_offsets is None else len(seen_offsets) - 1,
        seen_ids=_address(seen_ids),
        seen_rows=_address(seen_rows),
        scores=scores.data_ptr(),
        ids=ids.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    _topk_statistics.update(statistics)
    return scores, ids


def sampler_instruction_sets() -> list[str]:
    """Values of `isa` below that this processor has, best first; none without the extension.

    ``avx512_bf16`` multiplies in bfloat16 and sums in float32, the others do all in float32.
    """
    return [] if _C is None else _C.sampler_instruction_sets()


def sample(
    condition: Tensor,
    seed: Tensor,
    user_ids: Tensor,
    samples: int,
    noise: Tensor | None,
    round_noise: bool,
    coefficients: Tensor,
    tensors: list[Tensor | None],
    **settings,
) -> Tensor:
    """A sampler's chain in C++ (csrc/cpu/sampler.h).

    Args:
        condition: [B, D] float32. seed: int64 scalar. user_ids: [B] int64. noise: float32
        [S, entries, B, D] or None. coefficients: [steps, 6] float32. tensors: the network's, in
        the order and layout of csrc/cpu/sampler.h. settings: network, dim, hidden, depth, noises,
        multistep, guidance and isa, as `contrec_fast._C.sample` takes them.

    Returns:
        [S, B, D] float32; a row's bits do not depend on the others or on the number of threads.
    """
    condition, user_ids = condition.contiguous(), user_ids.contiguous()
    noise = None if noise is None else noise.contiguous()
    out = empty(samples, *condition.shape)
    _C.sample(
        tensors=[_address(tensor) for tensor in tensors],
        steps=len(coefficients),
        coefficients=coefficients.data_ptr(),
        batch=len(condition),
        samples=samples,
        condition=condition.data_ptr(),
        noise=_address(noise),
        noise_entries=0 if noise is None else noise.shape[1],
        seed=int(seed) % 2**64,
        user_ids=user_ids.data_ptr(),
        round_noise=round_noise,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
        **settings,
    )
    return out


def gather_instruction_sets() -> list[str]:
    """Values of `isa` below that this processor has, best first; none without the extension.

    ``avx512_bf16`` multiplies bfloat16 pairs with float32 sums, the others do all in float32.
    """
    return [] if _C is None else _C.gather_instruction_sets()


def gather_tokens(
    token_ids: Tensor,
    rows: Tensor,
    text_table: Tensor,
    token_table: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    isa: str | None = None,
) -> None:
    """The operation `gather_tokens` in C++, for checked tensors that `serves` accepts.

    Args:
        weight, bias: of a factored table, which is float32 or bfloat16, else None.
        out: [B, L, H] to write to, its rows contiguous. isa: one of `gather_instruction_sets()`,
        the best if not given; whole tables are copied by the same instructions everywhere.

    Raises:
        IndexError: an id outside its table, before anything is written.
    """
    size, width = out.element_size(), out.shape[2]
    token_ids, rows = token_ids.long().contiguous(), rows.long().contiguous()
    text_table = text_table if text_table.stride(1) == 1 else text_table.contiguous()
    factored = weight is not None
    if factored or token_table.stride(1) != 1:
        token_table = token_table.contiguous()
    weight, bias = (weight.contiguous(), bias.contiguous()) if factored else (None, None)
    _C.gather_tokens(
        **_positions(token_ids, rows, len(text_table), len(token_table)),
        text_table=text_table.data_ptr(),
        text_stride=text_table.stride(0) * size,
        token_table=token_table.data_ptr(),
        token_stride=token_table.stride(0) * size,
        width=width,
        element_bytes=size,
        out=out.data_ptr(),
        batch_stride=out.stride(0) * size,
        position_stride=out.stride(1) * size,
        weight=_address(weight),
        bias=_address(bias),
        layers=len(weight) if factored else 1,
        inner=token_table.shape[1],
        dtype=_DTYPES.index(out.dtype),
        threads=torch.get_num_threads(),
        isa=isa,
    )


def gather_tokens_backward(
    gradient: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    words: int,
    tokens: int,
    of_text: bool,
    of_tokens: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `gather_tokens` for whole tables of so many rows, None where not asked for.

    Args:
        gradient: [B, L, H].

    Returns:
        [words, H] and [tokens, H] in the dtype of `gradient`; the same bits whatever the threads.
    """
    dtype = gradient.dtype
    if dtype == torch.float16:
        gradient = gradient.float()
    if gradient.stride(2) != 1:
        gradient = gradient.contiguous()
    token_ids, rows = token_ids.long().contiguous(), rows.long().contiguous()
    size, width = gradient.element_size(), gradient.shape[2]
    text, token = (
        gradient.new_zeros(count, width) if asked else None
        for count, asked in ((words, of_text), (tokens, of_tokens))
    )
    _C.gather_tokens_backward(
        **_positions(token_ids, rows, words, tokens),
        gradient=gradient.data_ptr(),
        batch_stride=gradient.stride(0) * size,
        position_stride=gradient.stride(1) * size,
        width=width,
        dtype=_DTYPES.index(gradient.dtype),
        text_gradient=_address(text),
        token_gradient=_address(token),
        threads=torch.get_num_threads(),
    )
    return tuple(None if found is None else found.to(dtype) for found in (text, token))


def _positions(token_ids: Tensor, rows: Tensor, words: int, tokens: int) -> dict[str, int]:
    return {
        "token_ids": token_ids.data_ptr(),
        "rows": rows.data_ptr(),
        "batch": token_ids.shape[0],
        "length": token_ids.shape[1],
        "words": words,
        "tokens": tokens,
    }


def cross_entropy_instruction_sets() -> list[str]:
    """Values of `isa` below that this processor has, best first; none without the extension."""
    return [] if _C is None else _C.cross_entropy_instruction_sets()


def cross_entropy(isa: str | None = None, **arguments) -> None:
    """A pass of `catalog_cross_entropy` in C++ (csrc/cpu/cross_entropy.h).

    Args:
        isa: one of `cross_entropy_instruction_sets()`, the best if not given.
        arguments: as `contrec_fast._C.cross_entropy` takes them, with contiguous tensors or None
        for addresses.

    Raises:
        ValueError: an instruction set this processor lacks. IndexError: a target beyond the
        items, a row beyond the seen lists.
    """
    addresses = {
        name: _address(value) if value is None or isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    _C.cross_entropy(**addresses, threads=torch.get_num_threads(), isa=isa)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def denoise_pass(
    name: str,
    members: list[Tensor | int | None],
    width: int,
    rows: int,
    index: Tensor | None = None,
    guidance: float = 0.0,
    drop: Tensor | None = None,
):
    """One of the passes of csrc/cpu/denoise.h: "hidden", "norm", "residual", "silu_gradient" or
    "sum_by_index".

    Args:
        members: those of the pass's structure in order, the first one a tensor of the pass's dtype,
        float32 or bfloat16; all without gaps. width, rows, index, guidance, drop: of `Batch`.
    """
    getattr(_C, f"denoise_{name}")(
        [member if isinstance(member, int) else _address(member) for member in members],
        bfloat16=members[0].dtype == torch.bfloat16,
        rows=rows,
        width=width,
        index=_address(index),
        guidance=guidance,
        dropped=_address(drop),
        threads=torch.get_num_threads(),
    )
