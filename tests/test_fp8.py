"""Linear layers in fp8: rounding within the format's bounds, and what it makes of a reader."""

import copy

import pytest
import torch
from model_cases import prompts_of, random_history, random_model, small_shop
from torch import nn

from contrec_fast.engine import Engine, fp8
from contrec_fast.engine.reader import Reader

SHAPES = [(1, 16, 32), (3, 48, 16), (129, 272, 64)]  # tokens, inputs, outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (2, 5, 129), (0, 16)])
def test_rounding_is_that_of_the_format(shape, dtype):
    x = (torch.randn(shape) * 10.0 ** torch.randint(-6, 7, shape)).to(dtype)
    if len(x) > 1:
        x[1] = 0
    low, scale = fp8.quantize(x)
    assert low.dtype == fp8.FLOAT8 and low.shape == x.shape
    assert scale.shape == (*shape[:-1], 1) and scale.dtype == torch.float32
    bound = torch.maximum(x.double().abs() * 2.0**-4, scale.double() * 2.0**-10) * (1 + 1e-6)
    assert ((low.double() * scale - x.double()).abs() <= bound).all()
    largest = low.float().abs().amax(-1)
    assert (largest[x.abs().amax(-1) > 0] == fp8.LARGEST).all()


def check_layer(shape, bias, device, dtype, tolerance):
    tokens, width, outputs = shape
    linear = nn.Linear(width, outputs, bias=bias).to(device, dtype).requires_grad_(False)
    layer = fp8.Float8Linear(linear, [(None, None, None)])
    for lead in ((tokens,), (1, tokens)):
        x = torch.randn(*lead, width, device=device, dtype=dtype)
        y = layer(x)
        assert y.shape == (*lead, outputs) and y.dtype == dtype
        parts = [low.double() * scale for low, scale in map(fp8.quantize, (x, linear.weight))]
        expected = parts[0] @ parts[1].T + (linear.bias.double() if bias else 0)
        assert (y - expected).norm() <= tolerance * expected.norm()
        # Against the layer itself: what the roundings of both factors may amount to.
        exact = nn.functional.linear(x.double(), linear.weight.double())
        bounds = [
            torch.maximum(factor.double().abs() / 16, fp8.quantize(factor)[1].double() / 1024)
            for factor in (x, linear.weight)
        ]
        weight = linear.weight.double().abs()
        most = bounds[0] @ weight.T + (x.double().abs() + bounds[0]) @ bounds[1].T
        exact = exact + (linear.bias.double() if bias else 0)
        assert ((y - exact).abs() <= most + tolerance * exact.abs().amax()).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_is_the_product_of_the_rounded_numbers(shape, bias):
    check_layer(shape, bias, "cpu", torch.float32, 1e-6)
    check_layer(shape, bias, "cpu", torch.bfloat16, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (4097, 2048, 8192)])
def test_a_layer_on_a_gpu(shape, bias):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9 or more")
    check_layer(shape, bias, "cuda", torch.bfloat16, 1e-2)


def test_layers_share_the_same_input_and_no_other():
    inputs = [(None, None, None)]
    linears = [nn.Linear(16, 16).requires_grad_(False) for _ in range(2)]
    layers = [fp8.Float8Linear(linear, inputs) for linear in linears]
    x, other = torch.randn(2, 3, 16).unbind()
    for given in (x, x, other, x):
        for linear, layer in zip(linears, layers):
            alone = fp8.Float8Linear(linear, [(None, None, None)])
            assert torch.equal(layer(given), alone(given))


def test_a_reader_in_fp8_is_near():
    model = random_model("backbone.hidden=32", "prompt.response_tokens=9")
    reader = Reader(model, prompts_of(model), "fp8")
    kinds = [type(module) for module in reader.packed.base.modules()]
    assert kinds.count(fp8.Float8Linear) == 7 and nn.Linear not in kinds
    assert reader.packed.suits and reader.packed.narrows
    assert not any(isinstance(module, fp8.Float8Linear) for module in model.modules())
    histories = [random_history(length) for length in (1, 20, 3, 7)]
    expected = model.read(reader.prompts.inference_batch(histories))
    found, texts = reader.write(histories)
    error = (found - expected).norm() / expected.norm()
    assert found.dtype == expected.dtype and 0 < error < 0.2 and len(texts) == 4
    # The packed model is the model in fp8.
    whole = copy.deepcopy(model)
    whole.backbone.bfloat16()
    fp8.quantize_layers(whole.backbone)
    batch = reader.prompts.inference_batch(histories)
    states = whole.hidden_states(batch)[batch.read_row, batch.read_column]
    whole.backbone = reader.packed.backbone
    other = whole.hidden_states(batch)[batch.read_row, batch.read_column]
    assert states.dtype == torch.bfloat16 and torch.equal(states, other)


def test_an_engine_in_fp8():
    lists = Engine(random_model(), small_shop(), dtype="fp8").recommend(range(5), 10)
    exact = Engine(random_model(), small_shop()).recommend(range(5), 10)
    same = [len(set(a) & set(b)) for a, b in zip(lists.ids.tolist(), exact.ids.tolist())]
    assert sum(same) > 25
