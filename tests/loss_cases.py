"""Cases of `catalog_cross_entropy` that every backend must get right."""

import math
from functools import partial

import torch
from torch import Tensor

from contrec_fast import ops


class Case:
    """A call's tensors, on the CPU, and its options; the losses' gradient is random."""

    def __init__(
        self, queries, vectors, targets, similarity="cosine", temperature=0.2, smoothing=0.0,
        histories=None, seen_rows=None,
    ):  # fmt: skip
        self.queries, self.vectors, self.targets = queries, vectors, targets
        self.options = similarity, temperature, smoothing
        self.histories, self.seen_rows = histories, seen_rows
        self.gradient = torch.randn(len(queries))

    def call(self, backend, dtype=None, device="cpu", rows=slice(None)) -> list[Tensor]:
        """Loss [B] and its gradients in queries and vectors, in float64 on the CPU."""
        dtype = dtype or self.queries.dtype
        queries, vectors = (
            tensor.to(device, dtype, copy=True).requires_grad_()
            for tensor in (self.queries[rows], self.vectors)
        )
        similarity, temperature, smoothing = self.options
        seen = {}
        if self.histories is not None:
            seen["seen"] = ops.SeenLists.from_lists(self.histories, device)
            seen["seen_rows"] = self.seen_rows[rows].to(device)
        loss = ops.catalog_cross_entropy(
            queries, vectors, self.targets[rows].to(device), temperature, similarity, smoothing,
            backend=backend, **seen,
        )  # fmt: skip
        assert backend == "auto" or ops.last_backend("catalog_cross_entropy") == backend
        assert loss.shape == self.targets[rows].shape and loss.dtype == dtype
        loss.backward(self.gradient[rows].to(device, dtype))
        assert queries.grad.dtype == vectors.grad.dtype == dtype
        return [tensor.detach().double().cpu() for tensor in (loss, queries.grad, vectors.grad)]

    def check(self, call):
        """`call(case)` errs at most twice as much as plain PyTorch, and a few units.

        A unit of a loss is one of the logits it is a difference of. Of a gradient, it is one of
        the rows that it is a sum of, and what a unit of the logits makes of it.
        """
        dtype, (similarity, temperature, _) = self.queries.dtype, self.options
        results = call(self), self.call("reference"), self.call("reference", torch.float64)
        rows = [self.queries.double(), self.vectors.double()]
        if similarity == "cosine":  # gradients times the length of the row, to be comparable
            scales = [part.norm(dim=1, keepdim=True).clamp(min=1e-12) for part in rows]
            rows = [part / scale for part, scale in zip(rows, scales)]
            results = [
                [loss, *(part * scale for part, scale in zip(parts, scales))]
                for loss, *parts in results
            ]
        logit = rms(rows[0] @ rows[1].T) / temperature
        gradient = float(self.gradient.to(dtype).double().norm()) / temperature
        terms = [logit * len(self.queries) ** 0.5]
        terms += [gradient * rms(part) * part.shape[1] ** 0.5 for part in rows[::-1]]
        unit = torch.finfo(dtype).eps
        for number, (ours, theirs, right) in enumerate(zip(*results)):
            error, plain = float((ours - right).norm()), float((theirs - right).norm())
            few = 8 * terms[number] + (8 + logit * (number > 0)) * float(right.norm())
            bound = (2 * plain if math.isfinite(plain) else 0.0) + unit * few
            assert error <= bound, f"result {number}: error {error}, plain {plain}, bound {bound}"


def rms(tensor):
    return float(tensor.norm()) / max(tensor.numel(), 1) ** 0.5


def random_case(batch, count, dim, dtype=torch.float32, longest=None, **options):
    """Random vectors, and lists in which targets and repeats occur."""
    targets = torch.randint(count, (batch,))
    if longest is not None:
        lists = [torch.randint(count, (length,)).tolist() for length in range(longest + 1)]
        options["histories"] = [[*items, *items[:2], *targets[:1].tolist()] for items in lists]
        options["seen_rows"] = torch.randint(-1, longest + 1, (batch,))
        options["seen_rows"][:1] = longest
    queries, vectors = torch.randn(batch, dim).to(dtype), torch.randn(count, dim).to(dtype)
    return Case(queries, vectors, targets, **options)


def loop(case):
    """The losses of `case` in Python floats, query by query."""
    similarity, temperature, smoothing = case.options
    losses = []
    for row, (query, target) in enumerate(zip(case.queries.double(), case.targets.tolist())):
        seen = set()
        if case.histories is not None and case.seen_rows[row] >= 0:
            seen = set(case.histories[case.seen_rows[row]])
        scores = {}
        for item, vector in enumerate(case.vectors.double()):
            if item in seen and item != target:
                continue
            scores[item] = float(query @ vector) / temperature
            if similarity == "cosine":
                scores[item] /= float(query.norm() * vector.norm())
        top = max(scores.values())
        total = top + math.log(sum(math.exp(score - top) for score in scores.values()))
        even = sum(total - score for score in scores.values()) / len(scores)
        losses.append((1 - smoothing) * (total - scores[target]) + smoothing * even)
    return torch.tensor(losses, dtype=torch.float64)


def all_but_the_target_seen(smoothing):
    lists = [torch.randperm(150).tolist(), [item for item in range(150) if item != 4]]
    targets, rows = torch.tensor([149, 4, 4]), torch.tensor([0, 1, 0])
    return Case(
        torch.randn(3, 7), torch.randn(150, 7), targets,
        smoothing=smoothing, histories=lists, seen_rows=rows,
    )  # fmt: skip


def empty_lists():
    case = random_case(3, 50, 4)
    case.histories, case.seen_rows = [[], []], torch.tensor([0, -1, 1])
    return case


def repeated_items(similarity):
    vectors = torch.randn(3, 9).repeat(100, 1)
    return Case(torch.randn(5, 9), vectors, torch.tensor([0, 3, 299, 150, 0]), similarity)


def queries_that_are_items():
    vectors = torch.randn(200, 16)
    return Case(vectors[:5].clone(), vectors, torch.arange(5), temperature=0.05)


def lengths(queries, vectors):
    """Of some rows; the squares of large ones overflow in float32."""
    case = random_case(6, 130, 11)
    case.queries[::2] *= queries
    case.vectors[::3] *= vectors
    return case


def zeros():
    """A zero query, a zero vector that nobody is to find, and one that is a target."""
    case = random_case(6, 130, 11)
    case.queries[1], case.vectors[7], case.vectors[9] = 0, 0, 0
    case.targets[:] = torch.tensor([3, 4, 9, 9, 5, 6])
    return case


def large_logits(sign, smoothing):
    """Up to some thousands, all below or all above zero."""
    queries, vectors = torch.rand(9, 30) + 0.1, torch.rand(400, 30) + 0.1
    return Case(queries, sign * vectors, torch.arange(9), "dot", 0.01, smoothing)


ADVERSARIAL = {
    "one item": partial(random_case, 3, 1, 5),
    "one item, smoothed": partial(random_case, 3, 1, 5, smoothing=0.3),
    "one query": partial(random_case, 1, 300, 5, longest=9),
    "no queries": partial(random_case, 0, 50, 4),
    "all but the target seen": partial(all_but_the_target_seen, 0.0),
    "all but the target seen, smoothed": partial(all_but_the_target_seen, 0.4),
    "empty lists": empty_lists,
    "repeated items": partial(repeated_items, "cosine"),
    "repeated items, dot": partial(repeated_items, "dot"),
    "queries that are items": queries_that_are_items,
    "huge": partial(lengths, 1e30, 1e25),
    "tiny": partial(lengths, 1e-10, 1e-9),
    "shorter than can be divided by": partial(lengths, 1e-20, 1e-18),
    "zeros": zeros,
    "low temperature": partial(random_case, 20, 300, 33, temperature=0.01),
    "large logits": partial(large_logits, 1, 0.0),
    "large logits, smoothed": partial(large_logits, 1, 0.2),
    "far below zero": partial(large_logits, -1, 0.0),
}
