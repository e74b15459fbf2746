"""The C++ extension: present or not, it says so in one line."""

import platform
from pathlib import Path

import pytest
import torch
from ops_cases import make_denoiser

from contrec_fast import native, ops
from contrec_fast.ops import noise

CPUINFO = Path("/proc/cpuinfo")

needs_extension = pytest.mark.skipif(
    native.build_info() is None, reason=f"the C++ extension is absent: {native.why_missing()}"
)


def test_exactly_one_of_info_and_reason():
    assert (native.build_info() is None) == (native.why_missing() is not None)


def test_without_the_extension(run_python):
    output = run_python(
        "import sys; sys.modules['contrec_fast._C'] = None\n"
        "from contrec_fast import native\n"
        "assert native.build_info() is None\n"
        "print(native.why_missing())"
    ).stdout
    assert len(output.splitlines()) == 1
    assert "contrec_fast._C" in output and "compiler" in output


def test_an_extension_that_does_not_load(run_python, tmp_path):
    (tmp_path / "_C.py").write_text("raise ImportError('libgomp.so.1:\\n  cannot open')")
    output = run_python(
        f"import contrec_fast; contrec_fast.__path__.insert(0, {str(tmp_path)!r})\n"
        "from contrec_fast import native\n"
        "assert native.build_info() is None\n"
        "print(native.why_missing())"
    ).stdout
    assert output.strip() == "libgomp.so.1: cannot open"


@needs_extension
def test_build_info():
    info = native.build_info()
    assert set(info) == {"compiler", "openmp", "openmp_max_threads", "cpu_features"}
    assert any(digit in info["compiler"] for digit in "0123456789")
    assert info["openmp_max_threads"] >= 1


@needs_extension
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not CPUINFO.exists(),
    reason="compares with /proc/cpuinfo of an x86-64 Linux",
)
def test_cpu_features_agree_with_the_kernel():
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags"))
    flags = set(flags.split())
    features = native.build_info()["cpu_features"]
    assert set(features) == {"avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni"}
    assert features == {name: name in flags for name in features}


LOAD_WITHOUT_TORCH = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
sys.modules['torch'] = None
spec = spec_from_file_location('contrec_fast._C', {path!r})
extension = module_from_spec(spec)
spec.loader.exec_module(extension)
print(extension.build_info()['openmp_max_threads'])
"""


@needs_extension
@pytest.mark.parametrize("threads", [1, 3])
def test_the_extension_needs_no_torch_and_follows_omp_num_threads(run_python, threads):
    code = LOAD_WITHOUT_TORCH.format(path=native._C.__file__)
    expected = threads if native.build_info()["openmp"] else 1
    assert int(run_python(code, OMP_NUM_THREADS=str(threads)).stdout) == expected


def random_int64(*shape):
    return torch.randint(-(2**63), 2**63 - 1, shape)


def specified_normals(seed, user_ids, dim, step, draw):
    """The noise's definition, from its two parts in plain PyTorch."""
    low = 0xFFFFFFFF
    users = user_ids[:, None]
    blocks = torch.arange((dim + 3) // 4)[None, :]
    counter = (blocks, torch.tensor(step + 65536 * draw), users & low, users >> 32 & low)
    words = noise.philox(counter, (seed & low, seed >> 32 & low))
    normals = [*noise.normals_of(*words[:2]), *noise.normals_of(*words[2:])]
    return torch.stack(normals, dim=-1).flatten(1)[:, :dim]


def ulps_apart(left, right):
    """Units in the last place between float32 of the same sign; a wrong sign is very many."""
    return (left.view(torch.int32).long() - right.view(torch.int32).long()).abs()


@needs_extension
@pytest.mark.parametrize("batch, dim", [(0, 5), (3, 0), (1, 1), (3, 3), (127, 129), (5, 513)])
def test_philox_normal_is_the_specified_noise(batch, dim):
    seed, user_ids = random_int64(), random_int64(2 * batch)[::2]  # not contiguous
    step, draw = torch.randint(65536, (2,)).tolist()
    result = native.philox_normal(seed, user_ids, dim, step, draw)
    expected = specified_normals(seed, user_ids, dim, step, draw)
    assert result.shape == (batch, dim) and result.dtype == torch.float32
    apart = ulps_apart(result, expected)
    assert not (apart > 4).any()
    assert (apart > 2).sum() <= 2  # one in 20 million


# With seed 0 and column 0, the first two or the second two normals of these users are of one of
# the four quarter turns, of the largest uniform or of the smallest one.
EDGES = [9373564, 14789796, 34189772, 19953625, 1205178, 33008474]
EDGES += [32098591, 12919292, 28584014, 3446357, 12895450, 18189822]


@needs_extension
def test_philox_normal_at_the_edges():
    user_ids = torch.tensor(EDGES)
    result = native.philox_normal(torch.tensor(0), user_ids, 4, 0)
    expected = specified_normals(torch.tensor(0), user_ids, 4, 0, 0)
    assert ((expected == 0).sum(1) == torch.tensor([1, 1, 1, 1, 2, 0] * 2)).all()
    assert (expected.view(12, 2, 2).norm(dim=2).amax(1) > 5.7)[5::6].all()
    assert not (ulps_apart(result, expected) > 4).any()  # and so zeros, and their signs
    assert torch.equal(result == 0, expected == 0)


@needs_extension
@pytest.mark.parametrize("dim", [1, 3, 64, 127, 129, 256, 600])
def test_philox_normal_is_the_same_with_every_instruction_set(dim):
    names, user_ids = native._C.philox_instruction_sets(), random_int64(129)
    results = [torch.full((129, dim), torch.nan) for _ in names]
    for isa, out in zip(names, results):
        native._C.philox_normal(11, user_ids.data_ptr(), 129, dim, 5, out.data_ptr(), 1, isa)
    assert names[-1] == "portable" and not results[-1].isnan().any()
    for out in results:
        assert torch.equal(out.view(torch.int32), results[-1].view(torch.int32))
    with pytest.raises(ValueError, match="^isa: expected one of .*, got abacus$"):
        native._C.philox_normal(11, user_ids.data_ptr(), 129, dim, 5, out.data_ptr(), 1, "abacus")


@needs_extension
def test_philox_normal_writes_its_rows_and_no_further():
    batch, dim = 7, 131
    user_ids, out = random_int64(batch), torch.full((batch * dim + 64,), torch.nan)
    native._C.philox_normal(1, user_ids.data_ptr(), batch, dim, 0, out.data_ptr(), 1)
    assert not out[: batch * dim].isnan().any()
    assert out[batch * dim :].isnan().all()


@needs_extension
def test_philox_normal_does_not_depend_on_batch_or_threads():
    seed, user_ids = random_int64(), random_int64(1025)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = native.philox_normal(seed, user_ids, 259, 3)
        torch.set_num_threads(3)
        three = native.philox_normal(seed, user_ids, 259, 3)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)
    some = torch.randperm(1025)[:17]
    assert torch.equal(native.philox_normal(seed, user_ids[some], 259, 3), one[some])
    assert torch.equal(native.philox_normal(seed, user_ids[some], 67, 3), one[some][:, :67])


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_defaults_of_dtype_and_device(dtype):
    """Kernels write to memory of the dtype and in the place that they expect."""
    x, ids, steps = torch.randn(70, 8), torch.arange(70), torch.arange(70) % 9
    denoisers = [make_denoiser(kind, 8, torch.float32) for kind in ("mlp", "adaln", "separable")]
    leaf, catalog = x.clone().requires_grad_(), ops.Catalog(x)
    seed, plan = torch.tensor(3), ops.plan_sampling(denoisers[0], timesteps=9)

    def results():
        losses = ops.catalog_cross_entropy(leaf, leaf, ids, 0.1, backend="cpp")
        found = [losses, *torch.autograd.grad(losses, leaf, losses.detach())]
        for denoiser in denoisers:
            y = ops.denoise(denoiser, leaf, x, steps, backend="cpp")
            found += [y, *torch.autograd.grad(y, [leaf, *denoiser.parameters()], y.detach())]
        found += [plan(x, seed, ids, backend="cpp"), native.philox_normal(seed, ids, 8, 1)]
        return [*found, *ops.cosine_topk(x, catalog, 5, backend="cpp")]

    expected, before = results(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = results()
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, found, expected))


def test_serves_only_eager_cpu_tensors():
    assert native.serves(torch.empty(1)) == (native.build_info() is not None)
    assert not native.serves(torch.empty(1, device="meta"))


def test_a_build_of_older_sources_is_left_alone(run_python):
    process = run_python(
        "import sys, types\n"
        "old = sys.modules['contrec_fast._C'] = types.ModuleType('contrec_fast._C')\n"
        "old.__file__, old.cosine_topk = 'old.so', None\n"
        "from contrec_fast import native, ops\n"
        "import torch\n"
        "print(native.build_info(), native.why_missing())\n"
        "ops.cosine_topk(torch.ones(1, 2), ops.Catalog(torch.ones(3, 2)), 1)\n"
        "print(ops.last_backend('cosine_topk'))"
    )
    said = "None old.so: expected philox_instruction_sets, got a build of older sources; "
    assert process.stdout == said + "install contrec-fast again\nreference\n"
