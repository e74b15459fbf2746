"""Calls of the operations of training, for `gpu_training.py` and `gpu_small.py`: inputs, the
reference in float64, and what a call must move and multiply at least.

A result's relative error may be twice that of the reference in the same dtype, and some units.
"""

import argparse
import functools
import importlib.util
import math

import torch
from cpu_gather import INNER, WAYS, Prompts
from cpu_sample import make, operations
from torch import Tensor
from torch_timing import relative_error

from contrec_fast.ops import dispatch
from contrec_fast.ops.denoise import describe

WORDS, CATALOG, SHOWN = 32_000, 10_000, 20  # words; items, and how many of them a prompt shows
STEPS, ROTATED = 200, 4
EXACT_QUERIES = 64  # whose logits are held in float64 at once
# Gradients are sums over many rows that partly cancel.
UNITS = {torch.float32: 64 * 2.0**-24, torch.bfloat16: 8 * 2.0**-9}


class Case:
    """A call on inputs that rotate in one place.

    Attributes of the kinds of cases: operation; name and shape, as they are printed; dtype;
    arguments, those of the operation's implementations; turning, pairs of an argument and the
    ROTATED values that it takes in turn; flops and moved, least operations and bytes. On the meta
    device nothing can be called, but the bucket can be asked for.
    """

    @property
    def bucket(self) -> str:
        """The class of shapes in the dispatch table."""
        return dispatch._implementations[self.operation]["triton"].bucket(*self.arguments)

    def function(self, backend: str):
        return dispatch.resolve(self.operation, backend, *self.arguments)

    def variants(self) -> dict:
        """Functions without arguments that return outputs and gradients, by name."""
        torch.compiler.reset()  # beyond some variants of one function nothing is compiled
        functions = {name: self.function(name) for name in ("triton", "reference")}
        functions["compile"] = torch.compile(self.compilable(), dynamic=False)
        return {name: functools.partial(self.results, f) for name, f in functions.items()}

    def compilable(self):
        return self.function("reference")

    def exact(self) -> list[Tensor]:
        """The results in float64."""
        return self.results(self.function("reference"), *map(doubled, self.arguments))

    def errors(self, call, exact: list[Tensor]) -> list[float]:
        """Relative error of each result; of one that is all zeros, 0 or infinite."""
        return [
            relative_error(found, right) if right.any() else math.inf * bool(found.any())
            for found, right in zip(self.grouped(call()), self.grouped(exact), strict=True)
        ]

    def grouped(self, results: list[Tensor]) -> list[Tensor]:
        """Results as they are compared."""
        return results

    def tolerates(self, errors: list[float], plain: list[float]) -> bool:
        unit = UNITS[self.dtype]
        return all(error <= 2 * other + unit for error, other in zip(errors, plain, strict=True))

    def right(self) -> bool:
        """Whether the Triton kernels are."""
        exact = self.exact()
        errors, plain = (
            self.errors(functools.partial(self.results, self.function(backend)), exact)
            for backend in ("triton", "reference")
        )
        return self.tolerates(errors, plain)

    def rotate(self, repeat: int) -> None:
        with torch.no_grad():
            for argument, values in self.turning:
                argument.copy_(values[repeat % ROTATED])


def doubled(value):
    """A tensor, or those of a list, in float64 if it is one of floats, with gradients if it had."""
    if isinstance(value, list):
        return [doubled(part) for part in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


class Gather(Case):
    """`gather_tokens` into `out` of a whole or a factored table; shape: B, L, H."""

    operation = "gather_tokens"

    def __init__(self, shape, dtype, device, factored: bool):
        self.name = f"gather{' factored' * factored}"
        ids, rows = prompts(shape)
        width, self.dtype, (self.shape, text, tokens) = shape[2], dtype, counted(shape, rows)
        ids, rows = ids.to(device), rows.to(device)
        random = functools.partial(torch.randn, device=device, dtype=dtype)
        count, factors = CATALOG * WAYS, (None, None)
        if factored:
            table = random(count, INNER)
            factors = random(WAYS, width, INNER).mul_(INNER**-0.5), random(WAYS, width)
        else:
            table = random(count, width)
        self.arguments = (
            ids[0].clone(), rows[0].clone(), random(WORDS, width), table, *factors,
            random(*shape),
        )  # fmt: skip
        self.turning = list(zip(self.arguments, (ids, rows)))
        each = INNER if factored else width
        moved = (2 * text + tokens) * width + tokens * each + factored * WAYS * width * INNER
        self.moved = float(moved * dtype.itemsize)
        self.flops = 2.0 * tokens * width * INNER if factored else 0.0

    def results(self, function, *arguments) -> list[Tensor]:
        arguments = arguments or self.arguments
        function(*arguments)
        return [arguments[-1]]

    def errors(self, call, exact) -> list[float]:
        self.arguments[-1].fill_(torch.nan)
        return super().errors(call, exact)


class GatherBackward(Case):
    """Its gradients in the tokens of a batch's items, and with `of_text` in the text table."""

    operation = "gather_tokens_backward"

    def __init__(self, shape, dtype, device, of_text: bool):
        self.name = f"gather backward, {'text and ' * of_text}tokens"
        ids, rows = prompts(shape)
        width, self.dtype, (self.shape, text, tokens) = shape[2], dtype, counted(shape, rows)
        items, rows = rows.unique(return_inverse=True)
        rows, count = (rows - 1).to(device), len(items) - 1  # -1, the least, stays what it is
        ids, gradients = ids.to(device), torch.randn(shape, device=device, dtype=dtype)
        self.arguments = (
            gradients, ids[0].clone(), rows[0].clone(), WORDS, count, of_text, True
        )  # fmt: skip
        self.turning = list(zip(self.arguments[1:], (ids, rows)))
        read, written = tokens + of_text * text, count + of_text * WORDS
        self.moved, self.flops = float((read + written) * width * dtype.itemsize), 0.0

    def results(self, function, *arguments) -> list[Tensor]:
        return [part for part in function(*(arguments or self.arguments)) if part is not None]


def prompts(shape) -> tuple[Tensor, Tensor]:
    """Ids and rows [ROTATED, B, L] on the CPU."""
    users, length, _ = shape
    items = min(SHOWN, length // WAYS)
    sizes = argparse.Namespace(
        users=users, length=length, items=items, words=WORDS, catalog=CATALOG
    )
    made = [Prompts(sizes) for _ in range(ROTATED)]
    return torch.stack([one.ids for one in made]), torch.stack([one.rows for one in made])


def counted(shape, rows: Tensor) -> tuple[str, int, int]:
    """The shape in words; positions of text and of continuous tokens."""
    tokens = int((rows[0] != -1).sum())
    return "B={} L={} H={}".format(*shape), rows[0].numel() - tokens, tokens


class CrossEntropy(Case):
    """The mean loss and both gradients; shape: N, D, B. With "dot", liger-kernel's as well."""

    operation = "catalog_cross_entropy"

    def __init__(self, shape, dtype, device, similarity: str = "cosine"):
        self.name, self.dtype = f"cross-entropy {similarity}", dtype
        self.shape = "N={} D={} B={}".format(*shape)
        items, dim, self.batch = shape
        random = functools.partial(torch.randn, device=device, dtype=dtype)
        queries = random(ROTATED, self.batch, dim).mul_(dim**-0.5)
        targets = torch.randint(items, (ROTATED, self.batch), device=device)
        temperature = {"cosine": 0.05, "dot": 1.0}[similarity]
        self.arguments = (
            queries[0].clone().requires_grad_(), random(items, dim).requires_grad_(),
            targets[0].clone(), temperature, similarity, 0.0, None, None, None,
        )  # fmt: skip
        self.turning = [(self.arguments[0], queries), (self.arguments[2], targets)]
        self.flops = 6.0 * self.batch * items * dim
        # Vectors once in either pass, and their gradients.
        self.moved = float((3 * items + 4 * self.batch) * dim * dtype.itemsize)

    def results(self, function, *arguments) -> list[Tensor]:
        arguments = arguments or self.arguments
        loss = function(*arguments)
        share = torch.full_like(loss, 1 / self.batch)
        return [loss.detach(), *torch.autograd.grad(loss, arguments[:2], share)]

    def exact(self) -> list[Tensor]:
        queries, vectors, targets, *rest = map(doubled, self.arguments)
        reference, found, of_vectors = self.function("reference"), [], torch.zeros_like(vectors)
        for some in torch.arange(self.batch, device=targets.device).split(EXACT_QUERIES):
            given = queries.detach()[some].requires_grad_(), vectors, targets[some], *rest
            *parts, more = self.results(reference, *given)
            found.append(parts)
            of_vectors += more
        return [*map(torch.cat, zip(*found)), of_vectors]

    def variants(self) -> dict:
        found = super().variants()
        return (
            found | {"liger": self.liger} if has_liger() and self.arguments[4] == "dot" else found
        )

    def liger(self) -> list[Tensor]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        queries, vectors, targets = self.arguments[:3]
        loss = LigerFusedLinearCrossEntropyLoss()(vectors, queries, targets)  # their mean
        return [loss.detach(), *torch.autograd.grad(loss, (queries, vectors))]


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


class Denoise(Case):
    """Forward alone or, with `train`, all gradients, as the diffusion loss has them (guidance 0,
    a tenth of the conditions dropped, t [B]) or, if guided, those of an unrolled sampler (guidance
    2, t [1], the gradient of x, too); shape: D, B of an mlp, W, depth, B of an adaln, D = W / 2."""

    operation = "denoise"

    def __init__(self, kind: str, shape, dtype, device, guided: bool, train: bool):
        self.name = f"denoise {kind} {'train' if train else 'forward'}"
        self.dtype, self.train, (size, *depth, batch) = dtype, train, shape
        if kind == "mlp":
            dim, width, depth = size, 0, 0
        else:
            dim, width, (depth,) = max(1, size // 2), size, depth
        self.shape = f"B={batch} D={dim} {'guided' if guided else 'dropout'}"
        denoiser = make(kind, dim, width, depth).to(device, dtype).requires_grad_(train)
        weights = list(denoiser.parameters())
        pairs = torch.randn(2, ROTATED, batch, dim, device=device, dtype=dtype)
        x, condition = (values[0].clone() for values in pairs)
        self.arguments = (
            x.requires_grad_(train and guided), condition.requires_grad_(train),
            torch.randint(STEPS, (1 if guided else batch,), device=device), weights,
            describe(denoiser), 2.0 if guided else 0.0,
            None if guided else torch.rand(batch, device=device) < 0.1,
        )  # fmt: skip
        self.turning = [(x, pairs[0]), (condition, pairs[1])]
        self.outward = torch.randn(batch, dim, device=device, dtype=dtype)
        sizes = argparse.Namespace(dim=dim, width=width, depth=depth, steps=1, users=batch)
        forward = operations(kind, sizes)  # of both branches of the guidance
        if kind == "adaln" and not guided:
            forward -= 4 * batch * depth * width**2
        of_x = 0 if guided else 2 * batch * dim * (width or 2 * dim)
        self.flops = float(3 * forward - of_x if train else forward)
        vectors = 3 + train * (2 + guided)
        numbers = vectors * batch * dim + (1 + train) * sum(weight.numel() for weight in weights)
        self.moved = float(numbers * dtype.itemsize)

    def compilable(self):
        # As `ops.denoise` goes when it is compiled.
        return lambda *arguments: torch.ops.contrec.denoise(*arguments, "reference")

    def results(self, function, *arguments) -> list[Tensor]:
        x, condition, _, weights, *_ = arguments = arguments or self.arguments
        if not self.train:
            with torch.no_grad():
                return [function(*arguments)]
        y = function(*arguments)
        wanted = [condition, *([x] if x.requires_grad else []), *weights]
        found = torch.autograd.grad(y, wanted, self.outward.to(y.dtype), materialize_grads=True)
        return [y.detach(), *found]

    def grouped(self, results: list[Tensor]) -> list[Tensor]:
        """The gradients of all weights in a row: some are next to nothing."""
        if not self.train:
            return results
        inputs = len(results) - len(self.arguments[3])
        return [*results[:inputs], torch.cat([part.flatten() for part in results[inputs:]])]
