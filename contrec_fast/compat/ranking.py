"""Top-K lists by the release's three measures."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from contrec_fast import ops
from contrec_fast.ops.topk import RESCORE_ELEMENTS

MEASURES = ("mse", "inner", "cos")
SPARE = 16  # candidates beyond k, so that what the search rounds off leaves nobody out


class Ranking:
    """Items by distance ("mse"), inner product ("inner") or cosine ("cos") from sampled vectors.

    One search serves all three, `ops.cosine_topk`. With items made equally long by one more
    coordinate (Neyshabur & Srebro, arXiv 1410.5518), cosines order like inner products; and
    distances order like `y q - |q|^2 / 2`, an inner product of `[y, s]` and `[q, -|q|^2 / 2 s]`.

    Args:
        item_vectors: [N, D]. measure: "mse", "inner" or "cos".

    Raises:
        TypeError, ValueError: another measure; vectors of a wrong dtype or shape, not finite or,
        for "cos", zero; in one line.
    """

    def __init__(self, item_vectors: Tensor, measure: str):
        if measure not in MEASURES:
            raise ValueError(f"measure: expected {', '.join(MEASURES)}, got {measure!r}")
        self.measure, self.items = measure, item_vectors
        rows, self.last = item_vectors, None  # last: coordinates of every query
        if measure != "cos":
            squares = item_vectors.double().square().sum(1)
            self.last = [0.0]
            if measure == "mse":
                mean = squares.mean()  # which changes no order, and keeps the coordinate small
                scale = mean.sqrt().clamp(min=1e-30)
                more = (mean - squares) / (2 * scale)
                rows, squares = torch.cat([rows, more[:, None].to(rows)], 1), squares + more**2
                self.last = [float(scale), 0.0]
            more = (squares.max().clamp(min=1e-30) - squares).sqrt()
            rows = torch.cat([rows, more[:, None].to(rows)], dim=1)
        self.catalog = ops.Catalog(rows)

    def __call__(
        self, vectors: Tensor, k: int, excluded: Sequence[Sequence[int]], zero_excluded: bool
    ) -> tuple[Tensor, Tensor]:
        """The k best items of each vector.

        Args:
            vectors: [B, D]. excluded: B lists of items that are left out. zero_excluded: score
            them 0 instead ("inner" and "cos").

        Returns:
            scores [B, k] float32 descending (minus the distance for "mse"), ids [B, k] int64;
            ties go to the lower id. Where there are fewer items, the rest is (-inf, -1).
        """
        seen = ops.SeenLists.from_lists(excluded, vectors.device)
        rows = torch.arange(len(vectors), device=vectors.device)
        options = {"seen": seen, "seen_rows": rows}
        if self.measure == "cos":
            scores, ids = ops.cosine_topk(vectors, self.catalog, k, **options)
        else:
            queries = torch.cat([vectors, vectors.new_tensor(self.last).expand(len(rows), -1)], 1)
            most = min(k + SPARE, len(self.catalog)) if k <= len(self.catalog) else k
            scores, ids = ops.cosine_topk(queries, self.catalog, most, **options)
            scores, ids = _best(self._exact(vectors, ids).masked_fill(ids < 0, -torch.inf), ids, k)
        if zero_excluded and self.measure != "mse":
            items = [torch.tensor(sorted(set(own)), dtype=torch.int64) for own in excluded]
            padded = [F.pad(own, (0, k), value=-1) for own in items]
            more = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True, padding_value=-1)
            more = more.to(ids)
            zeros = torch.zeros_like(more, dtype=scores.dtype).masked_fill(more < 0, -torch.inf)
            scores, ids = _best(torch.cat([scores, zeros], 1), torch.cat([ids, more], 1), k)
        return scores, ids

    def _exact(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """Scores [B, M] of items [B, M], computed in float64."""
        at_once = max(1, RESCORE_ELEMENTS // max(1, ids.shape[1] * vectors.shape[1]))
        scores = []
        for own, found in zip(vectors.double().split(at_once), ids.clamp(min=0).split(at_once)):
            items = self.items[found].double()
            if self.measure == "inner":
                scores.append((items * own[:, None]).sum(2))
            else:
                scores.append(-(items - own[:, None]).square().sum(2).sqrt())
        return torch.cat(scores).float()


def _best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k by falling score, then rising id."""
    order = ids.argsort(dim=1)
    scores, ids = scores.gather(1, order), ids.gather(1, order)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), ids.gather(1, order)
