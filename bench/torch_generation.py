"""Greedy answers to many prompts as well-written eager PyTorch on transformers' own model.

What all prompts begin with is read once. The rest is padded on the left, for prompts of similar
lengths little. Masks are made once, only the last position meets the head, and rows leave when a
tenth of them is done. A cache with room for all tokens, written in place, was not faster than
transformers' own.
"""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

DONE = 0.1  # rows leave when that share of them is done


class TorchGeneration:
    """Reads prompts and answers them.

    Args:
        role: [1, P] token ids of what all prompts begin with. room: the most tokens of an answer.
        end: the token that ends one.
    """

    @torch.inference_mode()
    def __init__(self, backbone, role: Tensor, room: int, end: int):
        self.base, self.head = backbone.base_model, backbone.get_output_embeddings()
        self.config, self.room, self.end = backbone.config, room, end
        cache = self.base(input_ids=role, use_cache=True).past_key_values
        self.prefix, self.shared = role.shape[1], [(x.keys, x.values) for x in cache.layers]

    def __call__(self, embedded: Tensor, lengths: Tensor, stage) -> tuple[Tensor, Tensor]:
        """Hidden states [B, L, H] of what is behind the prefix, and answers [B, room].

        Args:
            embedded: [B, L, H], without the prefix, padded on the left. lengths: [B], of them.
            stage: context manager that times a named stage.
        """
        batch, length = embedded.shape[:2]
        places = self.prefix + length
        seen = torch.ones(batch, 1, 1, places + self.room, dtype=torch.bool)
        seen[:, 0, 0, self.prefix : places] = torch.arange(length) >= (length - lengths)[:, None]
        positions = (seen[:, 0, 0].cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.config)
        for number, pair in enumerate(self.shared):
            cache.update(*(x.expand(batch, -1, -1, -1) for x in pair), number)
        causal = torch.arange(places) <= torch.arange(self.prefix, places)[:, None]
        with stage("prefill"):
            states = self._states(
                seen[..., :places] & causal, positions[:, self.prefix : places], cache,
                inputs_embeds=embedded,
            )  # fmt: skip
            token = self.head(states[:, -1]).argmax(-1)
        written = torch.full((batch, self.room), self.end)
        rows = torch.arange(batch)
        with stage("decode"):
            for step in range(self.room):
                written[rows, step] = token
                going = token != self.end
                left = int(going.sum())
                if not left or step == self.room - 1:
                    break
                if left <= (1 - DONE) * len(rows):
                    cache.batch_select_indices(going.nonzero()[:, 0])
                    rows, token, seen, positions = (
                        x[going] for x in (rows, token, seen, positions)
                    )
                place = places + step
                last = self._states(
                    seen[..., : place + 1], positions[:, place : place + 1], cache,
                    input_ids=token[:, None],
                )  # fmt: skip
                following = self.head(last[:, -1]).argmax(-1)
                token = following.masked_fill(token == self.end, self.end)
        return states, written

    def _states(self, mask: Tensor, positions: Tensor, cache, **inputs) -> Tensor:
        return self.base(
            **inputs, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # fmt: skip
