"""`sample` in Triton on a GPU: right first, then how fast, against plain PyTorch.

    python bench/gpu_sample.py --out FILE [--rows FILE] [--kinds mlp linear adaln separable]

Each case is checked against the reference in float64 on scripted noise, on its first users, before
it is timed; counter-based noise then. Variants take turns, on other conditions each time:

- triton: launched from Python; triton+graph: the same as a replayed CUDA graph; for mlp also each
  form of `contrec_kernels.sampling` as a graph, so that `choose_form` can be checked. `--forms`
  keeps other forms from running at all, as "triton", too;
- torch, torch+graph, compile+graph: `torch_sampler.py` (folded, hoisted, noise in bulk), its step
  compiled for the latter; for other kinds than mlp the reference, launched from Python.

The floor is the larger of the products over the bf16 matrix rate and the weights and vectors, once,
over the copy bandwidth, both measured first; for few users the chain's latency is what counts, not
the floor. `--rows` writes the rows that this run supports for `dispatch_table.py`.
"""

import argparse
import copy
import math
import statistics
import sys
from pathlib import Path

import torch
from cpu_sample import DTYPES, GUIDANCE, LIMITS, make, operations
from dispatch_table import Rows
from gpu_timing import ceilings, device_here, interleaved
from reporting import COLUMNS, environment, line, positive, record, store
from torch_sampler import TorchSampler
from torch_timing import capture, relative_error

from contrec_fast.ops import plan_sampling, triton_sampling
from contrec_fast.ops.denoise import describe

KINDS = ("linear", "adaln", "separable", "mlp")
FORMS = ("persistent", "persistent-pre", "step", "step-pre", "cooperative-pre")
ROTATED, CHECKED = 4, 8


class Case:
    """A plan, conditions that rotate in one place, and what can serve them."""

    def __init__(self, kind: str, dtype: str, asked: argparse.Namespace, device: torch.device):
        from contrec_kernels import sampling

        self.kind, self.dtype = kind, DTYPES[dtype]
        self.denoiser = make(kind, asked.dim, asked.width, asked.depth).to(device, self.dtype)
        self.plan, self.exact = (
            plan_sampling(network, timesteps=asked.steps, guidance=GUIDANCE)
            for network in (self.denoiser, copy.deepcopy(self.denoiser).double())
        )
        self.others = torch.randn(ROTATED, asked.users, asked.dim, device=device).to(self.dtype)
        self.condition = self.others[0].clone()
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self.users = torch.arange(asked.users, device=device)
        self.forms = {}  # by the variant's name; None is what the kernels choose
        chosen = sampling.choose_form(asked.users, asked.dim, self.dtype, True)
        if kind != "mlp" or chosen in asked.forms:
            self.forms["triton"] = None
        if kind == "mlp":
            fitting = [form for form in asked.forms if self._fits(form, asked.dim)]
            self.forms |= {f"triton {form}": form for form in fitting}

    def functions(self) -> dict:
        """The variants by name."""
        device, found = self.condition.device, {}
        for name, form in self.forms.items():
            found[name] = capture(lambda form=form: self.kernels(form), device)[0]
        if "triton" in found:
            found = {"triton": self.kernels, "triton+graph": found.pop("triton")} | found
        if self.kind == "mlp":
            torch.compiler.reset()  # beyond some variants of one function nothing is compiled
            plain, compiled = (
                TorchSampler.from_plan(
                    self.denoiser, self.plan, GUIDANCE, self.dtype, with_compiler
                )
                for with_compiler in (False, True)
            )
            found["torch"] = lambda: plain(self.condition)
            found["torch+graph"] = capture(found["torch"], device)[0]
            found["compile+graph"] = capture(lambda: compiled(self.condition), device)[0]
        else:
            found["torch"] = self.reference
        return found

    def _fits(self, form: str, dim: int) -> bool:
        if form == "persistent-pre":
            return dim <= 64
        return form != "persistent" or dim <= (512 if self.dtype == torch.bfloat16 else 128)

    @property
    def moved(self) -> float:
        """Bytes of the weights, the conditions and the vectors."""
        tensors = [*self.plan.weights, self.condition, self.condition]
        return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    def arguments(self, noise: torch.Tensor | None = None) -> tuple:
        script = None if noise is None else noise[None]
        return self.condition, self.seed, self.users, 1, script, *self.plan._chain()

    def kernels(self, form: str | None = None, noise: torch.Tensor | None = None) -> torch.Tensor:
        options = {"form": form} if form else {}
        return triton_sampling.run_sample(*self.arguments(noise), **options)[0]

    def reference(self) -> torch.Tensor:
        return self.plan(self.condition, self.seed, self.users, backend="reference")

    def rotate(self, repeat: int) -> None:
        self.condition.copy_(self.others[repeat % ROTATED])
        self.seed.fill_(repeat)

    def errors(self) -> dict[str, float]:
        """Relative error of each variant, on scripted noise for all users, of the first ones."""
        noise = self.condition.new_empty(self.plan.steps, *self.condition.shape).normal_()
        some = self.condition[:CHECKED].double(), noise[:, :CHECKED].double()
        expected = self.exact(some[0], noise=some[1], backend="reference")
        found = {}
        for name, form in self.forms.items():
            try:
                found[name] = relative_error(self.kernels(form, noise)[:CHECKED], expected)
            except Exception as error:  # blocks that do not fit this chip: the others still count
                print(f"{name}: {' '.join(str(error).split())[:200]}", flush=True)
                found[name] = math.inf
        return found


def bucket(kind: str, dtype: str, sizes: argparse.Namespace) -> str:
    """The class of shapes in the dispatch table that a case belongs to."""
    with torch.device("meta"):
        description = describe(make(kind, sizes.dim, sizes.width, sizes.depth))
        condition = torch.empty(sizes.users, sizes.dim, dtype=DTYPES[dtype])
    steps, none = range(sizes.steps), None
    return triton_sampling._bucket(
        condition, none, none, 1, none, none, none, steps, none, none, description, GUIDANCE
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["mlp"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    for name, values in (
        ("dims", [64, 512]),
        ("steps", [3, 20, 200]),
        ("batches", [1, 64, 1024, 4096]),
    ):
        parser.add_argument(f"--{name}", type=positive, nargs="+", default=values)
    for name, value in (("width", 512), ("depth", 3), ("repeats", 20)):
        parser.add_argument(f"--{name}", type=positive, default=value)
    asked = parser.parse_args()
    device = device_here(parser)
    bandwidth, rate = ceilings(device)
    print(f"copy {bandwidth / 1e9:.0f} GB/s, bf16 product {rate / 1e12:.0f} TFLOP/s\n{COLUMNS}")
    surroundings = environment(device.type) | {"copy_bytes_s": bandwidth, "product_flop_s": rate}
    settings = {name: str(value) for name, value in vars(asked).items()}
    fixed = {name: getattr(asked, name) for name in ("width", "depth", "forms")}
    cases, wrong = [], 0
    shapes = [
        (kind, dtype, argparse.Namespace(**fixed, dim=dim, steps=steps, users=users))
        for kind in asked.kinds
        for dtype in asked.dtypes
        for dim in asked.dims
        for steps in asked.steps
        for users in asked.batches
    ]  # fmt: skip
    planned = [bucket(*shape) for shape in shapes]
    rows = Rows(asked.rows, "sample", "triton", planned)
    for (kind, dtype, sizes), class_name in zip(shapes, planned):
        case, flops = Case(kind, dtype, sizes, device), float(operations(kind, sizes))
        shape = f"{kind} B={sizes.users} D={sizes.dim} T={sizes.steps}"
        errors = case.errors()
        bad = {name: error for name, error in errors.items() if not error < LIMITS[dtype]}
        for name, error in bad.items():
            print(f"{shape} {dtype} {name}: relative error {error:.2g}", flush=True)
            del case.forms[name]
        wrong += len(bad)
        times = interleaved(case.functions(), case.rotate, asked.repeats)
        times |= interleaved({"reference": case.reference}, case.rotate, 3)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        for name, seconds in times.items():
            done = record(
                "sample", shape, dtype, name, seconds, flops, case.moved,
                max(flops / rate, case.moved / bandwidth), median["torch"],
                median.get("compile+graph"),
            )  # fmt: skip
            print(line(done), flush=True)
            ratios = {"x_reference": median["reference"] / median[name]}
            if "torch+graph" in median:
                ratios["x_torch_graph"] = median["torch+graph"] / median[name]
            error = errors.get(name.removesuffix("+graph"))
            cases.append(done | ratios | {"bucket": class_name, "relative_error": error})
        store(asked.out, surroundings, settings, cases)  # a run that is cut off keeps what it had
        if "triton" in errors:
            right = "triton" in median
            rows.add(class_name, median["reference"] / median["triton"] if right else 0.0)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
