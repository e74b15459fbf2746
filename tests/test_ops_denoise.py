"""`denoise` that works activations out again: right, frugal, the same bits twice; who serves."""

import pytest
import torch
from denoise_cases import KINDS, check_gradients, evaluate, poisoned  # noqa: F401, a fixture
from model_cases import Recorder, small_config, small_shop
from ops_cases import make_denoiser, needs_extension, refused

from contrec_fast import ops
from contrec_fast.ops import dispatch
from contrec_fast.training import train

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = ["recompute", pytest.param("cpp", marks=needs_extension)]
kinds = pytest.mark.parametrize("kind", KINDS)
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("guidance, dropped", [(0.0, False), (0.0, True), (1.5, False), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
@backends
def test_values_and_gradients(backend, kind, dtype, guidance, dropped, conditional):
    for batch, dim, single in [(3, 65, True), (127, 64, False), (129, 3, True), (70, 33, False)]:
        arguments = batch, dim, guidance, single, dropped, conditional
        check_gradients(kind, backend, dtype, *arguments)


@pytest.mark.parametrize("guidance, dropped", [(0.0, True), (1.5, False), (1.5, True)])
@kinds
def test_in_float64(kind, guidance, dropped):
    """The autograd function itself, with the plain steps."""
    for batch, dim, single in [(1, 1, True), (129, 5, False), (3, 33, False)]:
        arguments = batch, dim, guidance, single, dropped, True
        check_gradients(kind, "recompute", torch.float64, *arguments)
    denoiser, t = make_denoiser(kind, 3), torch.tensor([2, 0])
    drop = torch.tensor([True, False]) if dropped else None

    def function(x, condition, *weights):
        return ops.denoise(denoiser, x, condition, t, guidance, drop, backend="recompute")

    inputs = *torch.randn(2, 2, 3, dtype=torch.float64), *denoiser.parameters()
    inputs = [tensor.detach().requires_grad_() for tensor in inputs[:2]] + list(inputs[2:])
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@backends
@kinds
def test_no_rows(kind, backend):
    denoiser, empty = make_denoiser(kind, 5, torch.float32), torch.zeros(0, 5)
    for t in (torch.zeros(0).long(), torch.ones(1).long()):
        found = evaluate(denoiser, backend, empty, empty, empty, t, 2.0)
        assert [len(part) for part in found[:3]] == [0, 0, 0] and not found[3].any()


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["linear", *KINDS])
def test_dropped_rows_are_the_null_branch(kind, guidance):
    """In the reference; a dropped row's condition does not matter, nor gets a gradient."""
    denoiser = make_denoiser(kind, 6)
    x, condition, outward = torch.randn(3, 9, 6, dtype=torch.float64)
    t, drop = torch.randint(0, 20, (9,)), torch.rand(9) < 0.5
    y, _, of_condition, _ = evaluate(
        denoiser, "reference", x, condition, outward, t, guidance, drop
    )
    kept = ops.denoise(denoiser, x, condition, t, guidance, backend="reference")
    null = ops.denoise(denoiser, x, None, t, guidance, backend="reference")
    torch.testing.assert_close(y, torch.where(drop[:, None], null, kept))
    assert not of_condition[drop].any() and of_condition[~drop].any(1).all()


@backends
@kinds
def test_nothing_but_the_inputs_is_kept(kind, backend):
    denoiser = make_denoiser(kind, 16, torch.float32)
    x, condition, t = torch.randn(99, 16), torch.randn(99, 16), torch.randint(0, 20, (99,))
    drop = torch.rand(99) < 0.4

    def saved(backend):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            ops.denoise(denoiser, x, condition, t, 2.0, drop, backend=backend)
        return {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in kept}

    given = {tensor.data_ptr() for tensor in (x, condition, t, drop, *denoiser.parameters())}
    ours, theirs = saved(backend), saved("reference")
    assert set(ours) <= given
    assert sum(theirs[place] for place in theirs.keys() - given) > 4 * (x.nbytes + condition.nbytes)


@backends
@kinds
def test_same_bits_twice_and_on_several_threads(kind, backend):
    denoiser = make_denoiser(kind, 33, torch.float32)
    arguments = *torch.randn(3, 130, 33), torch.randint(0, 20, (130,)), 2.0, torch.rand(130) < 0.4
    first = evaluate(denoiser, backend, *arguments)
    assert all(map(torch.equal, first, evaluate(denoiser, backend, *arguments)))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
def test_passes_do_not_depend_on_threads_or_other_rows(kind, dtype):
    """Products are the library's, whose order of adding may; the C++ around them is compared on
    products that have only one: inner dimensions of 1 (mlp) or weights of a power of two."""
    from contrec_fast.ops.denoise_cpp import CppSteps
    from contrec_fast.ops.denoise_steps import Modulation, Rows

    steps, width = CppSteps(), 37
    state, grad = torch.randn(2, 2, 130, width).to(dtype)
    users, null = torch.randn(130, 3 * width).to(dtype), torch.randn(1, 3 * width).to(dtype)
    time, norm = torch.randn(7, 3 * width).to(dtype), torch.randn(2, width).to(dtype)
    index, drop = torch.randint(0, 7, (130,)), torch.rand(130) < 0.5

    def run(some):
        rows = Rows(index[some], 2.0, drop[some])
        one = Modulation(users[some], time if kind == "separable" else None, null)
        two = Modulation(*(None if p is None else p[:, : 2 * width].contiguous() for p in one))
        here, back = state[:, some].contiguous(), grad[:, some].contiguous()
        of_modulation = torch.zeros(2, len(here[0]), 3 * width, dtype=dtype)
        inner, of_state, *_ = steps.modulate_gradient(
            here, norm, one, rows, back, back, of_modulation
        )
        found = [inner, of_state, of_modulation, steps.modulate(here, norm, one, rows)]
        found.append(steps.residual_gradient(back, here, one, rows, of_modulation))
        folded, of_state, of_two = steps.fold_gradient(here, two, rows, back[0].contiguous())
        return [*found, of_state, of_two, folded[None]]

    threads = torch.get_num_threads()
    whole = run(torch.arange(130))
    try:
        for count, size in [(1, 1), (2, 129), (3, 50)]:
            torch.set_num_threads(count)
            some = torch.randperm(130)[:size]
            assert all(torch.equal(a[:, some], b) for a, b in zip(whole, run(some)))
    finally:
        torch.set_num_threads(threads)


@kinds
@backends
def test_strided_drop(kind, backend):
    denoiser, t = make_denoiser(kind, 5, torch.float32), torch.ones(1).long()
    x, condition = torch.randn(2, 40, 5)
    drop = (torch.rand(40, 3) < 0.5)[:, 1]
    found, expected = (
        evaluate(denoiser, backend, x, condition, x, t, 1.5, mask)
        for mask in (drop, drop.contiguous())
    )
    assert all(map(torch.equal, found, expected))


@kinds
@backends
def test_autocast_around_the_backward_pass_changes_nothing(kind, backend):
    denoiser, t = make_denoiser(kind, 5, torch.float32), torch.arange(70) % 20
    x, condition = torch.randn(2, 70, 5)
    x.requires_grad_()
    expected, found = (ops.denoise(denoiser, x, condition, t, backend=backend) for _ in range(2))
    inputs = x, *denoiser.parameters()
    expected = torch.autograd.grad(expected.sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(found.sum(), inputs)
    assert all(map(torch.equal, found, expected))


def test_refused_in_one_line():
    x, t = torch.randn(3, 4), torch.zeros(1).long()
    mlp, linear = make_denoiser("mlp", 4, torch.float32), make_denoiser("linear", 4, torch.float32)
    for steps, error in [(t[0], ValueError), (0, TypeError), (t.repeat(2), ValueError)]:
        with refused(error, "t"):
            ops.denoise(mlp, x, x, steps)
    for drop, error in [(torch.zeros(3), TypeError), (torch.zeros(2).bool(), ValueError)]:
        with refused(error, "drop"):
            ops.denoise(mlp, x, x, t, drop=drop)
    for backend in ("recompute", "cpp"):
        with refused(ValueError, "backend"):
            ops.denoise(linear, x, x, t, backend=backend)
        with refused(ValueError, "backend"), torch.autocast("cpu", torch.bfloat16):
            ops.denoise(mlp, x, x, t, backend=backend)


def test_what_auto_leaves_to_the_reference():
    x, t = torch.randn(3, 4), torch.zeros(1).long()
    mlp = make_denoiser("mlp", 4, torch.float32)
    served = []
    for denoiser in (make_denoiser("linear", 4, torch.float32), mlp.double()):
        ops.denoise(denoiser, x.to(denoiser.null_condition.dtype), None, t)
        served.append(ops.last_backend("denoise"))
    with torch.autocast("cpu", torch.bfloat16):
        ops.denoise(mlp.float(), x, x, t)
    served.append(ops.last_backend("denoise"))
    torch.func.grad(lambda x: ops.denoise(mlp, x, x, t).sum())(x)
    served.append(ops.last_backend("denoise"))
    assert served == ["reference"] * 4


@needs_extension
def test_what_auto_gives_to_the_extension():
    """Calls without gradients, and of those with gradients the ones measured faster."""
    x = torch.randn(1024, 4)
    steps = {"[1]": torch.zeros(1).long(), "[B]": torch.randint(0, 20, (1024,))}
    served = {}
    for kind in ("mlp", "adaln"):
        denoiser = make_denoiser(kind, 4, torch.float32)
        with torch.no_grad():
            ops.denoise(denoiser, x[:3], x[:3], steps["[1]"], 0.0)
        served[kind] = [ops.last_backend("denoise")]
        for rows, t, guidance in [
            (1024, "[B]", 0), (1024, "[1]", 0), (256, "[1]", 1), (9, "[1]", 1),
        ]:  # fmt: skip
            ops.denoise(denoiser, x[:rows], x[:rows], steps[t], guidance)
            served[kind].append(ops.last_backend("denoise"))
        ops.denoise(denoiser.bfloat16(), x.bfloat16(), x.bfloat16(), steps["[1]"], 1.0)
        served[kind].append(ops.last_backend("denoise"))
    assert served == {
        "mlp": ["cpp", "cpp", "reference", "cpp", "reference", "cpp"],
        "adaln": ["cpp", "reference", "reference", "cpp", "reference", "reference"],
    }


@pytest.mark.slow
@needs_extension
@pytest.mark.parametrize("head", [["mlp", 1.0], ["adaln", 0.0]], ids=str)
def test_training_has_the_same_losses(head, monkeypatch):
    """52 steps, means of each epoch of four; rounding grows along the way."""
    choose, losses = dispatch._choose, {}
    for backend in ("reference", "recompute", "cpp"):

        def forced(operation, *arguments, backend=backend):
            return backend if operation == "denoise" else choose(operation, *arguments)

        monkeypatch.setattr(dispatch, "_choose", forced)
        recorder = Recorder()
        config = small_config(f"head.denoiser={head[0]}", f"head.guidance={head[1]}", epochs=13)
        config.prompt.text, config.training.contrastive_weight = "none", 0.1
        train(small_shop(), config, recorder)
        assert ops.last_backend("denoise") == backend
        losses[backend] = recorder.figures["ContRec"][3::4]
    for epoch, expected in enumerate(losses["reference"]):
        for backend in ("recompute", "cpp"):
            found = losses[backend][epoch]
            for name in ("diffusion", "dispersive", "contrastive", "ranking"):
                assert found[name] == pytest.approx(expected[name], rel=1e-5 * (1 + epoch)), epoch
    assert epoch == 12
