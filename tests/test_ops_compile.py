"""Operations inside `torch.compile`, the registered operators, and which backend served."""

import pytest
import torch
from ops_cases import KINDS, make_denoiser, refused
from torch._dynamo.testing import CompileCounterWithBackend

from contrec_fast import native, ops

FAST = ["eager", "aot_eager"]  # compilers without code generation, which takes long on a CPU


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def compiled(function, compiler="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=compiler, **options)


def gather_case():
    rows = torch.tensor([[-1, 2, 0, -1], [1, -1, -1, 3]])
    arguments = torch.randint(0, 9, (2, 4)), rows, torch.randn(9, 5), torch.randn(4, 5)
    return ops.gather_tokens, arguments


def topk_case():
    catalog = ops.Catalog(torch.randn(50, 8), torch.randint(-1, 3, (50,)))
    seen = ops.SeenLists.from_lists([[1, 2], [3]])

    def search(queries, matched, seen_rows):
        return ops.cosine_topk(queries, catalog, 5, matched, 0.1, seen, seen_rows)

    return search, (torch.randn(3, 8), torch.rand(3, 3) < 0.5, torch.tensor([1, -1, 0]))


def loss_case():
    def loss(queries, vectors, targets):
        return ops.catalog_cross_entropy(queries, vectors, targets, 0.3)

    return loss, (torch.randn(4, 6), torch.randn(9, 6), torch.tensor([0, 8, 3, 3]))


def seen_loss_case():
    seen = ops.SeenLists.from_lists([[1, 2], [3]])

    def loss(queries, vectors, targets, seen_rows):
        options = {"label_smoothing": 0.1, "seen": seen, "seen_rows": seen_rows}
        return ops.catalog_cross_entropy(queries, vectors, targets, 0.3, "dot", **options)

    return loss, (*loss_case()[1], torch.tensor([1, -1, 0, 1]))


def denoise_case(kind, drop=None):
    denoiser = make_denoiser(kind, 6, torch.float32)

    def denoise(x, condition, t):
        return ops.denoise(denoiser, x, condition, t, 1.5, drop)

    return denoise, (torch.randn(4, 6), torch.randn(4, 6), torch.arange(4))


def sample_case(kind, settings=None, **options):
    denoiser = make_denoiser(kind, 6, torch.float32)
    plan = ops.plan_sampling(denoiser, timesteps=20, steps=3, **(settings or {}))

    def sample(condition, seed, user_ids):
        return plan(condition, seed=seed, user_ids=user_ids, **options)

    return sample, (torch.randn(4, 6), torch.tensor(5), torch.tensor([7, -1, 2**40, 3]))


def factored_case():
    (ids, rows, text, _), weight = gather_case()[1], torch.randn(2, 5, 7)

    def gather(ids, rows, text, hidden, weight, bias):
        return ops.gather_tokens(ids, rows, text, ops.FactoredTable(hidden, weight, bias))

    return gather, (ids, rows, text, torch.randn(4, 7), weight, torch.randn(2, 5))


CASES = {
    "gather_tokens": gather_case,
    "gather_tokens-factored": factored_case,
    "cosine_topk": topk_case,
    "catalog_cross_entropy": loss_case,
    "catalog_cross_entropy-seen": seen_loss_case,
    **{f"denoise-{kind}": lambda kind=kind: denoise_case(kind) for kind in KINDS},
    "denoise-drop": lambda: denoise_case("mlp", torch.tensor([True, False, True, False])),
    **{f"sample-{kind}": lambda kind=kind: sample_case(kind) for kind in KINDS},
    "sample-several": lambda: sample_case("mlp", samples=3),
    "sample-multistep": lambda: sample_case("mlp", {"method": "dpm++", "prediction": "v"}),
}


def check_case(name, compiler, **options):
    function, arguments = CASES[name]()
    expected = function(*arguments)
    result = compiled(function, compiler, **options)(*arguments)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    if name.startswith(("gather_tokens", "cosine_topk")):  # bitwise, whoever calls
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("compiler", FAST)
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_eager(name, compiler):
    check_case(name, compiler)


@pytest.mark.slow
def test_code_generation():
    """Every operation in one graph that is turned into code."""
    names = ["gather_tokens", "cosine_topk", "catalog_cross_entropy", "denoise-mlp", "sample-mlp"]
    cases = [CASES[name]() for name in names]

    def all_of_them(*arguments):
        return [function(*its) for (function, _), its in zip(cases, arguments)]

    arguments = [its for _, its in cases]
    result = compiled(all_of_them, "inductor")(*arguments)
    torch.testing.assert_close(result, all_of_them(*arguments), rtol=1e-4, atol=1e-5)


def test_one_graph_serves_every_batch():
    """Dynamic shapes: no graph per batch size, nor one per seed."""
    counter = CompileCounterWithBackend("aot_eager")
    sample, (_, seed, _) = sample_case("mlp")
    function = compiled(sample, counter, dynamic=True)
    compilations = set()
    for batch, seed in [(4, 5), (7, 6), (129, -1)]:
        condition, users = torch.randn(batch, 6), torch.arange(batch)
        result = function(condition, torch.tensor(seed), users)
        torch.testing.assert_close(result, sample(condition, torch.tensor(seed), users))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1 and compilations != {0}


def gradients(function, arguments):
    inputs = [a.clone().requires_grad_() if a.is_floating_point() else a for a in arguments]
    function(*inputs).square().sum().backward()
    return [a.grad for a in inputs if a.requires_grad]


@pytest.mark.parametrize(
    "name",
    ["gather_tokens", "gather_tokens-factored", "catalog_cross_entropy", "denoise-adaln"],
)
def test_compiled_gradients(name):
    function, arguments = CASES[name]()
    found = gradients(compiled(function), arguments)
    torch.testing.assert_close(found, gradients(function, arguments), rtol=1e-5, atol=1e-6)


def test_compiled_denoiser_gets_its_gradients():
    denoiser = make_denoiser("mlp", 6, torch.float32)
    x, t = torch.randn(4, 6), torch.arange(4)

    def loss(x):
        return ops.denoise(denoiser, x, x, t).square().sum()

    expected = torch.autograd.grad(loss(x), list(denoiser.parameters()))
    found = torch.autograd.grad(compiled(loss)(x), list(denoiser.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compiled_law():
    """The closed form is made by the first eager call."""
    sample, arguments = sample_case("linear", draw="law")
    expected = sample(*arguments)
    torch.testing.assert_close(compiled(sample)(*arguments), expected, rtol=1e-5, atol=1e-5)


def test_compiled_gather_writes_to_out():
    gather, arguments = gather_case()
    out = torch.full((2, 4, 5), torch.nan)

    def write(out, *arguments):
        return gather(*arguments, out=out)

    compiled(write)(out, *arguments)
    assert torch.equal(out, gather(*arguments))


# The registered operators themselves.

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("case", [gather_case, factored_case])
def test_operators_of_gather(case):
    arguments = case()[1]
    tables = [
        part.requires_grad_() for part in (*arguments[2:], None, None)[:4] if part is not None
    ]
    given = (*arguments[:2], *tables, *[None] * (4 - len(tables)))
    torch.library.opcheck(
        torch.ops.contrec.gather_tokens.default,
        (*given, "auto"),
        test_utils=(*CHECKS, "test_autograd_registration"),
    )
    with torch.no_grad():
        expected = torch.ops.contrec.gather_tokens(*given, "auto")
        out = torch.full_like(expected, torch.nan)
        torch.ops.contrec.gather_tokens_out(*given, out, "auto")
    assert torch.equal(out, expected)
    detached = [part if part is None else part.detach() for part in given]
    operator = torch.ops.contrec.gather_tokens_out.default
    torch.library.opcheck(operator, (*detached, out, "auto"), test_utils=CHECKS[:2])
    for wanted in [(True, True), (False, True), (True, False)]:
        torch.library.opcheck(
            torch.ops.contrec.gather_tokens_backward.default,
            (torch.randn_like(out), *arguments[:2], 9, 4, *wanted, "auto"),
            test_utils=CHECKS,
        )


def test_operator_of_topk():
    queries, catalog = torch.randn(3, 8), ops.Catalog(torch.randn(50, 8), torch.arange(50) % 3)
    seen = ops.SeenLists.from_lists([[1, 2], [3]])
    given = (
        queries, catalog.vectors, catalog.norms, catalog.scan, catalog.errors, catalog.groups,
        catalog.eligible, 5,
    )  # fmt: skip
    full = (torch.rand(3, 3) < 0.5, 0.1, seen.offsets, seen.ids, torch.tensor([0, -1, 1]))
    for rest in (full, (None, 0.0, None, None, None)):
        torch.library.opcheck(
            torch.ops.contrec.cosine_topk.default, (*given, *rest, "auto"), test_utils=CHECKS
        )


@pytest.mark.parametrize("kind", KINDS)
def test_operator_of_sample(kind):
    denoiser = make_denoiser(kind, 6, torch.float32)
    scripted = torch.randn(1, 3, 4, 6)
    for samples, noise, method in [(1, None, "ddpm"), (2, None, "dpm++"), (1, scripted, "ddpm")]:
        plan = ops.plan_sampling(denoiser, timesteps=9, steps=3, method=method)
        arguments = (
            torch.randn(4, 6), torch.tensor(3), torch.arange(4), samples, noise, plan.weights,
            plan.times, plan.coefficients, plan.noises, plan.multistep, plan.description, 2.0,
            "auto",
        )  # fmt: skip
        torch.library.opcheck(torch.ops.contrec.sample.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("name", ["catalog_cross_entropy", "denoise"])
def test_operators_made_of_others(name):
    """Composite operators: called directly they equal the function."""
    operator = getattr(torch.ops.contrec, name)
    if name == "catalog_cross_entropy":
        function, arguments = loss_case()
        result = operator(*arguments, 0.3, "cosine", 0.0, None, None, None, "auto")
    else:
        denoiser = make_denoiser("adaln", 6, torch.float32)
        x, t = torch.randn(4, 6), torch.arange(4)
        description = ops.plan_sampling(denoiser).description
        result = operator(x, x, t, list(denoiser.parameters()), description, 1.5, None, "auto")
        function, arguments = ops.denoise, (denoiser, x, x, t, 1.5)
    assert torch.equal(result, function(*arguments))


# Which backend serves.


def test_backends_and_who_served():
    available = ops.backends()
    names = {"gather_tokens", "cosine_topk", "catalog_cross_entropy", "denoise", "sample"}
    assert names <= set(available)
    assert all("reference" in available[name] for name in names)
    for name in CASES:
        function, arguments = CASES[name]()
        function(*arguments)
        assert ops.last_backend(name.split("-")[0]) in available[name.split("-")[0]]
    for backend in {"reference", "cpp"} & set(available["gather_tokens"]):
        if backend == "cpp" and native.build_info() is None:
            continue
        ops.gather_tokens(*gather_case()[1], backend=backend)
        assert ops.last_backend("gather_tokens") == backend
    assert ops.last_backend("no such operation") is None


@pytest.mark.parametrize("name", CASES)
def test_registered_operators_note_who_served(name, monkeypatch):
    operation = name.split("-")[0]
    function, arguments = CASES[name]()
    monkeypatch.setattr("contrec_fast.ops.dispatch._served", {})
    assert ops.last_backend(operation) is None
    compiled(function)(*arguments)
    assert ops.last_backend(operation) in ops.backends()[operation]


def test_an_unknown_backend_lists_the_known():
    with pytest.raises(ValueError) as caught:
        ops.gather_tokens(*gather_case()[1], backend="fastest")
    listed = ", ".join(["auto", *ops.backends()["gather_tokens"]])
    assert str(caught.value) == f"backend: gather_tokens has {listed}, got 'fastest'"
    with refused(ValueError, "backend"):
        torch.ops.contrec.gather_tokens(*gather_case()[1], None, None, "fastest")
