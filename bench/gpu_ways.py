"""Three ways from users' histories to their lists on a GPU, which `gpu_engine.py` compares.

- released: the release's way, `released.py`'s pieces around its way to use the language model:
  10 users at a time, prompts padded to 1,024 tokens, tokens inserted user by user, eager
  attention, `generate` that keeps all hidden states, 2 denoiser calls per step, cosines user by
  user and a full sort. Its bonus is inert.
- torch: well-written PyTorch: users by length, 64 at a time (fastest of 16 to 128 on a CPU), padded
  to the longest of them, `generate` with the key-value cache and sdpa, the folded sampler, one
  product and `topk`.
- engine: `Engine`.

A language model with random weights writes nothing sensible. A `Script` says what is written
instead: each way works out its logits and their largest as ever, then takes the script's token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from engine_ways import AT_ONCE, Ways
from released import rank, sample
from torch_topk import torch_topk
from transformers import LogitsProcessor

from contrec_fast.data.prompts import PromptBatch
from contrec_fast.engine import Engine, reader
from contrec_fast.engine.decoding import Decoder

TORCH_BATCH = 64


class Script:
    """Responses that are written one after another, whatever was read.

    Args:
        lines: [M, S] int64 token ids, each line with the end of the text, -1 behind it.
        pad: the token id behind the end.
    """

    def __init__(self, lines: torch.Tensor, pad: int):
        self.lines, self.next = lines.masked_fill(lines < 0, pad), 0

    def take(self, count: int) -> torch.Tensor:
        """[count, S], the next of them, from the first again behind the last."""
        rows = torch.arange(self.next, self.next + count, device=self.lines.device)
        self.next += count
        return self.lines[rows % len(self.lines)]

    def processor(self, count: int) -> LogitsProcessor:
        """What makes `generate` write the next responses."""
        lines = self.take(count)

        class Forced(LogitsProcessor):
            def __call__(self, input_ids, scores):
                return scores.scatter(1, lines[:, input_ids.shape[1], None], torch.inf)

        return Forced()

    @contextmanager
    def engine(self) -> Iterator[None]:
        """Engines whose first response is written in here write the script."""
        script = self

        class Scripted(Decoder):
            def write(self, opening, best, places):
                self.lines = script.take(len(best))
                return super().write(opening, best, places)

            def _accept(self, draft, drafted, best):
                at = self.count[:, None] + torch.arange(best.shape[1], device=best.device)
                best = self.lines.gather(1, at.clamp(max=self.lines.shape[1] - 1))
                return super()._accept(draft, drafted, best)

        reader.Decoder = Scripted
        try:
            yield
        finally:
            reader.Decoder = Decoder


class ScriptedWays(Ways):
    """The three ways to the lists of some rows of a recommender's dataset.

    Args:
        script: what the ways of transformers write, if not what the language model says.

    Attributes:
        batch: users that the torch way reads at a time. options: of its `generate`.
    """

    def __init__(self, recommender: Engine, k: int, script: Script | None = None):
        super().__init__(recommender, k)
        self.script, self.batch, self.options = script, TORCH_BATCH, {}

    @torch.inference_mode()
    def released(self, rows, noise):
        texts, conditions, ids = [], [], []
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            batch = self._padded([self.histories[row] for row in part])
            condition, written = self._generate(batch, self._inserted(batch), "eager")
            vectors = sample(
                self.denoiser, self.schedule, condition, self.guidance,
                noise[:, start : start + AT_ONCE],
            )  # fmt: skip
            seen = [self.histories[row].tolist() for row in part]
            ids.append(rank(vectors, self.model.item_vectors, seen)[1][:, : self.k].cpu())
            conditions.append(condition)
            texts += written
        return torch.cat(ids), texts, torch.cat(conditions)

    @torch.inference_mode()
    def torch(self, rows, noise):
        order = np.argsort([len(self.histories[row]) for row in rows], kind="stable")
        parts = []
        order = order[::-1]  # the longest first: a static cache then fits all
        for part in np.split(order, range(self.batch, len(rows), self.batch)):
            histories = [self.histories[row] for row in rows[part]]
            batch = self.engine.prompts.inference_batch(histories).to(self.device)
            condition, texts = self._generate(batch, self.model.embed(batch), "sdpa")
            vectors = self.folded(condition, noise[:, part.copy()])
            users = np.repeat(np.arange(len(part)), [len(history) for history in histories])
            seen = torch.from_numpy(np.stack([users, np.concatenate(histories)])).to(self.device)
            _, ids = torch_topk(
                vectors, self.items, self.groups, self.engine.matcher.match(texts).to(self.device),
                *seen, self.model.config.retrieval.bonus, self.k,
            )  # fmt: skip
            parts.append((ids.cpu(), texts, condition))
        ids, texts, conditions = zip(*parts)
        texts, back = sum(texts, []), np.argsort(order)
        return torch.cat(ids)[back], [texts[i] for i in back], torch.cat(conditions)[back]

    def _generate(self, batch: PromptBatch, embedded, attention: str):
        """Conditions and texts, by transformers' `generate`."""
        model, backbone = self.model, self.model.backbone
        eager = attention == "eager"
        options = {} if eager else self.options
        if self.script is not None:
            options = options | {"logits_processor": [self.script.processor(len(embedded))]}
        backbone.set_attn_implementation(attention)
        states = []

        def keep(module, args, output):  # the prompt's alone
            states.append(output.last_hidden_state)
            handle.remove()

        handle = backbone.base_model.register_forward_hook(keep)
        output = backbone.generate(
            inputs_embeds=embedded,
            attention_mask=batch.attention_mask,
            max_new_tokens=model.config.prompt.response_tokens,
            do_sample=False,
            pad_token_id=model.text_tokenizer.pad_token_id,
            eos_token_id=model.text_tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_hidden_states=eager,  # the release keeps those of all layers and positions
            **options,
        )
        backbone.set_attn_implementation("sdpa")
        states = states[0].to(model.item_vectors.dtype)
        return model.conditions(states, batch), self._texts(output.sequences)
