"""The released language model: a causal LM with low-rank adapters, as a plain one.

There, `model` is a Llama, quantised to four bits by bitsandbytes, in a `PeftModel`. So a
checkpoint's keys read `model.base_model.model.model.layers.0.self_attn.q_proj.` and then
`base_layer.weight`, `lora_A.default.weight` or `lora_B.default.weight`. The vocabulary's last rows
are `<diff>`, `<\\diff>`, `<continuous_token_k>` and `<user_continuous_token_k>`, k from 0.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from contrec_fast.compat.state import read_source
from contrec_fast.models.backbone import load_language_model
from contrec_fast.ops.checks import FLOATS, check

PREFIXES = ("model.base_model.model.", "base_model.model.", "model.", "")
OTHER_PARTS = ("diffusion_net.", "item_encoder.", "user_encoder.", "output_decoder.")
ADAPTER = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
QUANTIZED = re.compile(
    r"(.+\.weight)\.((?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.bitsandbytes__\w+)"
)
LISTED = 8  # keys of a kind in an error


def load_released_backbone(
    source: str | Path | Mapping[str, Tensor],
    base: str | Path | PreTrainedModel,
    lora_alpha: float = 32,
) -> PreTrainedModel:
    """Load the language model of a released checkpoint, adapters merged.

    Every adapted layer's weight becomes `W + lora_alpha / rank * B A` (LoRA, arXiv 2106.09685).
    Weights of four bits are dequantised first: beside those, not the original ones, the adapters
    were trained. The vocabulary gets the checkpoint's size.

    Args:
        source: a .pt, .pth, .ckpt or .safetensors file, or what `torch.load` makes of one: a
            Lightning checkpoint (or the state dict in it), of which only `model.` is used; or the
            state dict of a causal LM, with peft's names or without; or adapters alone, beside
            which the base's own weights stand.
        base: folder of the causal LM that was adapted, loaded in float32; or such a model, which
            is changed and returned.
        lora_alpha: the release's; it is not in a checkpoint. Ranks are the adapters' own.

    Returns:
        A plain Hugging Face model in eval mode.

    Raises:
        TypeError, ValueError: not such a file or folder, keys that are missing or unknown, a
        wrong shape or dtype, in one line. The base is then as it was.
    """
    where, content = read_source(source)
    if isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if isinstance(base, str | Path):
        base = load_language_model(base)
    elif not isinstance(base, PreTrainedModel):
        got = type(base).__name__
        raise TypeError(f"base: expected a folder or a Hugging Face model, got {got}")
    checkpoint = _Checkpoint(where, content, base)
    rows = checkpoint.check()
    if rows not in (None, base.get_input_embeddings().num_embeddings):
        base.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for name, own in base.state_dict().items():
            own.copy_(checkpoint.merged(name, own, lora_alpha))
    return base.eval()


class _Checkpoint:
    """A state dict by the base's names: weights, the parts of quantised ones, and adapters."""

    def __init__(self, where: str, content: Mapping[str, Tensor], base: PreTrainedModel):
        self.where, self.base, self.own = where, base, base.state_dict()
        keys = [str(key) for key in content]
        starts = {
            prefix: sum(
                key.startswith(prefix) and self._owner(key.removeprefix(prefix)) in self.own
                for key in keys
            )
            for prefix in PREFIXES
        }
        self.prefix = max(starts, key=starts.get)
        if not starts[self.prefix]:
            kind = type(base).__name__
            raise ValueError(f"{where}: expected weights or adapters of a {kind}, found none")
        self.weights, self.unexpected = {}, []
        self.quantized, self.adapters = defaultdict(dict), defaultdict(dict)
        for key, tensor in zip(keys, content.values()):
            name = key.removeprefix(self.prefix)
            if not key.startswith(self.prefix) or self._owner(name) not in self.own:
                if not key.startswith(OTHER_PARTS):
                    self.unexpected.append(key)
                continue
            if not isinstance(tensor, Tensor):
                got = type(tensor).__name__
                raise TypeError(f"{where}: {key}: expected a tensor, got {got}")
            if found := ADAPTER.fullmatch(name):
                self.adapters[f"{found[1]}.weight"][found[2]] = tensor
            elif found := QUANTIZED.fullmatch(name.replace(".base_layer.", ".")):
                self.quantized[found[1]][found[2]] = tensor
            else:
                self.weights[self._owner(name)] = tensor

    @staticmethod
    def _owner(name: str) -> str:
        """The base's name of the weight to which this tensor belongs."""
        if found := ADAPTER.fullmatch(name):
            return f"{found[1]}.weight"
        name = name.replace(".base_layer.", ".")
        return found[1] if (found := QUANTIZED.fullmatch(name)) else name

    def check(self) -> int | None:
        """Refuse what does not fit; return the number of the vocabulary's rows, if it is given."""
        shared = defaultdict(list)  # names of one and the same tensor
        for name, own in self.own.items():
            shared[own.data_ptr()].append(name)
        self._check_keys(shared.values())
        for name, pair in self.adapters.items():
            layer = name.removesuffix(".weight")
            label, own = f"{self.where}: {self.prefix}{layer}", self.own[name]
            alone = len(shared[own.data_ptr()]) == 1
            if not isinstance(self.base.get_submodule(layer), nn.Linear) or not alone:
                raise ValueError(f"{label}: expected no adapter but of linear layers, got one")
            check(f"{label}.lora_A", pair["A"], ("rank", own.shape[1]), FLOATS)
            check(f"{label}.lora_B", pair["B"], (own.shape[0], len(pair["A"])), FLOATS)
        tables = self.base.get_input_embeddings(), self.base.get_output_embeddings()
        tables = [table.weight.data_ptr() for table in tables if table is not None]
        rows = None
        for name, tensor in self.weights.items():
            key, shape = f"{self.where}: {self.prefix}{name}", tuple(self.own[name].shape)
            if name in self.quantized:
                tensor = self._dequantized(name)
            elif self.own[name].data_ptr() in tables:
                rows = rows or (len(tensor) if tensor.dim() else 0)
                shape = (rows, *shape[1:])
            check(key, tensor, shape, FLOATS)
        return rows

    def _check_keys(self, shared: Iterable[list[str]]) -> None:
        missing = []
        for names in shared if self.weights or self.quantized else ():
            given = [self.weights[name] for name in names if name in self.weights]
            if not given:
                missing.append(self.prefix + names[0])
            elif any(not torch.equal(given[0], other) for other in given[1:]):
                raise ValueError(
                    f"{self.where}: expected one tensor as {' and '.join(names)}, which the base "
                    "shares, got two"
                )
        for name, pair in self.adapters.items():
            layer = self.prefix + name.removesuffix("weight")
            missing += [f"{layer}lora_{part}.default.weight" for part in "AB" if part not in pair]
        if missing or self.unexpected:
            found = [("missing", missing), ("unexpected", self.unexpected)]
            lists = "; ".join(f"{what}: {_listed(keys)}" for what, keys in found if keys)
            kind = type(self.base).__name__
            raise ValueError(
                f"{self.where}: expected the keys of a {kind} and its adapters; {lists}"
            )

    def merged(self, name: str, own: Tensor, lora_alpha: float) -> Tensor:
        """The weight of this name: the checkpoint's or else `own`, and its adapter."""
        weight = self.weights.get(name, own)
        if name in self.quantized:
            weight = self._dequantized(name)
        if name not in self.adapters:
            return weight
        a, b = (self.adapters[name][part].to(own.device) for part in "AB")
        wide = torch.promote_types(torch.promote_types(a.dtype, weight.dtype), torch.float32)
        update = b.to(wide) @ a.to(wide)
        return weight.to(own.device, wide) + lora_alpha / len(a) * update

    def _dequantized(self, name: str) -> Tensor:
        parts = self.quantized[name]
        try:
            return dequantize(self.weights[name], parts)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{self.where}: {self.prefix}{name}: expected a weight of four bits as "
                f"bitsandbytes stores it, got {type(error).__name__}: {error}"
            ) from None


def dequantize(packed: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """A weight of four bits (QLoRA, arXiv 2305.14314) as bitsandbytes computes with it.

    Two codes a byte, the upper half first; each block of codes has a scale, and these may be
    quantised in turn, to eight bits about an offset. Products are rounded once, to the dtype that
    the weight had.

    Args:
        packed: uint8, any shape. parts: `absmax`, `quant_map`, `quant_state.bitsandbytes__nf4`
            (JSON as bytes) and, where scales are quantised, `nested_absmax`, `nested_quant_map`.
    """
    (state,) = (part for name, part in parts.items() if name.startswith("quant_state."))
    state = json.loads(bytes(state.tolist()))
    scales = parts["absmax"]
    if "nested_absmax" in parts:
        outer = parts["nested_absmax"].repeat_interleave(state["nested_blocksize"])
        scales = parts["nested_quant_map"][scales.long()] * outer[: len(scales)]
        scales = scales + state["nested_offset"]
    packed = packed.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()
    values = parts["quant_map"][codes] * scales.repeat_interleave(state["blocksize"])[: len(codes)]
    dtype = getattr(torch, state["dtype"])
    return values.to(dtype)[: torch.Size(state["shape"]).numel()].reshape(state["shape"])


def _listed(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(keys[:LISTED]) + more
