"""Packed tokens of many sequences through any transformers language model, and their cache.

Transformers lets a model's attention be replaced by a registered function and its cache by layers
of another kind. With both, T tokens of B sequences go through a model as one sequence [1, T]: no
linear layer sees padding. Only the attention puts the queries side by side, [B, W].
"""

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from contrec_fast.engine import varlen
from contrec_fast.engine.layers import Layers
from contrec_fast.native_layers import layer_instruction_sets
from contrec_fast.ops.transfer import upload

NAME = "contrec_packed"  # of the attention function, as transformers knows it
CHANGING = threading.RLock()  # while a language model, which others may share, is changed
# Sequences in one attention: neighbours have similar lengths, so few places are padding.
BLOCK = {"cpu": 16, "cuda": 64}


class Block(NamedTuple):
    """B sequences whose packed queries go through one attention, W side by side.

    tokens: which of the packed ones, t of them. rows: of the cache, a slice or [B] int64. shape:
    (B, W). reach: how many places of the cache are looked at. padded: [B * W] int64, the token at
    each place; places: [t] int64, the place of each token; both None if t is B * W. mask: float,
    [B or 1, 1, W, reach], added to the attention's scores.
    """

    tokens: slice
    rows: slice | Tensor
    shape: tuple[int, int]
    reach: int
    padded: Tensor | None
    places: Tensor | None
    mask: Tensor


@dataclass
class Packing:
    """Which sequences T packed tokens belong to.

    positions: [T] int64 in their sequence, which are also places in the cache. rows: [T] int64,
    their row of the cache. starts: [B + 1] int64, the first token of each sequence, and T.
    blocks, runs: what the attention goes by, if it goes by these (`RowCache.attention`).
    """

    positions: Tensor
    rows: Tensor
    starts: Tensor
    blocks: list[Block]
    runs: varlen.Runs | None = None

    @classmethod
    def of(cls, counts: Tensor, positions: Tensor, cache: "RowCache", first: int = 0,
           alike: bool = False) -> "Packing":  # fmt: skip
        """The packing of counts [B] tokens at positions [T] of their sequences, both on the host.

        Args:
            first: cache row of the first sequence. alike: all sequences have the same positions,
            as far as they go: one mask does for all.
        """
        rows = torch.arange(first, first + len(counts)).repeat_interleave(counts)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        runs = None
        if cache.attention == "runs":
            runs = varlen.Runs.of(rows.numpy(), positions.numpy(), cache.device)
        blocks, start = [], 0
        block = BLOCK.get(cache.device.type, BLOCK["cuda"])
        for busy in counts.nonzero()[:, 0].split(block) if cache.attention == "blocks" else ():
            part = counts[busy].numpy()
            tokens = slice(start, start := start + int(part.sum()))
            at = positions[tokens].numpy()
            blocks.append(_block(part, tokens, at, first + busy, cache, alike))
        return cls(*(upload(x, cache.device) for x in (positions, rows, starts)), blocks, runs)


def _block(counts, tokens, positions, rows, cache: "RowCache", alike: bool) -> Block:
    width, reach = int(counts.max()), int(positions.max()) + 1
    shape, padded, places, at = (len(counts), width), None, None, positions
    if len(positions) < len(counts) * width:
        places = np.flatnonzero(np.arange(width) < counts[:, None])
        padded = np.zeros(len(counts) * width, dtype=np.int64)
        padded[places] = np.arange(len(places))
        at = positions[padded]
        padded, places = (upload(torch.from_numpy(x), cache.device) for x in (padded, places))
    at = at.reshape(shape)
    at = upload(torch.from_numpy(at[counts.argmax()][None] if alike else at), cache.device)
    mask = causal_mask(at, reach, cache.dtype)
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        rows = slice(first, last + 1)  # which needs no copy of keys and values
    else:
        rows = upload(rows, cache.device)
    return Block(tokens, rows, shape, reach, padded, places, mask)


def causal_mask(positions: Tensor, reach: int, dtype: torch.dtype) -> Tensor:
    """Of queries at positions [B, W]: [B, 1, W, reach], 0 up to there and -inf behind."""
    later = torch.arange(reach, device=positions.device) > positions[:, None, :, None]
    mask = torch.zeros(later.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(later, -torch.inf)


class _Stored(Exception):
    """A layer's keys and values are stored, and nothing else of it is wanted."""


class _RowLayer(CacheLayerMixin):
    """Keys and values [rows, heads, places, d] of one layer; memory is only ever allocated anew."""

    is_sliding = False

    def __init__(self, cache: "RowCache"):
        super().__init__()
        self.cache, self.only_store = cache, False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, places = self.cache.rows, self.cache.places
        # Zeros: what is never written is masked, but 0 times what memory holds may be NaN.
        self.keys, self.values = (
            x.new_zeros(rows, x.shape[1], places, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        packing = self.cache.packing
        slots = self.cache.slots(key_states.shape[1], packing.rows, packing.positions)
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            stored.flatten(0, 2).index_copy_(0, slots, new[0].flatten(0, 1))
        if self.only_store:
            raise _Stored
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.cache.places

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.places, 0


class RowCache(Cache):
    """A row of places for each sequence, all of which begin with the same prefix.

    Args:
        layers: how many. dtype: of the language model. device: where.

    Attributes:
        rows, places: the capacity. packing: of the tokens that go through the model now.
        attention: goes by "blocks", by "runs" (`engine.varlen`), or "layers" have their own.
    """

    def __init__(self, layers: int, dtype: torch.dtype, device):
        super().__init__(layers=[_RowLayer(self) for _ in range(layers)])
        self.dtype, self.device, self.rows, self.places = dtype, device, 0, 0
        self.packing: Packing | None = None
        self.attention = "blocks"
        self._prefix: list[tuple[Tensor, Tensor]] = []

    @property
    def place_bytes(self) -> int:
        """Memory of one place, once something is stored."""
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in self.stored())

    def stored(self) -> list[Tensor]:
        """Keys and values [rows, heads, places, d] of each layer, once something is stored."""
        return [x for layer in self.layers for x in (layer.keys, layer.values)]

    def slots(self, heads: int, rows: Tensor, places: Tensor) -> Tensor:
        """Where T tokens at rows [T] and places [T] are: [heads * T] rows of `stored`, [-1, d]."""
        head = torch.arange(heads, device=rows.device)[:, None]
        return ((rows * heads + head) * self.places + places).flatten()

    def keep_prefix(self, length: int) -> None:
        """Let every row begin with what the first places of row 0 hold."""
        self._prefix = [
            (layer.keys[0, :, :length].clone(), layer.values[0, :, :length].clone())
            for layer in self.layers
        ]
        self._spread()

    def reserve(self, rows: int, places: int) -> None:
        """Make room for so many sequences of such a length; what rows held is lost."""
        if rows <= self.rows and places <= self.places:
            return
        self.rows, self.places = max(rows, self.rows), max(places, self.places)
        try:
            for layer in self.layers:
                if layer.is_initialized:
                    layer.lazy_initialization(layer.keys[:1], layer.values[:1])
        except BaseException:  # out of memory: some layers are of the new size, some are not
            self.rows = self.places = 0
            raise
        self._spread()

    def _spread(self) -> None:
        # Once per allocation: no sequence writes where the prefix is.
        for layer, (keys, values) in zip(self.layers, self._prefix):
            layer.keys[:, :, : keys.shape[1]], layer.values[:, :, : values.shape[1]] = keys, values


def _attend(module, query, key, value, attention_mask, packing=None, **options):
    """Attention of queries [1, heads, T, d] over rows of the cache, as transformers calls it."""
    query, mixed = query[0].transpose(0, 1), []
    if packing.runs is not None:
        return varlen.attend(query, key, value, packing.runs, options.get("scaling"))[None], None
    # Heads that share keys and values stand below one another as queries: nothing is repeated.
    groups = query.shape[1] // key.shape[1]
    for block in packing.blocks:
        part = query[block.tokens]
        if block.padded is not None:
            part = part[block.padded]
        part = part.unflatten(0, block.shape).transpose(1, 2).unflatten(1, (-1, groups))
        keys, values = (x[:, :, : block.reach][block.rows] for x in (key, value))
        mask = block.mask if groups == 1 else block.mask.repeat(1, 1, groups, 1)
        part = F.scaled_dot_product_attention(
            part.flatten(2, 3), keys, values, mask, scale=options.get("scaling")
        )
        part = part.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2).flatten(0, 1)
        mixed.append(part if block.places is None else part[block.places])
    return torch.cat(mixed)[None], None


AttentionInterface.register(NAME, _attend)


class PackedModel:
    """A causal language model that reads packed tokens.

    Args:
        backbone: a transformers causal LM; it is left as it is.

    Attributes:
        suits: whether the model can be read so: each of its layers attends to all that is before
        and goes through transformers' attention interface. narrows: whether its last layer can
        leave out tokens of which only keys and values are wanted. Both are found by trying.
        layers: what stands in for the model's own (`engine.layers`), or None. compiled: a line
        that says what runs the layers, and why.
    """

    def __init__(self, backbone):
        self.backbone, self.base = backbone, backbone.base_model
        table = backbone.get_input_embeddings().weight
        count = backbone.config.get_text_config(decoder=True).num_hidden_layers
        self.cache = RowCache(count, table.dtype, table.device)
        stacks = [m for m in self.base.modules() if isinstance(m, nn.ModuleList)]
        self._last = next((stack[-1] for stack in stacks if len(stack) == count), None)
        self.narrows = self._last is not None
        found = Layers.of(self.base)
        self.layers = found if isinstance(found, Layers) else None
        self.compiled = f"layers: transformers' own ({found})"
        plain = all(type(x) is DynamicLayer for x in DynamicCache(config=backbone.config).layers)
        self.suits = plain and self._agrees(table)
        if self.layers is not None:
            self.compiled = f"layers: C++ kernels ({layer_instruction_sets()[0]})"
        elif isinstance(found, Layers):
            self.compiled = "layers: transformers' own (they compute something else than Llama's)"

    @torch.inference_mode()
    def _agrees(self, table: Tensor) -> bool:
        """Compare with the model as it is, on two short sequences, one of which goes on from what
        the cache holds; sets `layers`, `narrows` and the cache's `attention`."""
        numbers = torch.arange(7 * table.shape[1], device=table.device) % 13
        x = (numbers.view(7, -1) - 6).to(table.dtype) * table.std() / 4
        expected = torch.cat([
            self.base(inputs_embeds=part[None], use_cache=False).last_hidden_state[0]
            for part in (x[:5], x[5:])
        ])  # fmt: skip
        self.cache.reserve(2, 5)
        keep = torch.tensor([1, 3])
        tolerance = 1e-3 if table.dtype == torch.float32 else 0.1
        narrows, layers = [True, False] if self.narrows else [False], self.layers
        ways = [("blocks", narrow) for narrow in narrows]
        if layers is not None:
            ways = [("layers", self.narrows), *ways]
        if varlen.wanted(table.device, table.dtype):
            ways = [("runs", narrow) for narrow in narrows] + ways
        for attention, narrow in ways:
            self.cache.attention, self.narrows = attention, narrow
            self.layers = layers if attention == "layers" else None
            before = Packing.of(torch.tensor([3, 0]), torch.arange(3), self.cache)
            positions = torch.tensor([3, 4, 0, 1])
            packing = Packing.of(torch.tensor([2, 2]), positions, self.cache)
            kept = Packing.of(torch.tensor([1, 1]), positions[keep], self.cache)
            try:
                self(x[:3], before)
                found = self(x[3:], packing, keep.to(table.device), kept)
                wanted = expected[3:][keep]
                error = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
                if bool((error < tolerance).all()):
                    return True
            except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError):
                pass  # what another way of passing arguments comes to
        return False

    def __call__(self, embedded: Tensor, packing: Packing, keep: Tensor | None = None,
                 kept: Packing | None = None) -> Tensor:  # fmt: skip
        """Last hidden states [T, H] of embedded tokens [T, H], which the cache then holds.

        Args:
            keep: [T'] int64, the tokens whose states are wanted, all by default: [T', H] then.
            kept: their packing.
        """
        if self.layers is not None:
            return self.layers(embedded, self.cache, packing, keep, kept)
        self.cache.packing = packing
        narrowed = keep is not None and self.narrows
        narrowing = self._narrowing(packing, keep, kept) if narrowed else _nothing()
        with CHANGING, self._attention(), narrowing:
            hidden = self.base(
                inputs_embeds=embedded[None], position_ids=packing.positions[None],
                past_key_values=self.cache, use_cache=True, packing=packing,
            ).last_hidden_state[0]  # fmt: skip
        return hidden if keep is None or narrowed else hidden[keep]

    @contextmanager
    def _attention(self):
        config = self.backbone.config
        before, config._attn_implementation = config._attn_implementation, NAME
        try:
            yield
        finally:
            config._attn_implementation = before

    @contextmanager
    def _narrowing(self, packing: Packing, keep: Tensor, kept: Packing):
        layer, stored = self._last, self.cache.layers[-1]

        def pick(x):
            """The kept tokens of whatever there is of each token."""
            if isinstance(x, Tensor):
                return x[:, keep] if x.shape[:2] == (1, len(packing.positions)) else x
            return type(x)(map(pick, x)) if type(x) in (tuple, list) else x

        def before(module, args, kwargs):
            handle.remove()  # the layer is called again here
            stored.only_store = True
            try:
                layer(*args, **kwargs)
            except _Stored:
                pass
            finally:
                stored.only_store = False
            self.cache.packing = kept
            kwargs = {name: pick(value) for name, value in kwargs.items()}
            return tuple(map(pick, args)), kwargs | {"packing": kept}

        handle = layer.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _nothing():
    yield
