"""`gather_tokens` against a loop over positions: values, gradients, `out=`, errors."""

import pytest
import torch
from gather_cases import DTYPES, assert_as_good, factored_loop, loop, make_factored, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import needs_extension, refused
from torch.autograd import forward_ad

from contrec_fast import native, ops
from contrec_fast.models.tokenizer import SigmaVAE

BACKENDS = [
    pytest.param(name, marks=needs_extension if name == "cpp" else ())
    for name in ops.backends()["gather_tokens"]
    if name != "triton"  # interpreted, it is slow: test_triton_gather.py
]


def serves(backend, dtype):
    return backend == "reference" or dtype in (torch.float32, torch.bfloat16)


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


FACTORED = [  # batch, length, width, inner, layers, items
    (1, 1, 1, 1, 1, 1), (3, 5, 127, 3, 2, 3), (5, 129, 3, 127, 3, 2), (2, 70, 129, 64, 1, 129),
    (1, 40, 530, 256, 2, 20), (3, 0, 4, 3, 2, 2), (0, 3, 4, 3, 2, 2), (2, 4, 3, 3, 2, 0),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", FACTORED)
def test_factored_against_a_loop(sizes, dtype, backend):
    *shape, items = sizes
    inputs = make_factored(*shape, items=items, dtype=dtype, share=0.7)
    token_ids, rows, text, table = inputs
    if not serves(backend, dtype):
        with refused(ValueError, "backend"):
            ops.gather_tokens(*inputs, backend=backend)
        return
    out = torch.full((*token_ids.shape, text.shape[1]), torch.nan, dtype=dtype)
    ops.gather_tokens(*inputs, out=out, backend=backend)
    exact = ops.FactoredTable(*(part.double() for part in table))
    exact = factored_loop(token_ids, rows, text.double(), exact)
    plain = loop(token_ids, rows, text, table.whole())
    assert torch.equal(out[rows == -1], plain[rows == -1])
    assert_as_good(out, plain, exact, dtype)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", native.gather_instruction_sets())
def test_instruction_sets(isa, dtype):
    for inner, width in [(1, 1), (31, 127), (65, 257), (256, 6)]:
        token_ids, rows, text, table = make_factored(5, 17, width, inner, dtype=dtype)
        out = torch.full((5, 17, width), torch.nan, dtype=dtype)
        native.gather_tokens(token_ids, rows, text, *table, out, isa)
        exact = ops.FactoredTable(*(part.double() for part in table))
        exact = factored_loop(token_ids, rows, text.double(), exact)
        assert_as_good(out, loop(token_ids, rows, text, table.whole()), exact, dtype)


@needs_extension
def test_an_instruction_set_that_is_none():
    token_ids, rows, text, table = make_factored(1, 2, 3)
    with refused(ValueError, "isa"):
        native.gather_tokens(token_ids, rows, text, *table, torch.empty(1, 2, 3), "sse9")


def test_the_tokenizers_table():
    tokenizer = SigmaVAE(5, 24, 3, 0.5, 0.1, 0.1).eval()
    vectors, scale = torch.randn(7, 5), torch.tensor(0.3)
    table = tokenizer.factored(vectors, scale)
    expected = scale * tokenizer.encode(vectors).flatten(0, 1)
    torch.testing.assert_close(table.whole(), expected)
    rows = torch.arange(21)[None]
    found = ops.gather_tokens(rows, rows, torch.randn(1, 24), table)
    torch.testing.assert_close(found[0], expected)


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


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factored_bitwise_independent_of_the_batch(dtype):
    token_ids, rows, *tables = make_factored(129, 17, 33, inner=100, items=50, dtype=dtype)
    full = ops.gather_tokens(token_ids, rows, *tables, backend="cpp")
    for size in (1, 3, 127):
        some = torch.randperm(129)[:size]
        part = ops.gather_tokens(token_ids[some], rows[some], *tables, backend="cpp")
        assert torch.equal(part, full[some])


@pytest.fixture
def threads():
    """Sets torch's threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_with_any_number_of_threads(threads, backend):
    for make, width in [(make_inputs, 640), (make_factored, 300)]:
        token_ids, rows, text, table = make(9, 130, width)
        text.requires_grad_()
        leaf = (table if make == make_inputs else table.hidden).requires_grad_()
        outward = torch.randn(9, 130, width)
        found = []
        for count in (1, 2, 3, 2, 1):
            threads(count)
            result = ops.gather_tokens(token_ids, rows, text, table, backend=backend)
            # The products of a factored table's gradients are the library's.
            wanted = (text, leaf) if make == make_inputs else (text,)
            found.append((result, *torch.autograd.grad(result, wanted, outward)))
        if make == make_factored and backend == "reference":
            found = [parts[1:] for parts in found]
        for parts in found[1:]:
            assert all(torch.equal(part, first) for part, first in zip(parts, found[0]))


@pytest.mark.parametrize("width", [1024, 1028, 1031])
def test_more_than_the_cache_holds(width):
    inputs = make_inputs(64, 67, width, words=300, tokens=50, share=0.1)
    continuous = inputs[1][..., None] != -1
    text = inputs[2][inputs[0].masked_fill(continuous[..., 0], 0)]
    expected = torch.where(continuous, inputs[3][inputs[1].clamp(min=0)], text)
    out = torch.full_like(expected, torch.nan)
    assert torch.equal(ops.gather_tokens(*inputs, out=out), expected)
    wide = torch.full((64, 67, 2 * width), torch.nan)[..., width:]
    assert torch.equal(ops.gather_tokens(*inputs, out=wide), expected)


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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", [True, False])
def test_gradients_are_as_good_as_plain_ones(whole, dtype, backend):
    """Against float64, many positions showing a row; some tables frozen."""
    if not whole and not serves(backend, dtype):
        return
    token_ids, rows, text, table = (make_inputs if whole else make_factored)(
        5, 129, 127, dtype=dtype
    )
    tables = (text, table) if whole else (text, *table)
    outward = torch.randn(5, 129, 127).to(dtype)

    def gradients(function, dtype, wanted):
        leaves = [
            part.detach().to(dtype).requires_grad_(want) for part, want in zip(tables, wanted)
        ]
        given = leaves[1] if whole else ops.FactoredTable(*leaves[1:])
        result = function(token_ids, rows, leaves[0], given)
        return torch.autograd.grad(
            result, [x for x in leaves if x.requires_grad], outward.to(dtype)
        )

    def plain(token_ids, rows, text, table):
        continuous = rows[..., None] != -1
        shown = text[token_ids.masked_fill(continuous[..., 0], 0)]
        tokens = (table if whole else table.whole())[rows.clamp(min=0)]
        return torch.where(continuous, tokens, shown)

    def fast(*arguments):
        return ops.gather_tokens(*arguments, backend=backend)

    for wanted in [[True] * 4, [False, True, True, True], [True] + [False] * 3]:
        found = gradients(fast, dtype, wanted)
        assert ops.last_backend("gather_tokens") == backend
        assert ops.last_backend("gather_tokens_backward") == backend
        exact = gradients(plain, torch.float64, wanted)
        for part, rough, best in zip(found, gradients(plain, dtype, wanted), exact):
            assert part.dtype == dtype
            assert_as_good(part, rough, best, dtype)


def test_gradcheck_of_a_factored_table():
    token_ids, rows, text, table = make_factored(3, 8, 4, inner=5, dtype=torch.float64)

    def gather(text, *parts):
        return ops.gather_tokens(token_ids, rows, text, ops.FactoredTable(*parts))

    leaves = [part.requires_grad_() for part in (text, *table)]
    assert torch.autograd.gradcheck(gather, leaves)


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
        out = torch.full((1, 2, 3), torch.nan)
        with pytest.raises(IndexError):
            ops.gather_tokens(token_ids, rows, text, table, out=out, backend=backend)
        assert out.isnan().all()


@pytest.mark.parametrize("make", [make_inputs, make_factored])
def test_transformed(make):
    """By torch.func or in forward mode: left to the reference."""
    token_ids, rows, text, table = make(2, 5, 6)

    def function(text, backend="auto"):
        return ops.gather_tokens(token_ids, rows, text, table, backend=backend)

    found = torch.func.vmap(function)(torch.stack([text, -text]))
    expected = torch.stack([function(text), function(-text)])
    torch.testing.assert_close(found, expected)
    leaf = text.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf).sum(), leaf)
    assert torch.equal(torch.func.grad(lambda text: function(text).sum())(text), expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(text, text)))
    assert torch.equal(found.tangent, found.primal.masked_fill(rows[..., None] != -1, 0))
    for backend in set(ops.backends()["gather_tokens"]) - {"reference"}:
        with refused(ValueError, "backend"):
            torch.func.vmap(function, (0, None))(text[None], backend)


def test_auto_is_cpp_where_it_serves():
    expected = "reference" if native.build_info() is None else "cpp"
    for dtype in DTYPES:
        ops.gather_tokens(*make_inputs(2, 3, 4, dtype=dtype))
        assert ops.last_backend("gather_tokens") == expected
        ops.gather_tokens(*make_factored(2, 3, 4, dtype=dtype))
        assert ops.last_backend("gather_tokens") == (
            expected if serves("cpp", dtype) else "reference"
        )


def factored(hidden=None, weight=None, bias=None):
    good = torch.ones(6, 2), torch.ones(2, 5, 2), torch.ones(2, 5)
    given = zip((hidden, weight, bias), good)
    return ops.FactoredTable(*(other if part is None else part for part, other in given))


BUFFER = torch.zeros(40)
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
    (ValueError, "out", {"out": torch.empty(2, 3, 5).requires_grad_()}),
    (ValueError, "out", {"out": torch.empty(2, 5, 3).mT}),
    (ValueError, "out", {"out": torch.empty(1, 3, 5).expand(2, 3, 5)}),
    (ValueError, "out", {"out": torch.empty(30).as_strided((2, 3, 5), (5, 4, 1))}),
    (ValueError, "out", {"out": BUFFER[:30].view(2, 3, 5), "text_table": BUFFER[25:].view(3, 5)}),
    (ValueError, "backend", {"backend": "fastest"}),
    (TypeError, "token_table.hidden", {"token_table": factored(hidden=torch.ones(6, 2).double())}),
    (ValueError, "token_table.hidden", {"token_table": factored(hidden=torch.ones(6, 3))}),
    (ValueError, "token_table.hidden", {"token_table": factored(hidden=torch.ones(5, 2))}),
    (ValueError, "token_table.weight", {"token_table": factored(weight=torch.ones(5, 2))}),
    (ValueError, "token_table.bias", {"token_table": factored(bias=torch.ones(1, 5))}),
]


@pytest.mark.parametrize("error, name, arguments", BAD_CALLS)
def test_bad_calls(error, name, arguments):
    good = {"token_ids": IDS, "rows": IDS, "text_table": TEXT, "token_table": TOKENS}
    with refused(error, name):
        ops.gather_tokens(**(good | arguments))
