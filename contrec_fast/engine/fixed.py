"""Decoding passes of fixed shapes, which a GPU replays as CUDA graphs.

A few sequences take a GPU less time than it takes to launch the kernels of a pass one by one.
Graphs are captured when asked for, never while serving, for powers of two up to LARGEST sequences.
"""

import torch
from torch import Tensor

from contrec_fast.engine.packed import Block, PackedModel, Packing, causal_mask

WIDTH = 8  # tokens of each sequence in a pass: the last one written and a draft
LARGEST = {"cpu": 64, "cuda": 512}  # sequences; with more, a pass without padding is faster


class FixedPasses:
    """Passes of n sequences, filled up to a power of two, in buffers that stay where they are.

    Args:
        choose: hidden states [T, H] to what is wanted of each, as token ids [T]. counters:
        "captures" are counted there.
    """

    def __init__(self, packed: PackedModel, embed, choose, counters: dict):
        self.packed, self.embed, self.choose, self.counters = packed, embed, choose, counters
        self.largest = LARGEST.get(packed.cache.device.type, LARGEST["cuda"])
        self._passes: dict[int, tuple] = {}
        self._memory = self._pool = None

    def covers(self, count: int) -> bool:
        """Whether a pass of so many sequences is there, for the cache as it is allocated now."""
        return 0 < count <= self.largest and bool(self._passes) and self._memory == self._where()

    def prepare(self) -> None:
        """Make the passes of all sizes; on a GPU, capture them."""
        self._passes, self._memory = {}, self._where()
        most = getattr(self.packed.backbone.config, "max_position_embeddings", None)
        if most is not None and self.packed.cache.places > most:
            return  # what is fed behind the room of a response would have no position
        batch = self.largest
        while batch:  # the largest first: the others then reuse its memory
            self._passes[batch] = self._make(batch)
            batch //= 2

    def __call__(self, fed: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        """What is wanted after each token.

        Args:
            fed: [n, WIDTH] token ids. places: [n] of the first of them. rows: [n] of the cache.

        Returns:
            [n, WIDTH] or more dimensions.
        """
        count = len(fed)
        tokens, starts, where, run = self._passes[1 << (count - 1).bit_length()]
        for static, given in ((tokens, fed), (starts, places), (where, rows)):
            static[:count] = given
            static[count:] = given[-1]  # the same again writes the same
        return run()[:count]

    def _where(self) -> tuple:
        cache = self.packed.cache  # which may get memory that it had before, in another shape
        return cache.rows, cache.places, *(layer.keys.data_ptr() for layer in cache.layers)

    def _make(self, batch: int) -> tuple:
        cache, device = self.packed.cache, self.packed.cache.device
        tokens = torch.zeros(batch, WIDTH, dtype=torch.int64, device=device)
        where = torch.zeros(batch, dtype=torch.int64, device=device)
        # Before a capture passes run: they write behind all prompts, whose beginning rows share.
        starts = torch.full_like(where, cache.places - WIDTH)

        def body() -> Tensor:
            positions = starts[:, None] + torch.arange(WIDTH, device=device)
            mask = causal_mask(positions, cache.places, cache.dtype)
            block = Block(
                slice(0, batch * WIDTH), where, (batch, WIDTH), cache.places, None, None, mask
            )
            rows = where.repeat_interleave(WIDTH)
            firsts = torch.arange(0, batch * WIDTH + 1, WIDTH, device=device)
            packing = Packing(positions.flatten(), rows, firsts, [block])
            hidden = self.packed(self.embed(tokens.flatten()), packing)
            return self.choose(hidden).unflatten(0, (batch, WIDTH))

        if device.type != "cuda":
            return tokens, starts, where, body
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                body()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            best = body()
        self.counters["captures"] += 1

        def replay() -> Tensor:
            graph.replay()
            return best

        return tokens, starts, where, replay
