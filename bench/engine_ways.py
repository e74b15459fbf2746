"""Three ways from histories to lists, which `cpu_engine.py` compares, and their stages; what they
share with those on a GPU (`gpu_ways.py`)."""

import time
from collections import defaultdict
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from released import PROMPT_TOKENS, ReleasedDenoiser, insert_tokens, rank, sample, schedule
from torch_generation import TorchGeneration
from torch_sampler import TorchSampler
from torch_topk import torch_topk

from contrec_fast import ops
from contrec_fast.data.prompts import PromptBatch
from contrec_fast.engine import Engine
from contrec_fast.engine.head import stable_id
from contrec_fast.ops.noise import philox_normal

AT_ONCE = 10  # users that the release reads at a time
TORCH_BATCH = 48  # the fastest of 32, 48, 64, 96 and 128


def now() -> float:
    """Seconds on the processor's clock for one thread, which other work on the machine changes
    less, else on the wall's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Clock:
    """Seconds spent in each named stage; stages do not nest."""

    def __init__(self):
        self.seconds = defaultdict(float)

    @contextmanager
    def stage(self, name: str):
        start = now()
        yield
        self.seconds[name] += now() - start

    def timed(self, call, name: str):
        def wrapped(*arguments, **options):
            with self.stage(name):
                return call(*arguments, **options)

        return wrapped


class Ways:
    """What ways to the lists of some rows of an engine's dataset are made of."""

    def __init__(self, recommender: Engine, k: int):
        self.engine, self.k = recommender, k
        self.device = recommender.catalog.vectors.device
        model, self.dataset = recommender.model, recommender.dataset
        self.model, head = model, model.config.head
        self.histories = self.dataset.histories
        denoiser, plan = model.head.denoiser, recommender.head.plan
        self.steps = head.steps
        self.folded = TorchSampler.from_plan(denoiser, plan, head.guidance, torch.float32)
        self.denoiser = ReleasedDenoiser.from_model(denoiser).eval()
        self.schedule = schedule(head.steps)
        self.items = F.normalize(model.item_vectors.detach(), dim=1)
        self.groups = recommender.matcher.groups.to(self.device)
        self.guidance = head.guidance

    def noise(self, rows) -> torch.Tensor:
        """[steps, B, D] what the engine draws for these users."""
        keys, dim = [stable_id(self.dataset.user_ids[row]) for row in rows], self.items.shape[1]
        ids, seed = torch.tensor(keys, device=self.device), torch.tensor(self.engine.seed)
        return torch.stack([philox_normal(seed, ids, dim, step) for step in range(self.steps)])

    def fast(self, rows, noise):
        found = self.engine.recommend(rows, self.k)
        return torch.from_numpy(found.ids), found.texts, None

    def _texts(self, written) -> list[str]:
        texts = self.model.text_tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _padded(self, histories) -> PromptBatch:
        batch = self.engine.prompts.inference_batch(histories)
        more = PROMPT_TOKENS - batch.token_ids.shape[1]
        if more < 0:
            raise SystemExit(f"prompts: expected at most {PROMPT_TOKENS} tokens")
        fills = {"token_ids": self.engine.prompts.pad, "rows": -1, "attention_mask": 0}
        for name, value in fills.items():
            setattr(batch, name, F.pad(getattr(batch, name), (more, 0), value=value))
        batch.read_column = batch.read_column + more
        return batch.to(self.device)

    def _inserted(self, batch: PromptBatch):
        """Embeddings, the items' tokens made and written user by user."""
        table = self.model.backbone.get_input_embeddings().weight
        tokens = self.engine.prompts.tokens
        first = len(table)
        table = torch.cat([table, table[:1]])
        begins = (batch.rows >= 0) & (batch.rows % tokens == 0)
        token_ids = batch.token_ids.masked_fill(begins, first).cpu()
        shown = [items[items >= 0].tolist() for items in batch.shown]

        def encode(vectors):
            return self.model.encode(vectors).transpose(0, 1)

        return insert_tokens(token_ids, shown, self.model.item_vectors, encode, table, first)


class TimedWays(Ways):
    """The three ways on a CPU, and the clock they use.

    Args:
        recommender: has written before, so that all it calls is there to be timed.
    """

    def __init__(self, recommender: Engine, k: int):
        super().__init__(recommender, k)
        model = recommender.model
        self.prefix = recommender.reader.prefix
        self.clock = Clock()
        tokenizer, role = model.text_tokenizer, torch.from_numpy(recommender.prompts.fixed[0][0])
        self.generation = TorchGeneration(
            model.backbone, role[None], model.config.prompt.response_tokens, tokenizer.eos_token_id
        )
        self._time_the_engine()

    def _time_the_engine(self) -> None:
        """Let the clock see what the engine calls in each stage."""
        reader = self.engine.reader
        for owner, name, stage in (
            (self.engine, "_prepare", "prompt"),
            (reader.packer, "order", "prompt"),
            (reader.packer, "pack", "prompt"),
            (reader, "_prefill", "prefill"),
            (reader._decoder, "write", "decode"),
            (self.engine, "vectors", "sample"),
            (ops, "cosine_topk", "top-K"),
        ):
            setattr(owner, name, self.clock.timed(getattr(owner, name), stage))

    @torch.inference_mode()
    def released(self, rows, noise):
        texts, conditions, ids, stage = [], [], [], self.clock.stage
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            with stage("prompt"):
                batch = self._padded([self.histories[row] for row in part])
                embedded = self._inserted(batch)
            condition, written = self._generate(batch, embedded)
            with stage("sample"):
                vectors = sample(
                    self.denoiser, self.schedule, condition, self.guidance,
                    noise[:, start : start + AT_ONCE],
                )  # fmt: skip
            with stage("top-K"):
                seen = [self.histories[row].tolist() for row in part]
                ids.append(rank(vectors, self.model.item_vectors, seen)[1][:, : self.k])
            conditions.append(condition)
            texts += written
        return torch.cat(ids), texts, torch.cat(conditions)

    @torch.inference_mode()
    def torch(self, rows, noise):
        order = np.argsort([len(self.histories[row]) for row in rows], kind="stable")
        parts, stage, room = [], self.clock.stage, self.generation.room
        for part in np.split(order, range(TORCH_BATCH, len(rows), TORCH_BATCH)):
            histories = [self.histories[row] for row in rows[part]]
            with stage("prompt"):
                batch = self.engine.prompts.inference_batch(histories)
                lengths = batch.attention_mask.sum(1) - self.prefix
                # Padded on the left: what is cut off there is the prefix or as long.
                embedded = self.model.embed(batch, room)[:, self.prefix :]
                batch.read_column = batch.read_column - self.prefix
            hidden, written = self.generation(embedded, lengths, stage)
            condition = self.model.conditions(hidden, batch)
            texts = self._texts(written)
            with stage("sample"):
                vectors = self.folded(condition, noise[:, part])
            with stage("top-K"):
                users = np.repeat(np.arange(len(part)), [len(history) for history in histories])
                _, ids = torch_topk(
                    vectors, self.items, self.groups, self.engine.matcher.match(texts),
                    torch.from_numpy(users), torch.from_numpy(np.concatenate(histories)),
                    self.model.config.retrieval.bonus, self.k,
                )  # fmt: skip
            parts.append((ids, texts, condition))
        ids, texts, conditions = zip(*parts)
        texts, back = sum(texts, []), np.argsort(order)
        return torch.cat(ids)[back], [texts[i] for i in back], torch.cat(conditions)[back]

    def _generate(self, batch: PromptBatch, embedded):
        """Conditions and texts, as the release gets them from transformers' `generate`."""
        model, backbone = self.model, self.model.backbone
        backbone.set_attn_implementation("eager")
        states, begun, ended = [], [], []

        def after(module, arguments, output):
            states.append(output.last_hidden_state)
            ended.append(now())

        handles = [
            backbone.base_model.register_forward_pre_hook(lambda *_: begun.append(now())),
            backbone.base_model.register_forward_hook(after),
        ]
        start = now()
        output = backbone.generate(
            inputs_embeds=embedded,
            attention_mask=batch.attention_mask,
            max_new_tokens=model.config.prompt.response_tokens,
            do_sample=False,
            pad_token_id=model.text_tokenizer.pad_token_id,
            eos_token_id=model.text_tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_hidden_states=True,  # the release keeps those of all positions
        )
        spent, prefill = now() - start, ended[0] - begun[0]
        self.clock.seconds["prefill"] += prefill
        self.clock.seconds["decode"] += spent - prefill
        for handle in handles:
            handle.remove()
        backbone.set_attn_implementation("sdpa")
        return model.conditions(states[0], batch), self._texts(output.sequences)
