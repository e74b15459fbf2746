"""The language model's part of inference: histories to conditions and texts."""

import copy
import functools
import threading
from bisect import bisect_right
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from contrec_fast import ops
from contrec_fast.data.prompts import Prompts, Window
from contrec_fast.engine.constrained import ConstrainedDecoder, ResponseTrie
from contrec_fast.engine.decoding import Decoder
from contrec_fast.engine.drafts import Drafts
from contrec_fast.engine.fixed import WIDTH
from contrec_fast.engine.fp8 import quantize_layers
from contrec_fast.engine.packed import PackedModel, Packing
from contrec_fast.engine.prompting import PackedPrompts, PromptPacker
from contrec_fast.engine.remembered import Known, Remembered, growing_window
from contrec_fast.models.contrec import ContRec
from contrec_fast.ops.transfer import upload

CACHE_BYTES = 2**32  # of keys and values on a CPU; more users than fit are served in turn
CACHE_SHARE = 4  # on a GPU: the free memory over this
MARGIN = 64  # places for what stands in a prompt beside role and items
EXAMPLES = 5000  # responses that drafts are made of at first
BUDGET = {"cpu": 4096, "cuda": 32768}  # tokens in one pass over prompts


def _one_at_a_time(method):
    """Let threads that share a reader, and with it the cache, take turns."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        with self._turn:
            return method(self, *args, **kwargs)

    return call


class Reader:
    """Reads histories and writes responses: what `ContRec.read` and `.write` do, but faster.

    Prompts are packed: no linear layer sees padding. What all prompts begin with is read once,
    here, and stays in the cache. The last layer computes keys and values everywhere, the rest of
    it only where something is read. Responses are drafted (`engine.drafts`). In float32 the
    results are the same up to rounding. A language model that cannot be packed (`packed.suits`:
    one with a sliding window, or whose attention does not go through transformers' interface) is
    read by ContRec's own methods.

    The model must not change as long as the reader is used. Threads that share a reader take turns.

    With `remembered`, of a user who comes back with a history that continues the one read before,
    only what is new is read. For that, the window onto a history grows to twice
    `config.prompt.history` items before it is cut back (`remembered.growing_window`), whether or
    not the user is known: results are those of reading these windows from scratch, up to rounding,
    whatever is remembered. Histories longer than `config.prompt.history` are thus read in windows
    longer than those of training, without an effect on HR@10 or NDCG@10 that was found
    (`bench/findings.md`).

    Args:
        prompts: of the catalog that the histories refer to. dtype: that the language model
        computes in, its own by default; for another one it is copied. bfloat16 leaves conditions
        2 to 3 digits and may change words of the texts; "fp8": bfloat16 with linear layers in 8
        bits (`engine.fp8`). learns: whether drafts are also made of
        what was written before, so that the passes, and with them the rounding, depend on it.
        remembered: bytes for keys and values of users' items, on the model's device
        (`engine.remembered`); None remembers nobody. constrained: texts are then responses of the
        catalog, whole or cut at `config.prompt.response_tokens`, so that category and title exist:
        the greedy choice among the tokens that go on with one. All of them are tokenized.

    Attributes:
        counters: tokens of "prompts" read; decoding "passes" and the tokens "fed" in them;
        "captures" of CUDA graphs and their "replays" (passes are what no graph served); tokens
        "written"; "hits", "misses", "evictions" and "saved" tokens of what is remembered.

    Raises:
        ValueError: `remembered` is less than one token takes, or `constrained` is wanted of a
        language model that cannot be packed, in one line.
    """

    def __init__(
        self,
        model: ContRec,
        prompts: Prompts,
        dtype: torch.dtype | str | None = None,
        learns: bool = True,
        remembered: int | None = None,
        constrained: bool = False,
    ):
        backbone = model.backbone
        if dtype not in (None, backbone.dtype):
            backbone = copy.deepcopy(backbone).to(torch.bfloat16 if dtype == "fp8" else dtype)
        self.model, self.prompts, self.learns = model, prompts, learns
        self._turn = threading.RLock()
        self.packed, self.constrained = PackedModel(backbone), constrained
        if dtype == "fp8":  # only now: rounding this coarse hides whether a model can be packed
            quantize_layers(backbone)
        if constrained and not self.packed.suits:
            raise ValueError(
                "constrained: expected a language model that can be packed, without a sliding "
                f"window, got {type(backbone).__name__}"
            )
        names = ("prompts", "passes", "fed", "replays", "captures", "written", "hits", "misses",
                 "evictions", "saved")  # fmt: skip
        self.counters = dict.fromkeys(names, 0)
        self.text_table = backbone.get_input_embeddings().weight.detach()
        self.tokens = model.item_tokens.flatten(0, 1).to(self.text_table.dtype)
        self.packer = PromptPacker(prompts, len(model.item_tokens), self.text_table.device)
        self.prefix = self.packer.role.shape[1]
        self._decoder: Decoder | None = None
        self.cache_bytes = CACHE_BYTES
        if self.text_table.is_cuda:
            self.cache_bytes = torch.cuda.mem_get_info(self.text_table.device)[0] // CACHE_SHARE
        if self.packed.suits and self.prefix:
            self._read_role()
        self.remembered, self._grows = None, remembered is not None
        if self._grows and self.packed.suits:
            self.remembered = Remembered(remembered, self.packed.cache, self.counters)

    @torch.inference_mode()
    def _read_role(self) -> None:
        cache, token_ids = self.packed.cache, torch.from_numpy(self.packer.role[0])
        cache.reserve(1, self.prefix)
        packing = Packing.of(torch.tensor([self.prefix]), torch.arange(self.prefix), cache)
        self.packed(self.text_table[token_ids.to(cache.device)], packing)
        cache.keep_prefix(self.prefix)

    @_one_at_a_time
    @torch.inference_mode()
    def warm_up(self, histories: Sequence[np.ndarray]) -> None:
        """Write for users like those to come, then capture CUDA graphs (`engine.fixed`).

        Nothing is captured later: longer prompts or more users at once than here are served
        without graphs. Of no use on a CPU, where the same passes run as they are.
        """
        self.write(histories)
        if self._decoder is not None:
            self._decoder.fixed.prepare()

    @_one_at_a_time
    def forget(self) -> None:
        """Let what is read from now on not depend, by its rounding, on what was read before."""
        if self._decoder is not None:
            self._decoder.drafts.forget()
        if self.remembered is not None:
            self.remembered.clear()

    @_one_at_a_time
    @torch.inference_mode()
    def read(
        self, histories: Sequence[np.ndarray], users: Sequence[Hashable] | None = None
    ) -> Tensor:
        """Conditions [B, D] of histories of item indices, oldest first, at least one each.

        Args:
            users: B ids by which users are remembered, if any are.

        Raises:
            ValueError: a prompt is longer than the language model has positions, or there are more
            or fewer users.
        """
        windows = self.windows(histories)
        if not self.packed.suits:
            batch = self.prompts.inference_batch(histories, windows)
            return ContRec.read(self.model, batch.to(self.text_table.device))
        known, order, _ = self._known(windows, users)
        packed = self.packer.pack([windows[i] for i in order], [known[i] for i in order], None)
        states = self._prefill(packed, packed.reads[:, None], lambda hidden: hidden[:, 0])
        return self._back(self._conditions(torch.cat(states), packed), order)

    @_one_at_a_time
    @torch.inference_mode()
    def write(
        self, histories: Sequence[np.ndarray], users: Sequence[Hashable] | None = None
    ) -> tuple[Tensor, list[str]]:
        """Conditions [B, D] and the texts that answer such histories, written greedily.

        Args:
            users: see `read`.

        Raises:
            ValueError: a prompt and its response are longer than the language model has positions.
        """
        windows = self.windows(histories)
        if not self.packed.suits:
            batch = self.prompts.inference_batch(histories, windows)
            return ContRec.write(self.model, batch.to(self.text_table.device))
        known, order, longest = self._known(windows, users)
        room = self.model.config.prompt.response_tokens
        # What is there already counts: it is not allocated anew, which would cost the graphs.
        places = max(self.prefix + longest + MARGIN + room, self.packed.cache.places)
        most = max(1, self.cache_bytes // (places * self.packed.cache.place_bytes))
        parts = [
            self._write([windows[i] for i in part], [known[i] for i in part])
            for part in np.split(order, range(most, len(order), most))
        ]
        conditions, texts = zip(*parts)
        texts = sum(texts, [])
        return self._back(torch.cat(conditions), order), [texts[i] for i in np.argsort(order)]

    @staticmethod
    def _back(rows: Tensor, order: np.ndarray) -> Tensor:
        """Rows in the order before."""
        return rows[upload(torch.from_numpy(np.argsort(order)), rows.device)]

    def windows(self, histories: Sequence[np.ndarray]) -> list[Window]:
        """What is read of histories."""
        if self._grows:
            return [growing_window(h, self.prompts.config.history) for h in histories]
        return self.prompts.windows(histories)

    def _known(self, windows: list[Window], users: Sequence[Hashable] | None):
        """What is remembered of users, and `PromptPacker.order`."""
        known: list[Known | None] = [None] * len(windows)
        if users is not None and len(users) != len(windows):
            raise ValueError(f"users: expected {len(windows)} ids, got {len(users)}")
        if self.remembered is not None and users is not None:
            known = self.remembered.look_up(users, windows)
        return known, *self.packer.order(windows, known)

    def _write(self, windows: list[Window], known: list[Known | None]) -> tuple[Tensor, list[str]]:
        decoder = self._decoder = self._decoder or self._make_decoder()
        opening = decoder.opening()
        packed = self.packer.pack(windows, known, opening.cpu().numpy())
        first = packed.counts - len(opening) - 1  # where the first token is written
        wanted = [packed.reads, *(first + i for i in range(len(opening) + 1))]

        def take(hidden):
            return hidden[:, 0].clone(), decoder.greedy(hidden[:, 1:])

        room = decoder.room - len(opening)
        states, best = zip(*self._prefill(packed, torch.stack(wanted, dim=1), take, room))
        places = upload(self.prefix + packed.before + first + 1, opening.device)
        written = decoder.write(opening, torch.cat(best), places)
        if self.learns:
            decoder.drafts.learn(written)
        if self.model.config.head.source == "response":
            conditions = self.model.response_conditions(written)
        else:
            conditions = self._conditions(torch.cat(states), packed)
        lines = [line[line >= 0].tolist() for line in written.cpu().numpy()]
        texts = self.model.text_tokenizer.batch_decode(lines, skip_special_tokens=True)
        return conditions, [text.strip() for text in texts]

    def _make_decoder(self) -> Decoder:
        end, room = self.model.text_tokenizer.eos_token_id, self.model.config.prompt.response_tokens
        drafts = Drafts(self.prompts.responses(EXAMPLES), end, self.text_table.device)
        if not self.constrained:
            return Decoder(self.packed, drafts, end, room, self.counters)
        responses, vocabulary = self.prompts.responses(self.packer.items), len(self.text_table)
        trie = ResponseTrie(responses, room, vocabulary, end, self.text_table.device)
        return ConstrainedDecoder(trie, self.packed, drafts, end, room, self.counters)

    def _conditions(self, states: Tensor, packed: PackedPrompts) -> Tensor:
        states = states.to(self.model.item_vectors.dtype)
        return self.model.conditions(states[:, None], packed)

    def _prefill(
        self, packed: PackedPrompts, wanted: Tensor, take, room: int | None = None
    ) -> list:
        """Read prompts, some at a time.

        Args:
            wanted: [B, n] places in each prompt, ascending. take: what is kept of the hidden
            states [b, n, H] there. room: for so many tokens more, the cache keeps a row for each
            prompt; by default prompts follow one another in the same rows.
        """
        ends, budget = (
            packed.counts.cumsum(0).tolist(),
            BUDGET.get(self.text_table.device.type, BUDGET["cuda"]),
        )
        parts = [slice(0, 0)]
        while parts[-1].stop < len(ends):
            first = parts[-1].stop
            filled = ends[first - 1] if first else 0
            parts.append(slice(first, max(bisect_right(ends, filled + budget), first + 1)))
        rows = len(ends) if room is not None else max(part.stop - part.start for part in parts)
        longest = self.prefix + int((packed.before + packed.counts).max())
        self.model.require_positions(longest + (room or 0))
        # Passes of fixed shapes write a draft's width behind a response, too.
        self.packed.cache.reserve(rows, longest + (0 if room is None else room + WIDTH))
        tokens, found = self._token_table(packed), []
        for part in parts[1:]:
            row = part.start if room is not None else 0
            found.append(take(self._pass(packed, part, wanted[part], tokens, row)))
        return found

    def _pass(self, packed: PackedPrompts, part: slice, wanted: Tensor, tokens: Tensor, row: int):
        """Hidden states [b, n, H] at places [b, n] of part of the prompts."""
        counts, before, cache = packed.counts[part], packed.before[part], self.packed.cache
        starts = counts.cumsum(0) - counts
        first = int(packed.counts[: part.start].sum())
        these = slice(first, first + int(counts.sum()))
        embedded = ops.gather_tokens(
            packed.token_ids[None, these], packed.rows[None, these], self.text_table, tokens
        )[0]
        positions = torch.arange(len(embedded)) + (before - starts).repeat_interleave(counts)
        positions += self.prefix
        packing = Packing.of(counts, positions, cache, row, alike=not before.any())
        keep = (starts[:, None] + wanted).flatten()
        each = torch.full_like(counts, wanted.shape[1])
        kept = Packing.of(each, positions[keep], cache, row)
        self.counters["prompts"] += len(embedded)
        known = packed.known[part] if self.remembered is not None else ()
        if known:
            self.remembered.restore(known, before.numpy(), row, self.prefix)
        hidden = self.packed(embedded, packing, upload(keep, embedded.device), kept)
        if known:
            lasting = (before + packed.lasting[part]).numpy()
            self.remembered.save(known, lasting, row, self.prefix)
        return hidden.view(*wanted.shape, -1)

    def _token_table(self, packed: PackedPrompts) -> Tensor:
        """Tokens [R, H] of all items, and behind them those of the users, if prompts show any."""
        if not self.prompts.config.user_token:
            return self.tokens
        users = self.model.encode(self.model.summaries(packed)[0]).flatten(0, 1)
        return torch.cat([self.tokens, users.to(self.tokens.dtype)])
