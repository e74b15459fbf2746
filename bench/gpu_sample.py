"""`sample` in Triton on a GPU: right first, then how fast, against plain PyTorch.

    python bench/gpu_sample.py --out FILE [--rows FILE] [--kinds mlp linear adaln separable]

Each case is checked against the reference in float64 on scripted noise, on its first users, before
it is timed; counter-based noise then. Variants take turns, on other conditions each time:

- triton: launched from Python; triton+graph: the same as a replayed CUDA graph; for mlp also every
  other form of `contrec_kernels.sampling` as a graph, so that `choose_form` can be checked;
- torch, compile+graph: `torch_sampler.py` (folded, hoisted, noise in bulk) as a graph, its step
  compiled for the latter; for other kinds than mlp the reference, launched from Python.

The floor is the products over the bf16 matrix rate, both measured first; for few users the chain's
latency is what counts, not the floor. `--rows` writes the rows of contrec_fast/ops/measured.json
that this run supports: how much faster than the reference, in the worst case of a bucket.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch
from cpu_sample import DTYPES, GUIDANCE, LIMITS, make, operations
from gpu_topk import ceilings, interleaved
from reporting import COLUMNS, environment, line, positive, record, store
from torch_sampler import TorchSampler
from torch_timing import capture, relative_error

from contrec_fast.ops import dispatch, plan_sampling, triton_sampling

ROTATED, CHECKED = 4, 8


class Case:
    """A plan, conditions that rotate in one place, and what can serve them."""

    def __init__(self, kind: str, dtype: str, asked: argparse.Namespace, device: torch.device):
        from contrec_kernels import sampling

        self.dtype = DTYPES[dtype]
        denoiser = make(kind, asked.dim, asked.width, asked.depth).to(device, self.dtype)
        self.plan, self.exact = (
            plan_sampling(network, timesteps=asked.steps, guidance=GUIDANCE)
            for network in (denoiser, copy.deepcopy(denoiser).double())
        )
        self.others = torch.randn(ROTATED, asked.users, asked.dim, device=device).to(self.dtype)
        self.condition = self.others[0].clone()
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self.users = torch.arange(asked.users, device=device)
        forms = ()
        if kind == "mlp":
            forms = [form for form in sampling.FORMS if self._fits(form, asked.dim)]
        self.functions = {"triton": self.kernels}
        self.functions["triton+graph"] = capture(self.kernels, device)[0]
        for form in forms:
            self.functions[f"triton {form}"] = capture(
                lambda form=form: self.kernels(form), device
            )[0]
        if kind == "mlp":
            for name, compiled in (("torch", False), ("compile+graph", True)):
                plain = TorchSampler.from_plan(denoiser, self.plan, GUIDANCE, self.dtype, compiled)
                run = capture(lambda plain=plain: plain(self.condition), device)[0]
                self.functions[name] = run
        else:
            self.functions["torch"] = self.reference
        self.forms = [None, *forms]

    def _fits(self, form: str, dim: int) -> bool:
        if form == "persistent-pre":
            return dim <= 64
        return form != "persistent" or dim <= (512 if self.dtype == torch.bfloat16 else 128)

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

    def errors(self) -> dict[str | None, float]:
        """Relative error of each form, on scripted noise for all users, of the first ones."""
        noise = torch.randn(self.plan.steps, *self.condition.shape).to(self.condition)
        some = self.condition[:CHECKED].double(), noise[:, :CHECKED].double()
        expected = self.exact(some[0], noise=some[1], backend="reference")
        return {
            form: relative_error(self.kernels(form, noise)[:CHECKED], expected)
            for form in self.forms
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["mlp"])
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
    if not torch.cuda.is_available():
        print(f"gpu_sample: needs a CUDA GPU; torch {torch.__version__} sees none")
        return 1
    bandwidth, rate = ceilings()
    print(f"copy {bandwidth / 1e9:.0f} GB/s, bf16 product {rate / 1e12:.0f} TFLOP/s\n{COLUMNS}")
    surroundings = environment("cuda")
    settings = {name: str(value) for name, value in vars(asked).items()}
    cases, rows, wrong = [], {}, set()
    shapes = [
        (kind, dtype, dim, steps, batch)
        for kind in asked.kinds
        for dtype in asked.dtypes
        for dim in asked.dims
        for steps in asked.steps
        for batch in asked.batches
    ]
    for kind, dtype, dim, steps, batch in shapes:
        sizes = argparse.Namespace(
            dim=dim, width=asked.width, depth=asked.depth, steps=steps, users=batch
        )
        case = Case(kind, dtype, sizes, torch.device("cuda"))
        shape = f"{kind} B={batch} D={dim} T={steps}"
        bucket = triton_sampling._bucket(*case.arguments())
        errors = case.errors()
        for form, error in errors.items():
            if not error < LIMITS[dtype]:
                print(
                    f"{shape} {dtype} {form or 'default'}: relative error {error:.2g}", flush=True
                )
                wrong.add(bucket)
        times = interleaved(case.functions, case.rotate, asked.repeats)
        slow = interleaved({"reference": case.reference}, case.rotate, 3)["reference"]
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        flops = float(operations(kind, sizes))
        for name, seconds in times.items():
            done = record(
                "sample", shape, dtype, name, seconds, flops, None, flops / rate, median["torch"],
                median.get("compile+graph"),
            )  # fmt: skip
            print(line(done), flush=True)
            cases.append(done | {"relative_error": errors.get(name.removeprefix("triton "))})
        speedup = statistics.median(slow) / median["triton"]
        rows[bucket] = min(speedup, rows.get(bucket, speedup))
        store(asked.out, surroundings, settings, cases)  # a run that is cut off keeps what it had
    if asked.rows:
        common = {
            "operation": "sample",
            "backend": "triton",
            "architecture": "sm_{}{}".format(*torch.cuda.get_device_capability()),
            "source": dispatch.source_hash(*triton_sampling.SOURCES),
        }
        found = [
            common | {"bucket": bucket, "speedup": round(speedup, 3)}
            for bucket, speedup in rows.items()
            if speedup > 1 and bucket not in wrong
        ]
        asked.rows.write_text(json.dumps(found, indent=2) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
