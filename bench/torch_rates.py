"""Ceilings through plain PyTorch: large bf16 product, copy, and the products of a sampler step.

python bench/torch_rates.py
"""

import sys

import torch
from torch_timing import arguments, capture, measure, relative_error, report

CHAIN = 20  # dependent pairs of products in one graph


def main() -> bool:
    asked = arguments(__doc__, size=8192, dim=512, batches=[1, 16, 64, 256, 1024, 4096])
    device, size, dim = asked.device, asked.size, asked.dim
    right = True

    def normal(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    a, b = normal(size, size), normal(size, size)
    product = a @ b
    rows = torch.randint(size, (8,), device=device)
    error = relative_error(product[rows], a[rows].double() @ b.double())
    right &= error < 1e-2
    timing = measure(lambda: torch.mm(a, b, out=product), device)
    report(
        "matrix_product",
        size=size,
        **timing,
        tflop_s=2e-6 * size**3 / timing["median"],
        relative_error=error,
        verified=error < 1e-2,
    )
    source = normal(8 * size, size)  # many times the L2 cache
    copied = torch.full_like(source, torch.nan)
    timing = measure(lambda: copied.copy_(source), device)
    moved = 2 * source.numel() * source.element_size()
    same = torch.equal(copied, source)
    right &= same
    report("torch_copy", **timing, gb_s=1e-3 * moved / timing["median"], verified=same)

    into, back = normal(dim, 2 * dim) / dim**0.5, normal(2 * dim, dim) / (2 * dim) ** 0.5
    for batch in asked.batches:
        start = normal(batch, dim)

        def chain(start=start):
            x = start
            for _ in range(CHAIN):
                x = (x @ into) @ back
            return x

        replay, _ = capture(chain, device)
        timing = measure(replay, device, seconds=0.2)
        report(
            "step_products",
            batch=batch,
            dim=dim,
            **timing,
            us_per_step=timing["median"] / CHAIN,
            tflop_s=CHAIN * 8e-6 * batch * dim**2 / timing["median"],
        )
    return right


if __name__ == "__main__":
    sys.exit(not main())
