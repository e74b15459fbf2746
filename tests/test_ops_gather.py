"""`gather_tokens` against a loop over positions: values, gradients, `out=`, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import refused

from contrec_fast import ops

BACKENDS = ops.backends()["gather_tokens"]
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_against_a_loop(dtype, integers, backend):
    for batch, length, width in [(1, 1, 1), (3, 5, 127), (5, 129, 3), (2, 0, 4), (0, 3, 4)]:
        token_ids, rows, *tables = make_inputs(batch, length, width, dtype=dtype)
        result = ops.gather_tokens(
            token_ids.to(integers), rows.to(integers), *tables, backend=backend
        )
        assert result.dtype == dtype
        assert torch.equal(result, loop(token_ids, rows, *tables))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_text_alone_and_tokens_alone(share, backend):
    inputs = make_inputs(4, 9, 6, share=share)
    assert torch.equal(ops.gather_tokens(*inputs, backend=backend), loop(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_continuous_tokens(backend):
    for length in (0, 6):
        inputs = make_inputs(3, length, 4, tokens=0)
        assert torch.equal(ops.gather_tokens(*inputs, backend=backend), loop(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_small_case(data, backend):
    batch, length, width, tokens = (data.draw(st.integers(0, 6)) for _ in range(4))
    words = data.draw(st.integers(1, 5))
    rows = st.lists(st.integers(-1, tokens - 1), min_size=length, max_size=length)
    ids = st.lists(st.integers(0, words - 1), min_size=length, max_size=length)
    token_ids, rows = (
        torch.tensor(data.draw(st.lists(each, min_size=batch, max_size=batch)), dtype=torch.int64)
        .reshape(batch, length)
        for each in (ids, rows)
    )  # fmt: skip
    inputs = token_ids, rows, torch.randn(words, width), torch.randn(tokens, width)
    assert torch.equal(ops.gather_tokens(*inputs, backend=backend), loop(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_independent_of_the_batch(backend):
    token_ids, rows, *tables = make_inputs(129, 17, 33)
    full = ops.gather_tokens(token_ids, rows, *tables, backend=backend)
    for size in (1, 3, 127):
        some = torch.randperm(129)[:size]
        part = ops.gather_tokens(token_ids[some], rows[some], *tables, backend=backend)
        assert torch.equal(part, full[some])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    token_ids, rows, text, tokens = make_inputs(7, 12, 10)
    expected = loop(token_ids, rows, text, tokens)[:, ::2]
    text, tokens = (table.T.contiguous().T for table in (text, tokens))
    found = ops.gather_tokens(token_ids[:, ::2], rows[:, ::2], text, tokens, backend=backend)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [7, 0])
def test_gradients(tokens, backend):
    token_ids, rows, *tables = make_inputs(3, 8, 3, tokens=tokens, dtype=torch.float64)
    tables = [table.requires_grad_() for table in tables]

    def gather(*tables):
        return ops.gather_tokens(token_ids, rows, *tables, backend=backend)

    if tokens:
        assert torch.autograd.gradcheck(gather, tables)
    # A row's gradient is the sum over the positions that show it; the others' is zero.
    outward = torch.randn(3, 8, 3, dtype=torch.float64)
    gather(*tables).backward(outward)
    expected = [torch.zeros_like(table) for table in tables]
    for b in range(3):
        for position in range(8):
            row = int(rows[b, position])
            place = expected[0][token_ids[b, position]] if row == -1 else expected[1][row]
            place += outward[b, position]
    torch.testing.assert_close(tables[0].grad, expected[0], rtol=1e-12, atol=1e-12)
    if tokens:
        torch.testing.assert_close(tables[1].grad, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_rows_do_not_leak(backend):
    """Not a number in a row that no position shows stays where it is, gradients included."""
    token_ids, rows = torch.tensor([[1, 2, 3]]), torch.tensor([[-1, 1, 2]])
    text, tokens = torch.randn(4, 5), torch.randn(4, 5)
    text[0], text[2:], tokens[0], tokens[3] = (torch.nan,) * 4
    text.requires_grad_(), tokens.requires_grad_()
    result = ops.gather_tokens(token_ids, rows, text, tokens, backend=backend)
    assert result.isfinite().all()
    result.sum().backward()
    assert text.grad.isfinite().all() and tokens.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_out(backend):
    for batch, length in [(3, 5), (0, 5), (3, 0)]:
        inputs = make_inputs(batch, length, 7)
        out = torch.full((batch, length, 7), torch.nan)
        result = ops.gather_tokens(*inputs, out=out, backend=backend)
        assert result is out and torch.equal(out, loop(*inputs))
    big = torch.full((3, 10, 7), torch.nan)  # a strided part of a buffer
    inputs = make_inputs(3, 5, 7)
    ops.gather_tokens(*inputs, out=big[:, ::2], backend=backend)
    assert torch.equal(big[:, ::2], loop(*inputs)) and big[:, 1::2].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_outside_the_tables(backend):
    """On the CPU an id that no table holds is an IndexError."""
    zero, text, tokens = torch.zeros(1, 2, dtype=torch.int64), torch.randn(4, 3), torch.randn(5, 3)
    for token_ids, rows, table in [
        (zero + 4, zero - 1, tokens),
        (zero - 1, zero - 1, tokens),
        (zero, zero + 5, tokens),
        (zero, zero - 2, tokens),
        (zero, zero, tokens[:0]),
        (zero, zero - 2, tokens[:0]),
    ]:
        with pytest.raises(IndexError):
            ops.gather_tokens(token_ids, rows, text, table, backend=backend)


IDS = torch.zeros(2, 3, dtype=torch.int64)
TEXT, TOKENS = torch.randn(4, 5), torch.randn(6, 5)
BAD_CALLS = [
    (TypeError, "token_ids", {"token_ids": [[0]]}),
    (TypeError, "token_ids", {"token_ids": IDS.float()}),
    (ValueError, "token_ids", {"token_ids": IDS[0]}),
    (TypeError, "rows", {"rows": IDS.int()}),
    (ValueError, "rows", {"rows": IDS[:1]}),
    (ValueError, "rows", {"rows": IDS[:, :2]}),
    (ValueError, "rows", {"rows": torch.zeros(2, 3, dtype=torch.int64, device="meta")}),
    (TypeError, "text_table", {"text_table": TEXT.long()}),
    (ValueError, "text_table", {"text_table": TEXT[0]}),
    (TypeError, "token_table", {"token_table": TOKENS.double()}),
    (ValueError, "token_table", {"token_table": TOKENS[:, :4]}),
    (ValueError, "out", {"out": torch.empty(2, 3, 4)}),
    (TypeError, "out", {"out": torch.empty(2, 3, 5, dtype=torch.float64)}),
    (TypeError, "out", {"out": 1}),
    (ValueError, "out", {"out": torch.empty(2, 3, 5), "text_table": TEXT.clone().requires_grad_()}),
    (ValueError, "backend", {"backend": "fastest"}),
]


@pytest.mark.parametrize("error, name, arguments", BAD_CALLS)
def test_bad_calls(error, name, arguments):
    good = {"token_ids": IDS, "rows": IDS, "text_table": TEXT, "token_table": TOKENS}
    with refused(error, name):
        ops.gather_tokens(**(good | arguments))
