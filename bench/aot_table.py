"""What the Triton kernels compile to in their default configurations; needs no GPU.

    python -m bench.aot_table --out FILE [--only PART ...]

One line per kernel and architecture (sm_80, sm_90), and FILE as JSON. Exits 1 if a kernel spills
registers or asks for more shared memory than there is. `--only` takes cases whose name contains
one of the words.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported

import torch
import triton
from contrec_kernels import aot, cross_entropy, gather, topk
from contrec_kernels.denoise import TritonSteps
from torch import Tensor
from triton.runtime import driver

from contrec_fast.models.denoisers import DENOISERS
from contrec_fast.ops import plan_sampling
from contrec_fast.ops.denoise import describe
from contrec_fast.ops.denoise_gradients import denoise_recomputed
from contrec_fast.ops.triton_sampling import run_sample

CAPABILITIES = (80, 90)


def sample(
    kind: str,
    dtype: torch.dtype,
    batch: int,
    method: str = "ddpm",
    form: str | None = None,
    **sizes,
) -> Callable[[], Tensor]:
    """A sampler's launches: fresh noise, two draws, guidance; sizes are of the denoiser."""

    def launch() -> Tensor:
        denoiser = DENOISERS[kind](**sizes).to(dtype)
        plan = plan_sampling(denoiser, timesteps=3, method=method)
        condition, users = torch.zeros(batch, plan.dim, dtype=dtype), torch.zeros(batch).long()
        return run_sample(
            condition, torch.zeros(()).long(), users, 2, None, plan.weights, plan.times,
            plan.coefficients, plan.noises, plan.multistep, plan.description, plan.guidance,
            **({"form": form} if form else {}),
        )  # fmt: skip

    return launch


def top_k(batch: int, dim: int) -> Callable[[], None]:
    """The launches of certified top-K: seen lists, without and with a bonus."""

    def launch():
        count, capability = 1 << 14, driver.active.get_current_target().arch
        items = torch.zeros(count, dim)
        seen = torch.zeros(batch + 1).long(), torch.zeros(4).long(), torch.zeros(batch).long()
        for matched in (None, torch.zeros(batch, 16).bool()):
            topk.search(
                torch.zeros(batch, dim), items, torch.zeros(count).double(), items.bfloat16(),
                torch.zeros(count), torch.zeros(count).int(), torch.zeros(count).bool(), 20,
                matched, 0.1, *seen, tiles=topk.tiles_for(batch, dim, aot.SHARED_LIMIT[capability]),
            )  # fmt: skip

    return launch


def gathered(dtype: torch.dtype, factored: bool) -> Callable[[], None]:
    """The launches of `gather_tokens`; of a whole table, its gradients' too."""

    def launch():
        ids, width = torch.zeros(8, 512).long(), 2048
        text, out = (torch.zeros(shape, dtype=dtype) for shape in ((16, width), (8, 512, width)))
        if factored:
            shapes = (16, 256), (2, width, 256), (2, width)
            table = (torch.zeros(shape, dtype=dtype) for shape in shapes)
            return gather.gather_tokens(ids, ids, text, *table, out)
        gather.gather_tokens(ids, ids, text, text, None, None, out)
        gather.gather_tokens_backward(out, ids, ids, 16, 16, True, True)

    return launch


def loss(dtype: torch.dtype, batch: int, dim: int) -> Callable[[], None]:
    """The launches of the cross-entropy and its gradients: without and with lists, smoothing."""

    def launch():
        rows = torch.zeros(batch).long()
        queries, vectors = (torch.zeros(n, dim, dtype=dtype) for n in (batch, 1 << 14))
        for similarity, smoothing, seen in (
            ("cosine", 0.0, (None, None, None)),
            ("dot", 0.1, (torch.zeros(batch + 1).long(), torch.zeros(4).long(), rows)),
        ):
            call = queries, vectors, rows, 0.1, similarity, smoothing, *seen
            losses, *kept = cross_entropy.forward(*call)
            cross_entropy.backward(*call, *kept, losses, (True, True))

    return launch


def denoise(kind: str, dtype: torch.dtype, batch: int, guidance: float, **sizes):
    """The launches of an evaluation and its gradients: dropped conditions, one step for all."""

    def launch():
        denoiser = DENOISERS[kind](**sizes).to(dtype)
        x = torch.zeros(batch, denoiser.dim, dtype=dtype)
        drop, weights = torch.zeros(batch).bool(), list(denoiser.parameters())
        denoise_recomputed(
            TritonSteps(), x, x, torch.zeros(1).long(), weights, describe(denoiser), guidance, drop
        ).sum().backward()

    return launch


def cases() -> dict[str, Callable[[], object]]:
    """Host code by the name of its case."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        found[f"gather H=2048 {name}"] = gathered(dtype, False)
        found[f"gather factored H=2048 {name}"] = gathered(dtype, True)
    for dim in (64, 512):
        for batch in (1, 64, 1024):
            found[f"topk D={dim} B={batch}"] = top_k(batch, dim)
    for dtype, name in (
        (torch.bfloat16, "bf16"),
        (torch.float16, "fp16"),
        (torch.float32, "fp32"),
    ):
        for dim in (64, 512):
            for batch in (1, 256):
                found[f"loss D={dim} B={batch} {name}"] = loss(dtype, batch, dim)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        mlp, head = (
            functools.partial(sample, "mlp", dtype),
            functools.partial(sample, "adaln", dtype),
        )
        for dim, batch in [(64, 32), (64, 512), (128, 32), (512, 32), (512, 512), (512, 2048)]:
            found[f"sample mlp D={dim} B={batch} {name}"] = mlp(batch, dim=dim)
        for batch in (32, 2048):
            label = f"D=512 B={batch} {name}"
            found[f"sample linear {label}"] = sample("linear", dtype, batch, dim=512)
            sizes = {"dim": 512, "width": 1024, "depth": 1}
            found[f"sample adaln W=1024 {label}"] = head(batch, **sizes)
            found[f"sample separable W=1024 {label}"] = head(batch, separable=True, **sizes)
        found[f"sample mlp dpm++ D=512 B=2048 {name}"] = mlp(2048, "dpm++", dim=512)
        found[f"sample mlp dpm++ D=64 B=32 {name}"] = mlp(32, "dpm++", dim=64)
        for guidance in (0.0, 2.0):
            for dim, batch in [(64, 512), (512, 64), (512, 2048), (512, 4096)]:
                found[f"denoise mlp D={dim} B={batch} w={guidance:.0f} {name}"] = denoise(
                    "mlp", dtype, batch, guidance, dim=dim
                )
        for batch in (32, 2048):
            sizes = {"dim": 512, "width": 1024, "depth": 1}
            for kind in ("adaln", "separable"):
                found[f"denoise {kind} W=1024 D=512 B={batch} {name}"] = denoise(
                    "adaln", dtype, batch, 2.0, separable=kind == "separable", **sizes
                )
    for form in ("persistent", "step-pre"):
        found[f"sample mlp {form} D=512 bf16"] = sample(
            "mlp", torch.bfloat16, 2048, form=form, dim=512
        )
    return found


def table(only: list[str]) -> list[dict]:
    """Rows of `aot.figures` with the architecture, its cases and its faults."""
    rows = {}
    for case, function in cases().items():
        if only and not any(word in case for word in only):
            continue
        for capability in CAPABILITIES:
            for kernel in aot.compiled(function, capability):
                if kernel.hash in rows:
                    rows[kernel.hash]["cases"].append(case)
                    continue
                row = {"architecture": f"sm_{capability}", "cases": [case]} | aot.figures(kernel)
                rows[kernel.hash] = row | {"faults": aot.faults(row, capability)}
                print(line(rows[kernel.hash]), flush=True)
    return list(rows.values())


def line(row: dict) -> str:
    counts = " ".join(f"{name} {count}" for name, count in row["instructions"].items())
    return (
        f"{row['architecture']} | {row['cases'][0]} | {row['kernel']} | {row['warps']} warps, "
        f"{row['stages']} stages | {row['registers']} registers | {row['shared'] / 1024:.0f} KiB | "
        f"{counts} | {'; '.join(row['faults']) or 'ok'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    rows = table(asked.only)
    whole = asked.out.with_suffix(".partial")
    stored = {"triton": triton.__version__, "torch": torch.__version__, "kernels": rows}
    whole.write_text(json.dumps(stored, indent=1) + "\n")
    whole.replace(asked.out)
    return any(row["faults"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
