"""How often the host waits for the device: never before the search, and how often in a pass.

On the CPU calls are counted that a GPU could not answer without being waited for: those whose
result, or its size, depends on values. Copies show where the device's tensors are on another one.
"""

import copy
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT
from model_cases import prompts_of, random_history, random_model, small_shop
from test_head import VARIANTS, inputs
from test_ops_capture import FROM_NUMBERS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contrec_fast import Head
from contrec_fast.engine import packed, prompting
from contrec_fast.engine import reader as reader_module
from contrec_fast.engine.fixed import WIDTH
from contrec_fast.engine.reader import Reader
from contrec_fast.ops import dispatch

sys.path.insert(0, str(ROOT / "bench"))

from gpu_watch import count_waits, covered  # noqa: E402

SEARCH = 3  # the reference's: twice the number of seen items, then whether the lists are certain


class Waits(TorchDispatchMode):
    """Keeps the names of calls that wait."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # in inference mode, calls that are made of others come whole
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        waits = bool(tags & set(function.tags)) and kwargs.get("output_size") is None
        if function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            waits = any(x is not None and x.dtype == torch.bool for x in tree_leaves(args[1]))
        if waits:
            self.names.append(function.name())
        return function(*args, **kwargs)


@pytest.fixture
def waits(monkeypatch):
    """waits(call) -> names of what waits in it, with the references that serve a GPU."""
    monkeypatch.setattr(dispatch, "_choose", lambda *arguments: dispatch.REFERENCE)

    def run(call):
        with Waits() as found:
            call()
        return found.names

    return run


def test_the_check_sees_what_waits(waits):
    x = torch.arange(5)
    mask = x > 1
    assert waits(lambda: (x[x], x * 2, torch.where(mask, x, 0), x[:3], x.clone())) == []
    for call in (
        lambda: mask.nonzero(as_tuple=True), lambda: x.tolist() and x[1].item(),
        lambda: x.sum().item(), lambda: bool(mask.any()), lambda: mask.nonzero(), lambda: x[mask],
        lambda: x.repeat_interleave(x), lambda: x.unique(), lambda: x.masked_select(mask),
        lambda: x.clone().__setitem__(mask, x[:3]),
    ):  # fmt: skip
        assert waits(call)
        with torch.inference_mode():
            assert waits(call)


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda overrides: ",".join(overrides))
def test_the_head_waits_for_certain_lists_only(overrides, waits):
    model = random_model(*overrides)
    head, given = Head.of(model, small_shop()), inputs(model, range(9))
    rows = None if head.seen is None else torch.arange(9)
    matched = torch.rand(9, head.catalog.num_groups) < 0.5
    assert waits(lambda: head.sample(**given)) == []
    found = waits(lambda: head(**given, k=5, matched=matched, seen_rows=rows))
    assert len(found) <= SEARCH


def writer(device="cpu"):
    """A reader with passes of fixed shapes, and histories."""
    model = copy.deepcopy(random_model("prompt.response_tokens=33")).to(device)
    reader = Reader(model, prompts_of(model))
    if device == "cpu":  # as a GPU does it, not by the extension
        reader.packed.layers, reader.packed.cache.attention = None, "blocks"
    histories = [random_history(length) for length in (*range(1, 20), 20, 20)]
    reader.warm_up(histories)
    return reader, histories


class TwoDevices(TorchFunctionMode):
    """Host tensors are on the CPU, the device's on the meta device, where there is nothing to
    read; no call has both but those of `upload`. (A scalar of the host is no copy.)"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in leaves if x.dim() or x.is_meta}
        made = function in FROM_NUMBERS and "meta" in devices
        assert len(devices) < 2 and not made, f"{function} copies from the host"
        return result


def test_reading_never_waits(monkeypatch):
    """Neither for a value nor for a copy."""
    model = copy.deepcopy(random_model())
    reader = Reader(model, prompts_of(model))
    reader.packed.layers, reader.packed.cache.attention = None, "blocks"  # not those of a CPU
    monkeypatch.setitem(reader_module.BUDGET, "cuda", 300)
    model.to("meta")
    cache = reader.packed.cache
    for part in (*cache.layers, reader):
        moved = {name: x.to("meta") for name, x in vars(part).items() if torch.is_tensor(x)}
        vars(part).update(moved)
    cache._prefix = [tuple(x.to("meta") for x in kept) for kept in cache._prefix]
    cache.device = reader.packer.device = torch.device("meta")
    mode = TwoDevices()

    def upload(x, device):
        with torch._C.DisableTorchFunction():
            return x.to(device)

    for module in (packed, prompting, reader_module):
        monkeypatch.setattr(module, "upload", upload)
    histories = [random_history(length) for length in (1, 20, 3, 3, 25, 7)]
    with mode:
        conditions = reader.read(histories)
    assert conditions.is_meta and conditions.shape == (6, 16)
    # Nor does a pass of fixed shapes, which a graph is to hold.
    fixed = reader._make_decoder().fixed
    for batch in (1, 4):
        run = fixed._make(batch)[3]
        with mode, torch.inference_mode():
            assert run().shape == (batch, WIDTH)
    for call in (
        lambda: conditions[torch.tensor([1])], lambda: conditions + torch.ones(16),
        lambda: torch.tensor(3, device="meta"), lambda: conditions.sum().item(),
    ):  # fmt: skip
        with mode, pytest.raises((AssertionError, RuntimeError)):
            call()


def test_a_pass_waits_three_times_and_a_graph_never(waits, monkeypatch):
    reader, histories = writer()
    decoder, found = reader._decoder, []
    write = decoder.write
    monkeypatch.setattr(
        decoder, "write", lambda *given: found.append(waits(partial(write, *given)))
    )
    before = dict(reader.counters)
    with pytest.raises(AttributeError):  # nothing was returned
        reader.write(histories)
    replays = reader.counters["replays"] - before["replays"]
    assert replays > 0 and reader.counters["passes"] == before["passes"]
    # Before and behind them: what of the opening was written, and that nobody goes on.
    assert len(found[0]) == 3 * replays + 2
    for *_, run in decoder.fixed._passes.values():  # what a graph captures
        with torch.inference_mode():
            assert waits(run) == []


@pytest.mark.gpu
def test_waits_on_a_gpu():
    device = torch.device("cuda")
    assert count_waits(lambda: torch.ones(3, device=device).sum().item(), device) == 1
    assert count_waits(lambda: torch.ones(3).to(device), device) == 1
    reader, histories = writer(device)
    reader.read(histories)
    assert count_waits(lambda: reader.read(histories), device) == 0
    replays = reader.counters["replays"]
    found = count_waits(lambda: reader.write(histories), device)
    assert found <= 3 * (reader.counters["replays"] - replays) + 12
    model = copy.deepcopy(random_model("prompt.text=none"))
    given = {name: tensor.cuda() for name, tensor in inputs(model, range(9)).items()}
    head = Head.of(model.cuda(), small_shop())
    call = {"k": 5, "seen_rows": torch.arange(9, device=device)}
    head(**given, **call)
    assert count_waits(lambda: head.sample(**given), device) == 0
    assert count_waits(lambda: head(**given, **call), device) <= SEARCH


def test_the_union_of_intervals():
    assert covered([]) == 0
    for count in (1, 3, 127):
        starts = torch.randint(1000, (count,))
        spans = torch.stack([starts, starts + torch.randint(50, (count,))], 1).tolist()
        inside = {at for start, end in spans for at in range(start, end)}
        assert covered(spans) == len(inside)
