"""The released language model: a causal LM with low-rank adapters, as a plain one.

There, `model` is a Llama, quantised to four bits by bitsandbytes, in a `PeftModel`. So a
checkpoint's keys read `model.base_model.model.model.layers.0.self_attn.q_proj.` and then
`base_layer.weight`, `lora_A.default.weight` or `lora_B.default.weight`. The vocabulary's last rows
are `<diff>`, `<\\diff>`, `<continuous_token_k>` and `<user_continuous_token_k>`, k from 0.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from contrec_fast.compat.state import Problems, read_source
from contrec_fast.models.backbone import load_language_model
from contrec_fast.ops.checks import FLOATS

PREFIXES = ("model.base_model.model.", "base_model.model.", "model.", "")
OTHER_PARTS = ("diffusion_net.", "item_encoder.", "user_encoder.", "output_decoder.")
ADAPTER = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
QUANTIZED = re.compile(
    r"(.+\.weight)\.((?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.bitsandbytes__\w+)"
)


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
        TypeError, ValueError: not such a file or folder, keys that are missing or unknown, wrong
        shapes or dtypes, in one line that names all such keys. The base is then as it was.
    """
    where, content = read_source(source)
    if isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if isinstance(base, str | Path):
        base = load_language_model(base)
    elif not isinstance(base, PreTrainedModel):
        got = type(base).__name__
        raise TypeError(f"base: expected a folder or a Hugging Face model, got {got}")
    problems = Problems(where, f"the keys of a {type(base).__name__} and its adapters")
    checkpoint = BackboneCheckpoint(content, base, problems)
    problems.finish()
    return checkpoint.load(lora_alpha)


class BackboneCheckpoint:
    """A state dict by the base's names: weights, the parts of quantised ones, and adapters.

    What does not fit is noted, and left for the caller to raise.

    Attributes:
        rows: of the vocabulary, None if the checkpoint does not say.
    """

    def __init__(self, content: Mapping[str, Tensor], base: PreTrainedModel, problems: Problems):
        self.base, self.own, self.problems = base, base.state_dict(), problems
        keys = [str(key) for key in content]
        starts = {
            prefix: sum(
                key.startswith(prefix) and self._owner(key.removeprefix(prefix)) in self.own
                for key in keys
            )
            for prefix in PREFIXES
        }
        self.prefix = max(starts, key=starts.get)
        self.weights, self.rows = {}, None
        self.quantized, self.adapters = defaultdict(dict), defaultdict(dict)
        if not starts[self.prefix]:
            problems.missing.append(f"weights or adapters of a {type(base).__name__}")
            return
        for key, tensor in zip(keys, content.values()):
            name = key.removeprefix(self.prefix)
            if not key.startswith(self.prefix) or self._owner(name) not in self.own:
                if not key.startswith(OTHER_PARTS):
                    problems.unexpected.append(key)
                continue
            if not isinstance(tensor, Tensor):
                problems.wrong.append(f"{key}: expected a tensor, got {type(tensor).__name__}")
                tensor = self.own[self._owner(name)]  # so that it is not missing, too
            if found := ADAPTER.fullmatch(name):
                self.adapters[f"{found[1]}.weight"][found[2]] = tensor
            elif found := QUANTIZED.fullmatch(name.replace(".base_layer.", ".")):
                self.quantized[found[1]][found[2]] = tensor
            else:
                self.weights[self._owner(name)] = tensor
        self._check()

    @staticmethod
    def _owner(name: str) -> str:
        """The base's name of the weight to which this tensor belongs."""
        if found := ADAPTER.fullmatch(name):
            return f"{found[1]}.weight"
        name = name.replace(".base_layer.", ".")
        return found[1] if (found := QUANTIZED.fullmatch(name)) else name

    def _check(self) -> None:
        shared = defaultdict(list)  # names of one and the same tensor
        for name, own in self.own.items():
            shared[own.data_ptr()].append(name)
        if self.weights or self.quantized:
            for names in shared.values():
                self._check_shared(names)
        for name, pair in self.adapters.items():
            self._check_adapter(name, pair, alone=len(shared[self.own[name].data_ptr()]) == 1)
        tables = self.base.get_input_embeddings(), self.base.get_output_embeddings()
        tables = [table.weight.data_ptr() for table in tables if table is not None]
        for name, tensor in self.weights.items():
            key, shape = self.prefix + name, tuple(self.own[name].shape)
            if name in self.quantized:
                try:
                    tensor = self._dequantized(name)
                except ValueError as error:
                    self.problems.wrong.append(f"{key}: {error}")
                    continue
            elif self.own[name].data_ptr() in tables:
                self.rows = self.rows or (len(tensor) if tensor.dim() else 0)
                shape = (self.rows, *shape[1:])
            self.problems.check(key, tensor, shape, FLOATS)

    def _check_shared(self, names: list[str]) -> None:
        given = [self.weights[name] for name in names if name in self.weights]
        if not given:
            self.problems.missing.append(self.prefix + names[0])
        elif any(not torch.equal(given[0], other) for other in given[1:]):
            self.problems.wrong.append(
                f"{self.prefix}{' and '.join(names)}: expected one tensor, which the base shares, "
                "got two"
            )

    def _check_adapter(self, name: str, pair: dict[str, Tensor], alone: bool) -> None:
        layer, own = name.removesuffix(".weight"), self.own[name]
        keys = {part: f"{self.prefix}{layer}.lora_{part}.default.weight" for part in "AB"}
        missing = [keys[part] for part in "AB" if part not in pair]
        self.problems.missing += missing
        if not isinstance(self.base.get_submodule(layer), nn.Linear) or not alone:
            self.problems.wrong.append(
                f"{self.prefix}{layer}: expected no adapter but of linear layers, got one"
            )
        elif not missing and self.problems.check(
            keys["A"], pair["A"], ("rank", own.shape[1]), FLOATS
        ):
            self.problems.check(keys["B"], pair["B"], (own.shape[0], len(pair["A"])), FLOATS)

    @torch.no_grad()
    def load(self, lora_alpha: float) -> PreTrainedModel:
        """Put everything into the base, once nothing is wrong."""
        table = self.base.get_input_embeddings()
        if self.rows not in (None, table.num_embeddings):
            self.base.resize_token_embeddings(self.rows, mean_resizing=False)
        for name, own in self.base.state_dict().items():
            own.copy_(self._merged(name, own, lora_alpha))
        return self.base.eval()

    def _merged(self, name: str, own: Tensor, lora_alpha: float) -> Tensor:
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
                "expected a weight of four bits as bitsandbytes stores it, got "
                f"{type(error).__name__}: {error}"
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
