"""Operations start their work and return: a CUDA graph can capture them, and replay other inputs.

A graph cannot hold a wait for the GPU: reading a tensor on the host, or copying one made there.
"""

import pytest
import torch
from ops_cases import KINDS, make_denoiser
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from contrec_fast import ops
from contrec_fast.models.schedules import METHODS

FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class OneDevice(TorchFunctionMode):
    """Every tensor of every call, argument or result, is on the meta device, where there is
    nothing to read: `.item()` and the like raise, and copies from the host are seen here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in FROM_NUMBERS, f"{function} copies from the host"
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                assert leaf.device.type == "meta", f"{function} with a tensor on {leaf.device}"
        return result


def refuses(action):
    with OneDevice(), pytest.raises((AssertionError, RuntimeError)):
        action()


def test_the_check_sees_both_kinds_of_waiting():
    refuses(lambda: torch.ones(3, device="meta").sum().item())
    refuses(lambda: torch.ones(3, device="meta").tolist())
    refuses(lambda: torch.tensor(3, device="meta"))
    refuses(lambda: torch.as_tensor(3, device="meta"))
    refuses(lambda: torch.ones(3).to("meta"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_never_waits(kind, method):
    denoiser = make_denoiser(kind, 8, torch.float32).to("meta")
    plan = ops.plan_sampling(denoiser, timesteps=7, steps=3, method=method)
    condition = torch.randn(5, 8, device="meta")
    noise = torch.randn(3, 5, 8, device="meta")
    ids, seed = torch.arange(5, device="meta"), torch.ones((), dtype=torch.int64, device="meta")
    with OneDevice():
        assert plan(condition).shape == (5, 8)
        assert plan(condition, seed=seed, user_ids=ids, samples=2).shape == (2, 5, 8)
        assert plan(condition, noise=noise).shape == (5, 8)


def test_other_operations_never_wait():
    denoiser = make_denoiser("mlp", 8, torch.float32).to("meta")
    x, rows = torch.randn(5, 8, device="meta"), torch.zeros(5, 1, dtype=torch.int64, device="meta")
    with OneDevice():
        assert ops.denoise(denoiser, x, x, rows[:, 0]).shape == (5, 8)
        assert ops.gather_tokens(rows, rows, x, x).shape == (5, 1, 8)
        assert ops.catalog_cross_entropy(x, x, rows[:, 0], 0.1).shape == (5,)


@pytest.mark.gpu
@pytest.mark.parametrize("draw, kind", [("path", "linear"), ("path", "adaln"), ("law", "linear")])
def test_a_plan_as_a_graph(draw, kind):
    plan = ops.plan_sampling(make_denoiser(kind, 24, torch.float32).cuda(), timesteps=9)
    condition, ids = torch.randn(65, 24).cuda(), torch.arange(65).cuda()
    seed = torch.zeros((), dtype=torch.int64).cuda()

    def call():
        return plan(condition, seed=seed, user_ids=ids, draw=draw)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up before the capture
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for replay in range(2):
        condition.normal_()
        ids += 100
        seed.fill_(replay + 1)
        output.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(output, call())
