"""Whom to serve: new users' histories as a DataFrame."""

import numpy as np
import pandas as pd
import pytest
from model_cases import small_shop, trained_model
from ops_cases import refused


@pytest.mark.parametrize("kind", ["object", "str", "category"])
def test_histories_as_a_frame(kind):
    """Rows of a user need not stand together; users are served in the order they come in."""
    model, shop = trained_model(), small_shop()
    histories = {f"new-{n}": list(np.random.choice(shop.items.ids, n)) for n in (3, 1, 9)}
    turns = np.random.permutation([user for user, items in histories.items() for _ in items])
    users = dict.fromkeys(turns.tolist())
    left = {user: iter(items) for user, items in histories.items()}
    frame = pd.DataFrame({
        "other": 0, "item_id": [next(left[user]) for user in turns], "user_id": turns,
    }).astype({"user_id": kind, "item_id": kind})  # fmt: skip
    expected = model.recommend(histories={user: histories[user] for user in users}, k=4)
    pd.testing.assert_frame_equal(model.recommend(histories=frame, k=4), expected)


@pytest.mark.parametrize(
    "kind, columns, words",
    [
        (ValueError, {"user_id": ["u"], "item": ["SKU-0001"]}, "item_id, got user_id, item"),
        (ValueError, {"user_id": [], "item_id": []}, "at least one user, got none"),
        (ValueError, {"user_id": ["u", None], "item_id": ["SKU-0001"] * 2}, "user_id .* row 1"),
        (ValueError, {"user_id": ["u", "v"], "item_id": ["SKU-0001", "SKU-9"]}, "'v', got 'SKU-9'"),
        (TypeError, {"user_id": ["u"], "item_id": [7]}, "item_id a list of strings, got .* 7"),
    ],
)
def test_refuses_other_frames(kind, columns, words):
    with refused(kind, "histories"):
        trained_model().recommend(histories=(frame := pd.DataFrame(columns)))
    with pytest.raises(kind, match=words):
        trained_model().recommend(histories=frame)
