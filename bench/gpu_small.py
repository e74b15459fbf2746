"""The Triton kernels once each, for tools that look over a kernel's shoulder: compute-sanitizer and
ncu (`triton_tools.py` runs both).

    python bench/gpu_small.py odd|hot

odd: shapes that fill no tile, checked against the references. hot: the kernels that take the time,
at sizes that fill a GPU, three steps each; the form with a barrier is left out.
"""

import argparse
import sys

import torch
from cpu_sample import DTYPES, LIMITS
from gpu_sample import FORMS, KINDS
from gpu_sample import Case as SampleCase
from gpu_timing import device_here
from gpu_topk import GROUPS
from gpu_topk import Case as TopKCase
from torch_timing import report
from training_cases import Case, CrossEntropy, Denoise, Gather, GatherBackward

from contrec_fast import ops


def sampler(kind, dtype, users, dim, device, forms=FORMS, steps=3, width=48, depth=1) -> SampleCase:
    sizes = argparse.Namespace(
        users=users, dim=dim, steps=steps, width=width, depth=depth, forms=forms
    )
    return SampleCase(kind, dtype, sizes, device)


def top_k(batch, items, dim, k, device) -> TopKCase:
    groups = torch.randint(GROUPS, (items,), device=device)
    return TopKCase(ops.Catalog(torch.randn(items, dim, device=device), groups), batch, k)


def training(device, dtype, gather, loss, mlp, adaln) -> list[Case]:
    """The operations of training at such shapes: each kernel at least once."""
    both = False, True
    cases = [Gather(gather, dtype, device, factored) for factored in both]
    cases += [GatherBackward(gather, dtype, device, of_text=True)]
    cases += [CrossEntropy(loss, dtype, device)]
    cases += [Denoise("mlp", mlp, dtype, device, guided, train=True) for guided in both]
    return [*cases, Denoise("adaln", adaln, dtype, device, guided=True, train=True)]


def odd(device: torch.device) -> bool:
    """Whether all were right."""
    right = True
    compiled = device.type == "cuda"  # triton 3.6 interprets products of bfloat16 wrongly
    for batch, items, dim, k in ((3, 127, 33, 127), (3, 3001, 33, 20), (129, 3001, 136, 3)):
        if compiled or batch == 3:
            verified = top_k(batch, items, dim, k, device).right()
            report("cosine_topk", batch=batch, items=items, dim=dim, k=k, verified=verified)
            right &= verified
    for name in ("fp32", "bf16") if compiled else ("fp32",):
        shapes = (3, 43, 33), (127, 33, 3), (33, 3), (35, 1, 3)
        for case in training(device, DTYPES[name], *shapes):
            verified = case.right()
            report(case.name, shape=case.shape, dtype=name, verified=verified)
            right &= verified
    for kind in KINDS:  # the form with a barrier comes last
        for dtype in ("fp32", "bf16") if compiled else ("fp32",):
            for users, dim in ((3, 33), (129, 136)) if compiled else ((3, 33),):
                case = sampler(kind, dtype, users, dim, device)
                case.kernels()  # noise of its own; what follows has scripted noise
                for name, error in case.errors().items():
                    verified = error < LIMITS[dtype]
                    report(
                        f"sample {kind} {name}", users=users, dim=dim, dtype=dtype,
                        relative_error=error, verified=verified,
                    )  # fmt: skip
                    right &= verified
    return right


def hot(device: torch.device) -> bool:
    users, dim, items = (4096, 512, 1 << 18) if device.type == "cuda" else (3, 33, 3001)
    wide = sampler("mlp", "bf16", users, dim, device, forms=("step", "step-pre"))
    wide.kernels("step")
    wide.kernels("step-pre")
    narrow = sampler("mlp", "bf16", users, min(64, dim), device, forms=("persistent",))
    narrow.kernels("persistent")
    narrow.kernels("persistent-pre")
    sampler("adaln", "bf16", users // 4 + 1, dim, device, width=2 * dim).kernels()
    for batch in (1, users // 16 + 1):
        top_k(batch, items, dim, 20, device).search()
    sizes = (256, 400, 2048), (100_000, 512, 1024), (512, 4096), (1024, 3, 4096)
    if device.type != "cuda":
        sizes = (1, 3, 5), (9, 3, 1), (3, 1), (4, 1, 1)
    for case in training(device, torch.bfloat16, *sizes):
        case.results(case.function("triton"))
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", choices=["odd", "hot"])
    asked = parser.parse_args()
    device = device_here(parser)
    right = {"odd": odd, "hot": hot}[asked.shapes](device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
