"""Text and continuous tokens side by side as input embeddings, forward and backward.

Forward, of P = B L positions: `copy_rows` moves whole rows; where the token table is factored,
`multiply_rows` makes the rows of continuous positions, sorted by layer, from their hidden rows.
Nothing waits for the GPU: how many positions there are of a layer is read on the device.

Backward: positions are sorted by the row that they show, stably, and `sum_chunks` adds up each
row's positions in their order, at most CHUNK at a time; `sum_partials` does what is left of rows
that more positions show. No atomics: the same bits in every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # as the kernels were imported
CHUNK = 64  # positions added up by one program


class Tiles(NamedTuple):
    """How products are cut: tiles of rows x columns x depth."""

    rows: int
    columns: int
    depth: int


def tiles_for(dtype: torch.dtype) -> Tiles:
    """float32 has no tensor cores at full precision, and its products take more registers."""
    return Tiles(32, 64, 32) if dtype == torch.float32 else Tiles(64, 128, 64)


@triton.jit
def place_of(out, position, length, batch_stride, position_stride):
    """Pointers to the rows of `out` [B, L, H] that belong to positions."""
    batch = (position // length).to(tl.int64)
    return out + batch * batch_stride + (position % length).to(tl.int64) * position_stride


@triton.jit
def copy_rows(
    token_ids, rows, text, tokens, out, positions, length, batch_stride, position_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """Rows of text [V, WIDTH] and tokens [R, WIDTH]; of text only, if FACTORED."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = position < positions
    row = tl.load(rows + position, mask=inside, other=-1).to(tl.int64)
    is_text = row == -1
    word = tl.load(token_ids + position, mask=inside & is_text, other=0).to(tl.int64)
    if FACTORED:
        inside &= is_text
    place = place_of(out, position, length, batch_stride, position_stride)
    for first in tl.static_range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        wanted = inside[:, None]
        if first + COLUMNS > WIDTH:
            wanted &= column < WIDTH
        # Two loads and no choice of pointers, which triton 3.9 would load element by element.
        of_text = wanted & is_text[:, None]
        values = tl.load(text + word[:, None] * WIDTH + column, mask=of_text, other=0)
        if not FACTORED:
            of_tokens = wanted & (row != -1)[:, None]
            found = tl.load(tokens + row[:, None] * WIDTH + column, mask=of_tokens, other=0)
            values = tl.where(is_text[:, None], values, found)
        tl.store(place[:, None] + column, values, mask=wanted)


@triton.jit
def multiply_rows(
    order, starts, rows, hidden, weight, bias, out, length, batch_stride, position_stride,
    LAYERS: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """weight[layer] @ hidden[row] + bias[layer] for the positions order[starts[layer] : ...].

    hidden [R, INNER], weight [LAYERS, WIDTH, INNER], bias [LAYERS, WIDTH]. Each number is a sum
    in an order of its own, wherever its row is in a tile.
    """
    column_tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    for layer in range(LAYERS):
        begin = tl.load(starts + layer)
        count = tl.load(starts + layer + 1) - begin
        for tile in range(
            tl.program_id(0), tl.cdiv(count, ROWS) * column_tiles, tl.num_programs(0)
        ):
            slot = tile // column_tiles * ROWS + tl.arange(0, ROWS)
            column = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
            inside, real = slot < count, tl.minimum(column, WIDTH - 1)
            position = tl.load(order + begin + slot, mask=inside, other=0)
            row = tl.load(rows + position, mask=inside, other=0).to(tl.int64)
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first in range(0, INNER, DEPTH):
                inner = first + tl.arange(0, DEPTH)[None, :]
                left, right = hidden + row[:, None] * INNER + inner, weight + inner
                right += (layer * WIDTH + real[:, None]) * INNER
                if INNER % DEPTH == 0:
                    a, b = tl.load(left), tl.load(right)
                else:
                    a = tl.load(left, mask=inner < INNER, other=0.0)
                    b = tl.load(right, mask=inner < INNER, other=0.0)
                sums = tl.dot(a, b.T, sums, input_precision="ieee")
            sums += tl.load(bias + layer * WIDTH + real).to(tl.float32)[None, :]
            place = place_of(out, position, length, batch_stride, position_stride)
            tl.store(
                place[:, None] + column[None, :],
                sums.to(out.dtype.element_ty),
                mask=inside[:, None] & (column < WIDTH)[None, :],
            )


@triton.jit
def row_of(text, tokens, key, words, WIDTH: tl.constexpr):
    """Pointer to the row of one of the two gradients [words, WIDTH] and [any, WIDTH]."""
    return tl.where(key < words, text + key * WIDTH, tokens + (key - words) * WIDTH)


@triton.jit
def sum_chunks(
    gradient, order, keys, offsets, partial, text, tokens, positions, words, unwanted,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Programs (sorted slot, COLUMNS): the first CHUNK positions from each CHUNK-th of a run on.

    order, keys [P] int64: positions and the rows that they show, those of tokens behind `words`
    of text, sorted by row; from `unwanted` on they count for nothing. offsets [P] int64: how many
    positions before show the same. A run of one chunk is written to its row, the chunks of a
    longer one to partial [2 P / CHUNK, WIDTH].
    """
    slot = tl.program_id(0).to(tl.int64)
    key, offset = tl.load(keys + slot), tl.load(offsets + slot)
    if (offset % CHUNK == 0) & (key < unwanted):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        wanted = column < WIDTH
        sums = tl.zeros((COLUMNS,), SUM)
        at = slot
        while at < tl.minimum(slot + CHUNK, positions):
            here = tl.load(keys + at) == key
            position = tl.load(order + at)
            row = tl.load(gradient + position * WIDTH + column, mask=wanted & here, other=0.0)
            sums += row.to(SUM)
            at = tl.where(here, at + 1, positions)
        after = slot + CHUNK
        more = tl.load(keys + after, mask=after < positions, other=-1) == key
        if (offset > 0) | more:
            # Of a stretch of CHUNK slots, one chunk at most begins a long run, and one goes on.
            place = 2 * (slot // CHUNK) + (offset == 0).to(tl.int64)
            tl.store(partial + place * WIDTH + column, sums, mask=wanted)
        else:
            row = row_of(text, tokens, key, words, WIDTH)
            tl.store(row + column, sums.to(text.dtype.element_ty), mask=wanted)


@triton.jit
def sum_partials(
    keys, offsets, partial, text, tokens, positions, words, unwanted,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Programs (stretch of CHUNK slots, COLUMNS): the run of several chunks that begins there."""
    slots = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    known = slots < positions
    shown = tl.load(keys + slots, mask=known, other=unwanted)
    begins = tl.load(offsets + slots, mask=known, other=1) == 0
    after = tl.load(keys + slots + CHUNK, mask=slots + CHUNK < positions, other=-1)
    slot = tl.max(tl.where(begins & (shown == after) & (shown < unwanted), slots, -1), axis=0)
    if slot >= 0:
        key = tl.load(keys + slot)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        wanted = column < WIDTH
        first = 2 * (slot // CHUNK) + 1
        sums = tl.load(partial + first * WIDTH + column, mask=wanted, other=0.0)
        at = slot + CHUNK
        while at < positions:
            here = tl.load(keys + at) == key
            place = partial + 2 * (at // CHUNK) * WIDTH + column
            sums += tl.load(place, mask=wanted & here, other=0.0)
            at = tl.where(here, at + CHUNK, positions)
        row = row_of(text, tokens, key, words, WIDTH)
        tl.store(row + column, sums.to(text.dtype.element_ty), mask=wanted)


def gather_tokens(
    token_ids: Tensor,
    rows: Tensor,
    text_table: Tensor,
    token_table: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    tiles: Tiles | None = None,
) -> None:
    """Write [B, L, H] to `out`, whose rows are contiguous; ids are not checked.

    Args:
        token_ids, rows: [B, L] of integers; where rows is -1, the token id counts. text_table:
            [V, H]. token_table: [R, H], or [R, F] with weight [K, H, F] and bias [K, H], row r
            being of layer r % K; then not float64. tiles: how to cut products.
    """
    length, width = out.shape[1:]
    count = token_ids.numel()
    if out.numel() == 0:
        return
    token_ids, rows = token_ids.contiguous(), rows.contiguous()
    text_table, token_table = text_table.contiguous(), token_table.contiguous()
    place = length, *out.stride()[:2]
    with torch.cuda.device_of(out):
        columns = min(triton.next_power_of_2(width), 8192 // out.element_size())
        high = 1 if INTERPRETED is False else 64  # an operation of the interpreter costs much
        copy_rows[(triton.cdiv(count, high),)](
            token_ids, rows, text_table, token_table, out, count, *place,
            WIDTH=width, ROWS=high, COLUMNS=columns, FACTORED=weight is not None,
            num_warps=max(1, min(4, columns * out.element_size() // 512)),
        )  # fmt: skip
        if weight is None:
            return
        layers, _, inner = weight.shape
        layer = torch.where(rows == -1, layers, rows % layers).flatten()
        layer, order = layer.sort(stable=True)
        starts = torch.searchsorted(layer, torch.arange(layers + 1, device=rows.device))
        tiles = tiles or tiles_for(out.dtype)
        depth = max(16, min(tiles.depth, triton.next_power_of_2(inner)))
        multiply_rows[(_programs(out),)](
            order, starts, rows, token_table, weight.contiguous(), bias.contiguous(), out, *place,
            LAYERS=layers, WIDTH=width, INNER=inner,
            ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=depth,
            num_warps=4, num_stages=3,
        )  # fmt: skip


def gather_tokens_backward(
    gradient: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    words: int,
    tokens: int,
    of_text: bool,
    of_tokens: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients [words, H] and [tokens, H] of whole tables from that of the result, [B, L, H].

    None where not asked for. Sums are in float32 (float64 for float64).
    """
    batch, length, width = gradient.shape
    count, device = batch * length, gradient.device
    token_ids, rows = token_ids.long(), rows.long()
    text, token = (
        gradient.new_zeros(rows_of, width) if asked else None
        for rows_of, asked in ((words, of_text), (tokens, of_tokens))
    )
    if count and width and (of_text or of_tokens):
        unwanted = words + tokens
        row = torch.where(
            rows == -1,
            token_ids if of_text else unwanted,
            words + rows if of_tokens else unwanted,
        )
        keys, order = row.flatten().sort(stable=True)
        slot = torch.arange(count, device=device)
        begins = torch.ones_like(keys, dtype=torch.bool)
        begins[1:] = keys[1:] != keys[:-1]
        offsets = slot - torch.where(begins, slot, 0).cummax(0).values
        double = gradient.dtype == torch.float64
        stretches = triton.cdiv(count, CHUNK)
        partial = torch.empty(
            2 * stretches, width, device=device, dtype=torch.float64 if double else torch.float32
        )
        columns = min(triton.next_power_of_2(width), 2048)
        cut = {"WIDTH": width, "COLUMNS": columns, "CHUNK": CHUNK}
        place = (gradient if text is None else text), (gradient if token is None else token)
        with torch.cuda.device_of(gradient):
            sum_chunks[(count, triton.cdiv(width, columns))](
                gradient.contiguous(), order, keys, offsets, partial, *place, count, words,
                unwanted, SUM=tl.float64 if double else tl.float32, **cut,
            )  # fmt: skip
            sum_partials[(stretches, triton.cdiv(width, columns))](
                keys, offsets, partial, *place, count, words, unwanted, **cut
            )
    return text, token


def _programs(tensor: Tensor) -> int:
    """As many as run at once: each takes every so many tiles."""
    if not tensor.is_cuda:
        return 2
    return 2 * torch.cuda.get_device_properties(tensor.device).multi_processor_count
