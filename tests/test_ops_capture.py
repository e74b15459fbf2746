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


def captured(call):
    """`call` as a CUDA graph: (replay, what it returns each time)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up, kernels are compiled
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


# Widths and numbers of users for which Triton's `mlp` takes its forms in turn: persistent with
# and without the pre-activation, one launch with a barrier, a launch per layer.
PLANS = [
    ("reference", "path", "linear", 24, torch.float32, 65),
    ("reference", "path", "adaln", 24, torch.float32, 65),
    ("reference", "law", "linear", 24, torch.float32, 65),
    ("triton", "path", "linear", 24, torch.float32, 65),
    ("triton", "path", "adaln", 24, torch.float32, 65),
    ("triton", "path", "separable", 24, torch.float32, 65),
    ("triton", "law", "linear", 24, torch.float32, 65),
    ("triton", "path", "mlp", 24, torch.bfloat16, 65),
    ("triton", "path", "mlp", 24, torch.float32, 65),
    pytest.param("triton", "path", "mlp", 136, torch.float32, 49, id="cooperative"),
    ("triton", "path", "mlp", 136, torch.float32, 129),
]


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("backend, draw, kind, dim, dtype, users", PLANS)
def test_a_plan_as_a_graph(backend, draw, kind, dim, dtype, users, samples):
    if backend == "triton":
        pytest.importorskip("triton")
    plan = ops.plan_sampling(make_denoiser(kind, dim, dtype).cuda(), timesteps=9)
    condition = torch.randn(users, dim, device="cuda").to(dtype)
    ids = torch.arange(users, device="cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")

    def call():
        return plan(condition, seed, ids, samples, draw=draw, backend=backend)

    replay, output = captured(call)
    assert ops.last_backend("sample") == backend
    for value in (1, -2):
        condition.normal_()
        ids += 100
        seed.fill_(value)
        output.fill_(torch.nan)
        replay()
        torch.testing.assert_close(output, call())


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 33, 129])
def test_a_search_as_a_graph(batch):
    """Replays with other queries, matched groups and users; certified lists are the reference's."""
    topk = pytest.importorskip("contrec_kernels.topk")
    count, dim, k, pi = 50_001, 40, 9, 0.1
    groups = torch.randint(-1, 6, (count,), device="cuda")
    catalog = ops.Catalog(torch.randn(count, dim, device="cuda"), groups)
    lists = [torch.randint(count, (n,)).tolist() for n in torch.randint(60, (batch + 5,))]
    seen, users = ops.SeenLists.from_lists(lists, "cuda"), torch.arange(batch, device="cuda")
    queries = torch.randn(batch, dim, device="cuda")
    matched = torch.rand(batch, 6, device="cuda") < 0.4

    def search():
        return topk.search(
            queries, catalog.vectors, catalog.norms, catalog.scan, catalog.errors, catalog.groups,
            catalog.eligible, k, matched, pi, seen.offsets, seen.ids, users,
        )  # fmt: skip

    replay, (scores, ids, certified) = captured(search)
    sure = 0
    for _ in range(3):
        queries.normal_()
        matched.logical_not_()
        users += 1
        scores.fill_(torch.nan)
        ids.fill_(-7)
        certified.fill_(False)
        replay()
        expected = ops.cosine_topk(
            queries, catalog, k, matched, pi, seen, users, backend="reference"
        )  # fmt: skip
        assert torch.equal(scores[certified], expected[0][certified])
        assert torch.equal(ids[certified], expected[1][certified])
        sure += int(certified.sum())
    assert sure > 0.9 * 3 * batch
