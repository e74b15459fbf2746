"""New items without training: from their text, or from who chose them.

Text: a linear map from the language model's text embedding of an item to its vector, fitted by
ridge regression on the catalog. Interactions: the mean direction of what the model samples for the
users that chose the item, from their histories up to then.

Both are nearer to samples than the vectors of known items are, which have a part of their own that
no sample predicts; so new items would crowd everybody's lists. They get such a part, too
(`with_own_part`), as much as gives each about the exposure of a known item.
"""

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from contrec_fast import ops
from contrec_fast.data import Dataset, Items
from contrec_fast.data.templates import response_text
from contrec_fast.ops.noise import philox_normal

BATCH = 256
FIT_ROWS = 50_000  # evenly spread over the catalog; a map of a few million numbers needs no more
AUDIENCE = 2048  # known users, evenly spread, whose lists new items are not to crowd
LIST = 10  # length of these lists
PENALTIES = torch.logspace(-4, 4, 17, dtype=torch.float64)


@torch.inference_mode()
def embed_texts(model, titles: list[str], categories: list[str]) -> Tensor:
    """Mean last hidden states [N, H] of the response sentence that names each item."""
    limit = model.config.prompt.title_length
    texts = [response_text(title[:limit], category) for title, category in zip(titles, categories)]
    device, parts = model.item_vectors.device, []
    for start in range(0, len(texts), BATCH):
        tokens = model.text_tokenizer(
            texts[start : start + BATCH], add_special_tokens=False, split_special_tokens=True,
            padding=True, padding_side="right", return_tensors="pt",
        ).to(device)  # fmt: skip
        mask = tokens.attention_mask
        hidden = model.backbone.base_model(
            input_ids=tokens.input_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        parts.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return torch.cat(parts).float()


def fit_text_map(model, items: Items) -> None:
    """Fit `model.text_map` so that an item's text gives its vector, on at most FIT_ROWS items."""
    some = slice(None, None, -(-len(items) // FIT_ROWS))
    features = embed_texts(model, items.titles[some], items.categories[some])
    model.text_map.copy_(ridge_map(features, model.item_vectors.detach()[some]))


def ridge_map(features: Tensor, targets: Tensor) -> Tensor:
    """Ridge regression with intercept; the penalty of least leave-one-out error.

    That error is exact and costs one singular value decomposition (PRESS; Allen, 1974).

    Args:
        features: [N, H]. targets: [N, D].

    Returns:
        [H + 1, D] in the targets' dtype, the intercept last. Computed in float64.
    """
    x, y = features.double(), targets.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    left, singular, right = torch.linalg.svd(x - mean_x, full_matrices=False)
    projected = left.T @ (y - mean_y)
    best, weight = torch.inf, x.new_zeros(x.shape[1], y.shape[1])
    for penalty in PENALTIES.tolist():
        ridge = penalty * len(x)
        shrink = singular.square() / (singular.square() + ridge)
        residual = y - mean_y - left @ (shrink[:, None] * projected)
        leverage = (left.square() * shrink).sum(1) + 1 / len(x)
        error = (residual / (1 - leverage).clamp(min=1e-9)[:, None]).square().mean().item()
        if error < best:
            best = error
            weight = right.T @ ((singular / (singular.square() + ridge))[:, None] * projected)
    return torch.cat([weight, (mean_y - mean_x @ weight)[None]]).to(targets.dtype)


@torch.no_grad()  # what is made here may be written to later, unlike inference tensors
def add_items(model, frame: pd.DataFrame, interactions: pd.DataFrame | None = None) -> None:
    """Extend a model's catalog; the new items are recommended at once.

    Args:
        model: ContRec with a dataset. frame: columns item_id, title and, optionally, category.
        interactions: columns user_id, item_id: known users that chose a new item next, after
        the history that the model knows of them; items without any go by their text.

    Raises:
        ValueError: missing columns, an id that is taken or comes twice, an unknown user or item,
        or an item with neither text nor interactions, in one line.
        TypeError: `frame` or `interactions` is no DataFrame.
    """
    from contrec_fast.engine import Engine, stable_id

    dataset = model.dataset
    if dataset is None:
        raise ValueError("model: expected one with a dataset, which names users and items")
    ids, titles, categories = _columns(frame)
    taken = set(dataset.items.ids)
    for item in ids:
        if item in taken:
            raise ValueError(f"item_id: expected ids that are new and different, got {item!r}")
        taken.add(item)
    users = _users_of(dataset, ids, interactions)
    for item, title, category, rows in zip(ids, titles, categories, users):
        if not (title or category or rows):
            raise ValueError(f"title: expected a text or an interaction for {item!r}, got none")
    if not ids:
        return
    features = embed_texts(model, titles, categories)
    vectors = F.pad(features, (0, 1), value=1.0) @ model.text_map
    recommender = Engine(model, dataset, text=False)
    for position, rows in enumerate(users):
        if rows:
            vectors[position] = _samples(recommender, rows).mean(0)
    if dataset.user_ids:
        audience = Engine(model, dataset.complete(), text=False)  # as they will be served
        rows = list(range(len(dataset.user_ids)))[:: -(-len(dataset.user_ids) // AUDIENCE)]
        samples, length = _samples(audience, rows), min(LIST, len(dataset.items))
        seen = user = None
        if model.config.retrieval.filter_seen:
            histories = [audience.dataset.histories[row] for row in rows]
            seen = ops.SeenLists.from_lists(histories, samples.device)
            user = torch.arange(len(rows), device=samples.device)
        last = ops.cosine_topk(samples, audience.catalog, length, seen=seen, seen_rows=user)
        last = last[0][:, -1]
        keys = torch.tensor([stable_id(item) for item in ids], device=samples.device)
        own = own_directions(samples, keys)
        vectors = with_own_part(vectors, own, samples, last, LIST / len(dataset.items))
    # At the length that the catalog's vectors have: tokens are made from them, too.
    length = model.item_vectors.norm(dim=-1).mean()
    vectors = F.normalize(vectors, dim=-1) * length
    items = dataset.items
    model.dataset = Dataset(
        Items(items.ids + ids, items.titles + titles, items.categories + categories),
        dataset.user_ids,
        dataset.histories,
        dataset.targets,
    )
    model.item_vectors = torch.nn.Parameter(
        torch.cat([model.item_vectors, vectors]), requires_grad=model.item_vectors.requires_grad
    )
    model.collaborative = torch.cat([model.collaborative, vectors])
    model.item_tokens = torch.cat([model.item_tokens, model.encode(vectors)])


def own_directions(samples: Tensor, keys: Tensor) -> Tensor:
    """Unit vectors [M, D] in which samples vary least, another one for each item's key.

    Random combinations of the D/8 principal directions of least variance (at least one).

    Args:
        samples: [U, D] unit vectors of users. keys: [M] int64, stable ids.
    """
    basis = torch.linalg.eigh(samples.T @ samples).eigenvectors
    basis = basis[:, : max(1, samples.shape[1] // 8)]
    seed = torch.zeros((), dtype=torch.int64, device=keys.device)
    mixture = philox_normal(seed, keys, basis.shape[1], 0).to(basis.dtype)
    own = F.normalize(mixture @ basis.T, dim=-1)
    return torch.where((samples.mean(0) @ own.T > 0)[:, None], -own, own)


def with_own_part(
    vectors: Tensor, own: Tensor, samples: Tensor, last: Tensor, share: float
) -> Tensor:
    """Unit vectors of new items, `a v + sqrt(1 - a^2) n`, each with about its part in lists.

    Samples vary little along n (the part of `own` that is orthogonal to v), so `a`, at most 1,
    says how near an item comes to users; exactly so, and the part is not exceeded, where samples
    have nothing along n.

    Args:
        vectors, own: [M, D] directions of the new items, and those of their own. samples: [U, D]
        unit vectors of users. last: [U] the score with which a known item just enters each
        user's list; a negative one is beaten by any new item. share: of the users, how many are
        to score an item higher than that.

    Returns:
        [M, D].
    """
    vectors = F.normalize(vectors, dim=-1)
    similar = samples @ vectors.T
    needed = torch.where((similar > 0) & (last > 0)[:, None], last[:, None] / similar, torch.inf)
    place = max(1, min(round(share * len(samples)), len(samples)))
    a = needed.kthvalue(place, dim=0).values.clamp(max=1)[:, None]
    own = F.normalize(own - (vectors * own).sum(1, keepdim=True) * vectors, dim=-1)
    return a * vectors + (1 - a.square()).sqrt() * own


def _samples(recommender, rows: list[int]) -> Tensor:
    """A sampled unit vector for each of some users [U, D]."""
    parts = [
        F.normalize(recommender.sample(rows[start : start + BATCH])[0][0], dim=-1)
        for start in range(0, len(rows), BATCH)
    ]
    return torch.cat(parts)


def _columns(frame: pd.DataFrame) -> tuple[list[str], list[str], list[str]]:
    _require_columns("frame", frame, "item_id", "title")
    columns = [frame[name] if name in frame else pd.Series("", frame.index)
               for name in ("item_id", "title", "category")]  # fmt: skip
    return tuple(column.fillna("").astype(str).tolist() for column in columns)


def _users_of(dataset: Dataset, ids: list[str], interactions) -> list[list[int]]:
    """User rows that chose each new item."""
    users = [[] for _ in ids]
    if interactions is None:
        return users
    _require_columns("interactions", interactions, "user_id", "item_id")
    row_of = {user: row for row, user in enumerate(dataset.user_ids)}
    place = {item: position for position, item in enumerate(ids)}
    pairs = zip(interactions["user_id"].astype(str), interactions["item_id"].astype(str))
    for user, item in pairs:
        if user not in row_of or item not in place:
            wrong = f"user {user!r}" if user not in row_of else f"item {item!r}"
            raise ValueError(f"interactions: expected known users and new items, got {wrong}")
        users[place[item]].append(row_of[user])
    return users


def _require_columns(name: str, frame: pd.DataFrame, *columns: str) -> None:
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"{name}: expected a pandas DataFrame, got {type(frame).__name__}")
    if not set(columns) <= set(frame.columns):
        got = ", ".join(map(str, frame.columns)) or "none"
        raise ValueError(f"{name}: expected columns {', '.join(columns)}, got {got}")
