"""What the tests of `gather_tokens` share: the contract as a loop, inputs, and the tolerance."""

import torch
from ops_cases import relative_error

from contrec_fast import ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def loop(token_ids, rows, text_table, token_table):
    """The contract, position by position."""
    result = torch.full((*token_ids.shape, text_table.shape[1]), torch.nan, dtype=text_table.dtype)
    for b in range(token_ids.shape[0]):
        for position in range(token_ids.shape[1]):
            row = int(rows[b, position])
            source = text_table[token_ids[b, position]] if row == -1 else token_table[row]
            result[b, position] = source
    return result


def factored_loop(token_ids, rows, text_table, table):
    """The same of a factored table."""
    tokens = [
        table.weight[row % len(table.weight)] @ hidden + table.bias[row % len(table.weight)]
        for row, hidden in enumerate(table.hidden)
    ]
    tokens = torch.stack(tokens) if tokens else text_table[:0]
    return loop(token_ids, rows, text_table, tokens)


def make_inputs(batch, length, width, words=11, tokens=7, share=0.5, dtype=torch.float32):
    token_ids = torch.randint(0, words, (batch, length))
    rows = torch.full((batch, length), -1)
    if tokens:
        continuous = torch.rand(batch, length) < share
        rows = torch.where(continuous, torch.randint(0, tokens, (batch, length)), rows)
        # What stands in the ids of continuous positions must not matter.
        token_ids = torch.where(continuous, torch.randint(-5, 2 * words, rows.shape), token_ids)
    tables = (torch.randn(words, width).to(dtype), torch.randn(tokens, width).to(dtype))
    return token_ids, rows, *tables


def make_factored(
    batch, length, width, inner=33, layers=2, items=4, dtype=torch.float32, share=0.5
):
    """Inputs with a factored table of `items` rows for each layer."""
    count = items * layers
    token_ids, rows, text, _ = make_inputs(batch, length, width, tokens=count, share=share)
    shapes = (count, inner), (layers, width, inner), (layers, width)
    table = ops.FactoredTable(*(torch.randn(shape).to(dtype) for shape in shapes))
    return token_ids, rows, text.to(dtype), table


def assert_as_good(result, plain, exact, dtype):
    """At most twice plain PyTorch's relative error in this precision, and a few of its units."""
    if exact.numel() and exact.any():
        limit = 2 * relative_error(plain, exact) + 4 * torch.finfo(dtype).eps
        assert relative_error(result, exact) <= limit
