"""Decoder layers of the Llama kind on packed tokens, with little but their matrix products.

Llama, Mistral, Qwen2, Qwen3 and their like are, between the products, norms, rotations, attention
and a gate; as PyTorch's own operations, these take longer than the products of a small model. Here
they are one pass each (`native_layers`), keys and values go where they are stored, and what the
wide products give stays in the cache of the processor.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from contrec_fast import native, native_layers

WIDE = 2**17  # floats of what is between two products of a feed-forward part, at a time
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "act_fn"}
NORMS = {"input_layernorm", "post_attention_layernorm"}
SILU = type(ACT2FN["silu"]), type(ACT2FN["swish"])


class Layers:
    """The layers of a language model, which keeps its weights; nothing is copied.

    Use `of`. Whether the model does what its parts look like, only a comparison tells.
    """

    def __init__(self, base, stack: nn.ModuleList):
        self.stack, self.rotary, self.last_norm = stack, base.rotary_emb, base.norm

    @classmethod
    def of(cls, base) -> "Layers | str":
        """The layers of a transformers model without its head, or in a few words why not."""
        if native.why_missing():
            return "the C++ extension is not there"
        for weight in base.parameters():
            if not native.serves(weight) or weight.dtype != torch.float32:
                return f"{weight.dtype} on {weight.device.type}, not float32 on cpu"
        stack, other = getattr(base, "layers", None), "layers of another kind than Llama's"
        if not isinstance(stack, nn.ModuleList):
            return other
        if {name for name, _ in base.named_children()} != {
            "embed_tokens", "layers", "norm", "rotary_emb"
        }:  # fmt: skip
            return other
        if not _is_norm(base.norm) or not all(map(_suits, stack)):
            return other
        return cls(base, stack)

    @torch.autocast("cpu", enabled=False)  # the kernels take what they get for float32
    def __call__(self, embedded: Tensor, cache, packing, keep: Tensor | None, kept) -> Tensor:
        """Last hidden states [T, H] of embedded tokens [T, H], or [T', H] of those to keep.

        Args: as `PackedModel` takes them. cache: RowCache, which then holds keys and values.

        Raises:
            IndexError: rows or positions beyond the cache.
        """
        x, added = embedded.clone(memory_format=torch.contiguous_format), None
        reach, rows = int(packing.positions.max()) + 1, int(packing.rows.max()) + 1
        if reach > cache.places or rows > cache.rows:
            got = f"{rows} x {reach}"
            raise IndexError(f"packing: expected at most {cache.rows} x {cache.places}, got {got}")
        turns = self.rotary(x[None], torch.arange(reach)[None])
        turns = [part[0].contiguous() for part in turns]
        width, turned = self.stack[0].self_attn.head_dim, turns[0].shape[1]
        if turned != width:
            raise ValueError(f"rotary: expected all {width} of a head's places, got {turned}")
        for layer, held in zip(self.stack, cache.layers):
            attention = layer.self_attn
            normed = _norm(x, added, layer.input_layernorm)
            keys, values = attention.k_proj(normed), attention.v_proj(normed)
            if not held.is_initialized:
                shape = (1, len(x), -1, attention.head_dim)
                held.lazy_initialization(*(y.view(shape).transpose(1, 2) for y in (keys, values)))
            stored = held.keys, held.values
            norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
            eps = norms[0].variance_epsilon if norms[0] is not None else 0.0
            norms = [norm if norm is None else norm.weight for norm in norms]
            if layer is self.stack[-1] and keep is not None:
                native_layers.layer_rotary(
                    None, keys, values, norms, eps, turns, packing.positions, packing.rows, stored
                )
                x, normed, packing, keys, values = x[keep], normed[keep], kept, None, None
            queries = attention.q_proj(normed)
            where = packing.positions, packing.rows
            native_layers.layer_rotary(queries, keys, values, norms, eps, turns, *where, stored)
            mixed = native_layers.layer_attention(
                queries, stored, *where, packing.starts, attention.scaling
            )
            normed = _norm(x, attention.o_proj(mixed), layer.post_attention_layernorm)
            added = _feed_forward(layer.mlp, normed)
        return _norm(x, added, self.last_norm)


def _norm(x: Tensor, added: Tensor | None, module) -> Tensor:
    return native_layers.layer_norm(
        x, added, module.weight, module.variance_epsilon, torch.empty_like(x)
    )


def _feed_forward(mlp, x: Tensor) -> Tensor:
    rows = max(WIDE // mlp.gate_proj.out_features, 64)
    out = torch.empty_like(x)
    for part, to in zip(x.split(rows), out.split(rows)):
        wide = native_layers.layer_gate(mlp.gate_proj(part), mlp.up_proj(part))
        if mlp.down_proj.bias is None:
            torch.mm(wide, mlp.down_proj.weight.T, out=to)
        else:
            torch.addmm(mlp.down_proj.bias, wide, mlp.down_proj.weight.T, out=to)
    return out


def _suits(layer) -> bool:
    """Whether a layer has the parts of Llama's, and no others."""
    children = dict(layer.named_children())
    if children.keys() != NORMS | {"self_attn", "mlp"}:
        return False
    attention, feed_forward = (
        dict(children[name].named_children()) for name in ("self_attn", "mlp")
    )
    norms, width = attention.keys() - ATTENTION, getattr(children["self_attn"], "head_dim", 0)
    wide = [getattr(attention.get(f"{name}_proj"), "out_features", 1) for name in ("k", "v", "q")]
    if not width or wide[0] != wide[1] or wide[0] % width or wide[2] % wide[0]:
        return False
    return (
        norms in (set(), {"q_norm", "k_norm"})
        and feed_forward.keys() == FEED_FORWARD
        and isinstance(feed_forward["act_fn"], SILU)
        and all(type(attention[name]) is nn.Linear for name in ATTENTION)
        and all(type(feed_forward[name]) is nn.Linear for name in FEED_FORWARD - {"act_fn"})
        and all(_is_norm(children[name]) for name in NORMS)
        and all(_is_norm(attention[name]) for name in norms)
        and all(len(attention[name].weight) == width for name in norms)
    )


def _is_norm(module) -> bool:
    return hasattr(module, "variance_epsilon") and getattr(module, "weight", None) is not None
