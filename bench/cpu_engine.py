"""Users per second from histories to lists on the CPU, in three ways, interleaved in one run.

    python bench/cpu_engine.py RUN --out RESULT.json     # RUN: the folder of a trained model
    python bench/cpu_engine.py                           # trains on the made-up shop first

- released: the release's way, `released.py`'s pieces around its way to use the language model:
  10 users at a time, prompts padded to 1,024 tokens, tokens inserted user by user, eager
  attention, `generate` that keeps all hidden states, 2 denoiser calls per step, cosines user by
  user and a full sort. Its bonus is inert.
- torch: well-written PyTorch: users by length, 64 at a time (fastest of 16 to 128), padded to the
  longest of them, `generate` with the key-value cache and sdpa, the folded sampler, one product
  and `topk`.
- engine: `Engine`.

All three sample as the release does (exp schedule, DDPM, guidance 2), and with the same noise. The
engine's lists are compared with torch's, the texts and conditions of all three with each other.
Every round takes other users, so that the engine's drafts meet new ones; they are learned from the
users of the warm-up, as many at most, and of the rounds before. Beside the time stands the
processor's, which other work on the machine changes less. Threads: OMP_NUM_THREADS.
"""

import argparse
import copy
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from released import ReleasedDenoiser, insert_tokens, rank, sample, schedule
from reporting import environment, positive, record, store
from torch_sampler import TorchSampler
from torch_topk import torch_topk

from contrec_fast import ContRec, ops
from contrec_fast.config import apply_overrides
from contrec_fast.data import synthetic_shop
from contrec_fast.data.prompts import PromptBatch
from contrec_fast.engine import Engine
from contrec_fast.ops.noise import philox_normal
from contrec_fast.presets import demo_config

RELEASED = ("head.schedule=exp", "head.method=ddpm", "head.guidance=2")
AT_ONCE = 10  # users that the release reads at a time
PROMPT_TOKENS = 1024
TORCH_BATCH = 64


class Ways:
    """The three ways to the lists of some rows of a recommender's dataset."""

    def __init__(self, recommender: Engine, k: int):
        self.engine, self.k = recommender, k
        model, self.dataset = recommender.model, recommender.dataset
        self.model, head = model, model.config.head
        self.histories = self.dataset.histories
        denoiser, plan = model.head.denoiser, recommender.head.plan
        self.steps = head.steps
        self.folded = TorchSampler.from_plan(denoiser, plan, head.guidance, torch.float32)
        self.denoiser = ReleasedDenoiser.from_model(denoiser).eval()
        self.schedule = schedule(head.steps)
        self.items = F.normalize(model.item_vectors.detach(), dim=1)
        self.groups = recommender.matcher.groups
        self.guidance = head.guidance

    def noise(self, rows) -> torch.Tensor:
        """[steps, B, D] what the engine draws for these users."""
        ids, dim = self.engine.keys[torch.as_tensor(rows)], self.items.shape[1]
        seed = torch.tensor(self.engine.seed)
        return torch.stack([philox_normal(seed, ids, dim, step) for step in range(self.steps)])

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
            ids.append(rank(vectors, self.model.item_vectors, seen)[1][:, : self.k])
            conditions.append(condition)
            texts += written
        return torch.cat(ids), texts, torch.cat(conditions)

    @torch.inference_mode()
    def torch(self, rows, noise):
        order = np.argsort([len(self.histories[row]) for row in rows], kind="stable")
        parts = []
        for part in np.split(order, range(TORCH_BATCH, len(rows), TORCH_BATCH)):
            histories = [self.histories[row] for row in rows[part]]
            batch = self.engine.prompts.inference_batch(histories)
            condition, texts = self._generate(batch, self.model.embed(batch), "sdpa")
            vectors = self.folded(condition, noise[:, part])
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

    def fast(self, rows, noise):
        found = self.engine.recommend(rows, self.k)
        return torch.from_numpy(found.ids), found.texts, None

    def _generate(self, batch: PromptBatch, embedded, attention: str):
        """Conditions and texts, by transformers' `generate`."""
        model, backbone = self.model, self.model.backbone
        keep = attention == "eager"  # the release keeps the hidden states of all positions
        backbone.set_attn_implementation(attention)
        states = []
        handle = backbone.base_model.register_forward_hook(
            lambda module, args, output: states.append(output.last_hidden_state)
        )
        output = backbone.generate(
            inputs_embeds=embedded,
            attention_mask=batch.attention_mask,
            max_new_tokens=model.config.prompt.response_tokens,
            do_sample=False,
            pad_token_id=model.text_tokenizer.pad_token_id,
            eos_token_id=model.text_tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_hidden_states=keep,
        )
        handle.remove()
        backbone.set_attn_implementation("sdpa")
        texts = model.text_tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        return model.conditions(states[0], batch), [text.strip() for text in texts]

    def _padded(self, histories) -> PromptBatch:
        batch = self.engine.prompts.inference_batch(histories)
        more = PROMPT_TOKENS - batch.token_ids.shape[1]
        if more < 0:
            raise SystemExit(f"prompts: expected at most {PROMPT_TOKENS} tokens")
        fills = {"token_ids": self.engine.prompts.pad, "rows": -1, "attention_mask": 0}
        for name, value in fills.items():
            setattr(batch, name, F.pad(getattr(batch, name), (more, 0), value=value))
        batch.read_column = batch.read_column + more
        return batch

    def _inserted(self, batch: PromptBatch):
        """Embeddings, the items' tokens made and written user by user."""
        table = self.model.backbone.get_input_embeddings().weight
        tokens = self.engine.prompts.tokens
        first = len(table)
        table = torch.cat([table, table[:1]])
        begins = (batch.rows >= 0) & (batch.rows % tokens == 0)
        token_ids = batch.token_ids.masked_fill(begins, first)
        shown = [items[items >= 0].tolist() for items in batch.shown]

        def encode(vectors):
            return self.model.encode(vectors).transpose(0, 1)

        return insert_tokens(token_ids, shown, self.model.item_vectors, encode, table, first)


class Stages:
    """Seconds that the engine spends in each of its parts, by wrapping what it calls."""

    def __init__(self, recommender: Engine):
        self.seconds = defaultdict(float)
        reader = recommender.reader
        decoder = reader._decoder
        for owner, name, stage in (
            (reader.packer, "order", "prompt"),
            (reader.packer, "pack", "prompt"),
            (reader, "_prefill", "prefill"),
            (decoder, "write", "decode"),
            (recommender, "vectors", "sample"),
            (ops, "cosine_topk", "top-K"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), stage))

    def _timed(self, call, stage):
        def wrapped(*arguments, **options):
            start = time.perf_counter()
            result = call(*arguments, **options)
            self.seconds[stage] += time.perf_counter() - start
            return result

        return wrapped


def load(args) -> Engine:
    if args.run:
        model = ContRec.from_pretrained(args.run)
    else:
        model = ContRec.fit(synthetic_shop(), demo_config())
    config = apply_overrides(model.config, [*RELEASED, f"head.steps={model.config.head.timesteps}"])
    wanted = (config.head.denoiser, config.head.source, config.head.prediction, config.head.space)
    if wanted != ("mlp", "hidden", "x0", "item") or config.prompt.text == "none":
        raise SystemExit("RUN: expected denoiser mlp, source hidden, prediction x0, and texts")
    model = copy.copy(model)
    model.config = config
    return Engine(model, model.dataset)


def check(found: dict, few: int) -> dict:
    """How far the ways agree on a round's users; lists must be the same but for rounding."""
    ids, texts, _ = found["engine"]
    expected, written, condition = found["torch"]
    _, released, conditions = found["released"]

    def alike(first, second):
        return float(np.mean([a == b for a, b in zip(first, second)]))

    agreement = {
        "lists like torch's": float((ids == expected).all(1).float().mean()),
        "texts like torch's": alike(texts, written),
        "released texts like torch's": alike(released, written),
        "released conditions, largest difference": float(
            (conditions - condition[:few]).abs().max()
        ),
    }
    if agreement["lists like torch's"] < 0.98 or agreement["texts like torch's"] < 0.98:
        raise SystemExit(f"the engine's lists differ: {agreement}")
    return agreement


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a trained model")
    parser.add_argument("--users", type=positive, default=512, help="per round; 512")
    parser.add_argument("--few", type=positive, default=AT_ONCE, help="of them, released way; 10")
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--k", type=positive, default=20)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    recommender = load(args)
    ways = Ways(recommender, args.k)
    everybody = np.random.default_rng(0).permutation(len(ways.histories))
    args.users = min(args.users, len(everybody) // (args.rounds + 1))
    args.few = min(args.few, args.users)
    if not args.users:
        parser.error(f"--rounds: expected fewer than the data's {len(everybody)} users")
    warm = len(everybody) - args.rounds * args.users
    seconds, processor, stages, agreements = defaultdict(list), defaultdict(list), [], []
    recommender.recommend(everybody[: min(warm, args.users)], args.k)  # memory, drafts
    parts = Stages(recommender)
    for number in range(args.rounds):
        rows = everybody[warm + number * args.users :][: args.users]
        noise, found = ways.noise(rows), {}
        parts.seconds.clear()
        for name, way, count in (
            ("engine", ways.fast, args.users),
            ("torch", ways.torch, args.users),
            ("released", ways.released, args.few),
        ):
            begin = time.perf_counter(), time.process_time()
            found[name] = way(rows[:count], noise[:, :count])
            seconds[name].append((time.perf_counter() - begin[0]) / count)
            processor[name].append((time.process_time() - begin[1]) / count)
        rest = seconds["engine"][-1] * args.users - sum(parts.seconds.values())
        stages.append({**parts.seconds, "assembly": rest})
        agreements.append(check(found, args.few))
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    cpu = {name: statistics.median(times) for name, times in processor.items()}
    shape = f"{args.users} users, {len(ways.items)} items, {ways.steps} steps, k {args.k}"
    cases = [
        record("recommend", shape, "float32", name, times, torch_s=middle["torch"])
        | {
            "users_per_s": 1 / middle[name],
            "x_released": middle["released"] / middle[name],
            "processor_us": 1e6 * cpu[name],
            "x_torch_processor": cpu["torch"] / cpu[name],
            "x_released_processor": cpu["released"] / cpu[name],
        }
        for name, times in seconds.items()
    ]  # fmt: skip
    for case in cases:
        print(
            f"{case['backend']:9} {case['users_per_s']:8.1f} users/s  "
            f"{case['x_released']:6.1f} x released  {case['x_torch']:5.2f} x torch; processor "
            f"{case['processor_us']:.0f} us/user  {case['x_released_processor']:.1f} x released  "
            f"{case['x_torch_processor']:.2f} x torch"
        )
    total = sum(map(sum, (stage.values() for stage in stages)))
    for name in stages[0]:
        spent = sum(stage[name] for stage in stages)
        each = 1e6 * spent / args.rounds / args.users
        print(f"  {name:9} {each:7.0f} us/user {spent / total:6.1%}")
    print(agreements[0], recommender.reader.counters)
    if args.out:
        settings = vars(args) | {"run": "trained model" if args.run else "demo shop"}
        results = [*cases, {"stages": stages, "agreement": agreements}]
        store(args.out, environment("cpu"), settings, results)


if __name__ == "__main__":
    main()
