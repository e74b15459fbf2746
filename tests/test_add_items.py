"""Adding items leaves a model like any other, and reads the catalog's texts once."""

import copy

import pandas as pd
import pytest
import torch
from model_cases import (
    random_model,
    small_shop,
)
from ops_cases import refused

from contrec_fast import engine

FRAME = pd.DataFrame({"item_id": ["a", "b", "c"], "title": ["Tent", "Lens", "Lamp"]})
USERS = small_shop().user_ids
CHOSEN = pd.DataFrame({"user_id": [USERS[3], USERS[0], USERS[4]], "item_id": ["a", "b", "b"]})


def test_a_model_with_new_items_can_be_changed():
    model = copy.deepcopy(random_model())
    model.add_items(FRAME, CHOSEN)
    with torch.no_grad():
        model.item_vectors[-1] = model.item_vectors[0]
    model.update_tokens()
    assert torch.equal(model.item_tokens[-1], model.item_tokens[0])
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())


def test_new_items_share_recommenders(monkeypatch):
    made = []

    class Counted(engine.Engine):
        def __init__(self, *arguments, **options):
            made.append(1)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(engine, "Engine", Counted)
    copy.deepcopy(random_model()).add_items(FRAME, CHOSEN)
    assert len(made) == 2  # for who chose them, and for who is to be offered them


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("frame", [["a", "b"]]),
        ("frame", [FRAME.to_dict("records")]),
        ("interactions", [FRAME, CHOSEN.to_dict("list")]),
    ],
)
def test_other_types_than_frames_are_refused(name, arguments):
    model = copy.deepcopy(random_model())
    with refused(TypeError, name):
        model.add_items(*arguments)
    assert len(model.item_vectors) == len(small_shop().items)
