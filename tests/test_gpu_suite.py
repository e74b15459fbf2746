"""bench/gpu_suite.sh with every tool replaced by a stub, its PyTorch baselines against the package,
and, where nvcc is there, its CUDA probes through the compiler."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import interpreter_obstacle

from contrec_fast.models import MLPDenoiser
from contrec_fast.ops import plan_sampling

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import dispatch_table  # noqa: E402
from torch_sampler import TorchSampler  # noqa: E402
from torch_timing import capture, relative_error  # noqa: E402
from torch_topk import torch_topk  # noqa: E402

SUITE = ROOT / "bench" / "gpu_suite.sh"
PROBES = sorted(path.stem for path in (ROOT / "bench" / "probes").glob("*.cu"))
COMMANDS = "bash sh cat chmod dirname env git mkdir mktemp nproc rm sed sleep tee timeout xargs"

# A program compiled by the stub of nvcc: prints a figure, or misbehaves as the test asks.
PROBE = """#!/bin/sh
case "$HANG" in *" ${0##*/} "*) sleep 60;; esac
echo '{"case": "'"${0##*/}"'", "median": 1.5}'
"""

STUBS = {
    "nvidia-smi": "echo 'Stub GPU, 1.0, 80000, 1, 2, 3, 700.00, Disabled'",
    "nvcc": """
case "$*" in --version) echo 'Build stub'; exit 0;; *"$BROKEN"*) echo 'error: broken'; exit 1;; esac
while [ "$1" != -o ]; do shift; done
cp "$STUBS/probe" "$2"
""",
    "ncu": """
[ "$1" = --version ] && echo 1.0 && exit 0
echo '==PROF== Profiling'
case "$*" in
  *gpu_small.py*) while [ "$1" != "$REAL_PYTHON" ]; do shift; done; "$@" || exit
    echo '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    echo '"7","mlp_hidden","gpu__time_duration.sum","ns","1,500"';;
  *) echo '"ID","Kernel Name","Metric Name","Metric Value"'
    echo '"0","doubled(...)","smsp__inst_executed.sum","1,234"';;
esac
""",
    "nsys": """
[ "$1" = --version ] && echo 1.0 && exit 0
for word; do case "$word" in --output=*) touch "${word#--output=}.nsys-rep";; esac; done
[ "$1" = stats ] && echo 'doubled(const float *, ...)'
exit 0
""",
    "compute-sanitizer": """
case "$*" in
  --version) echo 1.0;;
  *gpu_small.py*) while [ "$1" != "$REAL_PYTHON" ]; do shift; done; "$@" || exit
    echo '========= ERROR SUMMARY: 0 errors';;
  *out_of_bounds) echo '========= Invalid __global__ write of size 4 bytes'
    echo '========= ERROR SUMMARY: 1 error';;
  *) echo '========= ERROR SUMMARY: 0 errors';;
esac
""",
    # Limits of seconds would make this test slow; the stub only shortens them.
    "timeout": """
kill=$1 limit=$2; shift 2
case "$HANG" in *" ${1##*/} "*) limit=1;; esac
exec "$REAL_TIMEOUT" "$kill" "$limit" "$@"
""",
    # Real scripts on tiny inputs; building and testing are other tests' business.
    "python3": """
echo "$*" >>"$STUBS/calls"
case "$1 $2" in
  setup.py*|"-m pytest"|-c*) echo stub; exit 0;;
  bench/torch_*|bench/gpu_*|bench/triton_*)
    [ -n "$QUICK" ] && echo '{"case": "stub"}' && exit 0;;
esac
case "$1" in
  bench/torch_rates.py) set -- "$@" --device cpu --size 65 --dim 8 --batches 1 3;;
  bench/torch_sampler.py) set -- "$@" --device cpu --dim 8 --steps 3 --batches 1 3
    export TORCHDYNAMO_DISABLE=1;;
  bench/torch_topk.py) set -- "$@" --device cpu --items 129 --dim 8 --k 5 --batches 1 3 --chunk 2;;
  bench/gpu_*|bench/triton_*) [ -z "$INTERPRETER" ] && echo '{"case": "stub"}' && exit 0
    export TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1 CUDA_VISIBLE_DEVICES=
    export PYTHONPATH="$STUBS/interpreter:$PYTHONPATH";;
esac
case "$1" in
  bench/gpu_topk.py) set -- "$@" --dims 8 --batches 1 --items 129 --repeats 1;;
  bench/gpu_sample.py) set -- "$@" --dims 8 --batches 1 --steps 1 --repeats 1 --dtypes fp32;;
  bench/gpu_training.py) set -- "$@" --gather 1x3x5 --cross-entropy 9x3x1 --mlp 3x1 --adaln 4x1x1 \
    --repeats 1 --dtypes fp32;;
  bench/gpu_engine.py) set -- "$@" --small --users 5 --few 2 --rounds 1 --items 60 --dim 8 \
    --steps 2 --batches 3;;
esac
exec "$REAL_PYTHON" "$@"
""",
}

# The parts in the suite's order: most important first.
PARTS = ["environment", "compile-probes"]
PARTS += [f"probe-{name}" for name in "clusters barriers dsmem wgmma multicast".split()]
PARTS += [f"probe-{name}" for name in "elementwise graph copy".split()]
PARTS += ["torch-rates", "torch-sampler", "torch-topk", "build", "import-extension", "tests-gpu"]
PARTS += ["triton-topk", "triton-sample", "engine", "triton-training", "triton-training-fp32"]
PARTS += ["triton-cooperative", "tests-cooperative", "triton-memcheck", "triton-ncu"]
PARTS += [
    "engine-compiled",
    "torch-sampler-compile",
    "tool-ncu",
    "tool-compute-sanitizer",
    "tool-nsys",
    "tests",
]
# What the parts of the Triton kernels write.
SAMPLE_AND_TOPK, TRAINING = ("topk", "sample", "cooperative"), ("training", "training-fp32")
MEASURED = {
    f"{kind}-{name}.json" for kind in ("gpu", "rows") for name in (*SAMPLE_AND_TOPK, *TRAINING)
} | {"gpu-engine.json", "gpu-engine-compiled.json"}


@pytest.fixture
def dry_run(tmp_path):
    """dry_run(*arguments, missing=(), **environment) -> (process, results, stub folder)."""

    def run(*arguments, missing=(), **environment):
        stubs, tools, out = tmp_path / "stubs", tmp_path / "tools", tmp_path / "out"
        stubs.mkdir()
        tools.mkdir()
        for command in [*COMMANDS.split(), "cp", "touch"]:
            (tools / command).symlink_to(shutil.which(command))
        (stubs / "probe").write_text(PROBE)
        (stubs / "probe").chmod(0o755)
        for name, body in STUBS.items():
            if name not in missing:
                (stubs / name).write_text(f"#!/bin/sh\n{body}")
                (stubs / name).chmod(0o755)
        (stubs / "interpreter").mkdir(exist_ok=True)
        (stubs / "interpreter" / "sitecustomize.py").write_text(
            f"import sys; sys.path.append({str(ROOT / 'tests')!r})\n"
            "import conftest; conftest.repair_interpreter()\n"
        )
        settings = {
            "PATH": f"{stubs}:{tools}",  # nothing else: a missing stub is a missing tool
            "CUDA_HOME": str(stubs / "none"),
            "STUBS": str(stubs),
            "REAL_PYTHON": sys.executable,
            "REAL_TIMEOUT": shutil.which("timeout"),
            "OMP_NUM_THREADS": "1",
            "HANG": "",
            "INTERPRETER": "" if interpreter_obstacle() else "1",
            "BROKEN": "no such source",
            "COMMIT": "from COMMIT",
        }
        kept = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
        process = subprocess.run(
            ["bash", str(SUITE), str(out), *arguments],
            env=kept | settings | environment,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert {path.name for path in out.iterdir()} - MEASURED == {"log.txt", "results.json"}
        results = json.loads((out / "results.json").read_text())
        assert list(results["parts"]) == PARTS
        return process, results, stubs

    return run


def statuses(results):
    return {name: part["status"] for name, part in results["parts"].items()}


def test_every_command_line_runs(dry_run):
    process, results, stubs = dry_run("1200")  # by far enough on a busy machine, too
    problems = {
        n: (p["reason"], p["tail"]) for n, p in results["parts"].items() if p["status"] != "ok"
    }
    assert not problems, problems
    assert process.returncode == 0, process.stdout + process.stderr
    assert results["environment"]["gpu"]["name"] == "Stub GPU"
    assert results["environment"]["packages"]["torch"] == metadata.version("torch")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|from COMMIT", results["commit"])
    for name, part in results["parts"].items():
        assert part["seconds"] >= 0 and part["limit"] > 0 and part["command"], name
    for name in PROBES:
        if name != "tool_sample":
            assert results["parts"][f"probe-{name}"]["figures"] == [{"case": name, "median": 1.5}]
    for name in ("torch-rates", "torch-sampler", "torch-topk", "torch-sampler-compile"):
        figures = results["parts"][name]["figures"]
        assert figures and any(figure.get("verified") for figure in figures)
    assert results["parts"]["tool-ncu"]["figures"][-1]["smsp__inst_executed.sum"] == 1234
    calls = (stubs / "calls").read_text()
    for words in ("setup.py -q build_ext --inplace", "-n 8 -m gpu -k not coop", "-n 8 -m not gpu"):
        assert words in calls
    assert f"{len(PARTS)} of {len(PARTS)} parts ok" in process.stdout
    if interpreter_obstacle():
        return
    out = stubs.parent / "out"
    assert MEASURED == {path.name for path in out.iterdir()} - {"log.txt", "results.json"}
    for name in SAMPLE_AND_TOPK:
        measured = json.loads((out / f"gpu-{name}.json").read_text())["results"]
        for case in measured:
            assert case["percent_of_floor"] > 0 and case["x_torch"] > 0 and case["x_graph"] > 0
            assert case["x_torch_graph"] > 0 and case["x_reference"] > 0 and case["bucket"]
        backends = {case["backend"] for case in measured}
        assert {"torch", "torch+graph", "compile+graph", "reference"} <= backends
        assert ("triton cooperative-pre" in backends) == (name == "cooperative")
        for row in json.loads((out / f"rows-{name}.json").read_text()):
            assert dispatch_table.flaw(row) == "measured on no GPU"
    for name in TRAINING:
        measured = json.loads((out / f"gpu-{name}.json").read_text())["results"]
        assert {case["backend"] for case in measured} >= {"triton", "reference", "compile"}
        for case in measured:
            assert case["percent_of_floor"] > 0 and case["x_torch"] > 0 and case["x_compile"] > 0
        rows = json.loads((out / f"rows-{name}.json").read_text())
        assert {row["bucket"] for row in rows} == {case["bucket"] for case in measured}
        assert {dispatch_table.flaw(row) for row in rows} == {"measured on no GPU"}
    for name, models in (("engine", 2), ("engine-compiled", 1)):
        measured = json.loads((out / f"gpu-{name}.json").read_text())["results"]
        for way in ("released", "torch", "engine", "undrafted", "latent", "fp8"):
            cases = [case for case in measured if case.get("backend") == way]
            assert len(cases) == models and all(case["users_per_s"] > 0 for case in cases)
        known = [case for case in measured if "reached" in case]
        assert len(known) == models
        for case in known:
            assert case["texts agree"] and case["condition error"] < 0.2
            assert case["floor"] > 0 and case["engine counters"]["replays"] > 0
            assert case["reached"].keys() == case["targets"].keys()
    checked = results["parts"]["triton-memcheck"]["figures"]
    assert checked[-1] == {"case": "memcheck", "errors": 0, "exit_status": 0}
    assert len(checked) > 16 and all(figure["verified"] for figure in checked[:-1])
    profiled = results["parts"]["triton-ncu"]["figures"]
    assert profiled == [{"case": "mlp_hidden", "microseconds": 1.5}]


def test_failures_are_reported_and_the_rest_runs(dry_run):
    process, results, _ = dry_run(missing=["ncu"], QUICK="1", HANG=" barriers ", BROKEN="wgmma.cu")
    bad = {name: status for name, status in statuses(results).items() if status != "ok"}
    assert bad == {
        "compile-probes": "failed",
        "probe-wgmma": "failed",
        "probe-barriers": "timeout",
        "tool-ncu": "failed",
    }
    assert process.returncode == 1
    parts = results["parts"]
    assert parts["tool-ncu"]["reason"] == "ncu: not found on PATH"
    assert "error: broken" in parts["compile-probes"]["tail"]
    assert parts["probe-barriers"]["reason"].startswith("exceeded")
    assert "wgmma" in parts["probe-wgmma"]["reason"]


def test_tools_that_run_but_do_not_work(dry_run, monkeypatch):
    monkeypatch.setitem(STUBS, "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM'")
    monkeypatch.setitem(STUBS, "nsys", "echo 'no report'")
    monkeypatch.setitem(STUBS, "compute-sanitizer", "echo 'ERROR SUMMARY: 0 errors'")
    process, results, _ = dry_run(QUICK="1")
    bad = {name: status for name, status in statuses(results).items() if status != "ok"}
    assert bad == dict.fromkeys(["tool-ncu", "tool-compute-sanitizer", "tool-nsys"], "failed")
    for name in bad:
        assert "does not work here" in results["parts"][name]["reason"]
    assert process.returncode == 1


def test_without_a_gpu_toolkit(dry_run):
    process, results, _ = dry_run(
        missing=["nvcc", "nvidia-smi", "nsys", "compute-sanitizer"], QUICK="1"
    )
    parts = results["parts"]
    assert process.returncode == 1
    assert parts["environment"]["reason"] == "missing on PATH: nvidia-smi, nvcc"
    assert parts["compile-probes"]["reason"] == "nvcc: not found on PATH"
    assert "nvidia-smi" in results["environment"]["gpu"]
    for name in PARTS:
        if name.startswith("probe-") or name in ("tool-nsys", "tool-compute-sanitizer"):
            assert parts[name]["status"] == "failed" and parts[name]["reason"], name
    assert parts["torch-topk"]["status"] == "ok"


def test_no_time_left(dry_run):
    process, results, _ = dry_run("0")
    assert set(statuses(results).values()) == {"timeout"}
    assert {part["reason"] for part in results["parts"].values()} == {"no time left for it"}
    assert process.returncode == 1


def test_every_probe_has_a_part():
    assert {f"probe-{name}" for name in PROBES if name != "tool_sample"} == {
        name for name in PARTS if name.startswith("probe-")
    }


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_probes_compile(tmp_path):
    compiled = subprocess.run(
        ["bash", str(ROOT / "bench" / "probes" / "compile.sh"), str(tmp_path), "2"],
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    assert "warning" not in compiled.stdout + compiled.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == PROBES


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
@pytest.mark.parametrize(("batch", "dim", "guidance"), [(1, 4, 2.0), (3, 7, 0.0), (129, 8, 2.0)])
def test_torch_sampler_follows_the_plan(batch, dim, guidance, prediction, compiled):
    steps = 5
    denoiser = MLPDenoiser(dim).double().requires_grad_(False)
    plan = plan_sampling(denoiser, timesteps=steps, guidance=guidance, prediction=prediction)
    sampler = TorchSampler.from_plan(denoiser, plan, guidance, torch.float64, compiled)
    if compiled:
        sampler.step = sampler._fused_step  # what would be compiled, without the compiler
    condition = torch.randn(batch, dim, dtype=torch.float64)
    noise = torch.randn(steps, batch, dim, dtype=torch.float64)
    given = noise.clone()
    expected = plan(condition, noise=noise)
    torch.testing.assert_close(sampler(condition, noise), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(noise, given)
    fresh = sampler(condition)
    assert fresh.shape == expected.shape and not torch.allclose(fresh, expected)


def test_torch_sampler_refuses_a_multistep_solver():
    plan = plan_sampling(MLPDenoiser(4), timesteps=5, method="dpm++")
    with pytest.raises(ValueError, match="^coefficients: .*multistep"):
        TorchSampler.from_plan(MLPDenoiser(4), plan, 2.0, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torch_sampler_in_low_precision(dtype):
    denoiser = MLPDenoiser(16).requires_grad_(False)
    plan = plan_sampling(denoiser, timesteps=5)
    condition, noise = torch.randn(9, 16), torch.randn(5, 9, 16)
    exact = TorchSampler.from_plan(denoiser, plan, 2.0, torch.float64)(
        condition.double(), noise.double()
    )
    low = TorchSampler.from_plan(denoiser, plan, 2.0, dtype)(condition, noise)
    assert low.dtype == torch.float32
    assert relative_error(low, exact) < (5e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_torch_sampler_as_a_graph(compiled):
    device = torch.device("cuda")
    denoiser = MLPDenoiser(64).to(device).requires_grad_(False)
    plan = plan_sampling(denoiser, timesteps=9)
    condition = torch.randn(65, 64, device=device)
    noise = torch.randn(9, 65, 64, device=device)
    sampler = TorchSampler.from_plan(denoiser, plan, 2.0, torch.bfloat16, compiled)
    replay, output = capture(lambda: sampler(condition, noise), device)
    for _ in range(2):
        condition.normal_()
        noise.normal_()
        output.fill_(torch.nan)
        replay()
        exact = TorchSampler.from_plan(denoiser, plan, 2.0, torch.float64)(
            condition.double(), noise.double()
        )
        assert relative_error(output, exact) < 5e-2


@pytest.mark.parametrize(("batch", "items", "k"), [(1, 1, 1), (3, 129, 20), (5, 127, 127)])
def test_torch_topk_equals_a_loop(batch, items, k):
    queries = torch.randn(batch, 7, dtype=torch.float64)
    vectors = F.normalize(torch.randn(items, 7, dtype=torch.float64), dim=1)
    groups = torch.randint(4, (items,))
    matched = torch.rand(batch, 4) < 0.5
    seen = [torch.randperm(items)[: items // 3] for _ in range(batch)]
    rows = torch.cat([torch.full((len(ids),), row) for row, ids in enumerate(seen)])
    scores, ids = torch_topk(
        queries, vectors, groups, matched, rows.long(), torch.cat(seen).long(), 0.1, k
    )
    for row in range(batch):
        expected = []
        for item in range(items):
            score = (queries[row] / queries[row].norm() @ vectors[item]).item()
            score *= 1.1 if matched[row, groups[item]] else 1.0
            expected.append(-float("inf") if item in seen[row] else score)
        best = sorted(expected, reverse=True)[:k]
        torch.testing.assert_close(scores[row], torch.tensor(best, dtype=torch.float64))
        taken = torch.tensor(expected, dtype=torch.float64)[ids[row]]
        torch.testing.assert_close(taken, scores[row])
