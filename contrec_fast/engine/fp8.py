"""Linear layers in 8 bits: weights of float8 e4m3 with a scale for each output, inputs quantised
as they come with a scale for each token (row-wise scaling; format: arXiv 2209.05433).

On a GPU of compute capability 8.9 or more by `torch._scaled_mm`; on a CPU by products of the
dequantised numbers, which is slow and shows what the rounding does.
"""

import torch
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
MULTIPLE = 16  # of both widths of a layer, as the GPU's kernels want them


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] of any float dtype to float8 of the same shape, and its scales [..., 1] float32.

    `x = float8 * scale` but for rounding: by at most 2^-4 of each element, or 2^-10 of the scale.
    """
    scale = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=torch.float32) / LARGEST
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # of a row of zeros
    return (x / scale).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """`nn.Linear` with quantised weight and inputs; results have the dtype of the inputs.

    Layers that get the same tensor one after another (queries, keys and values do) share what
    it was quantised to.

    Args:
        linear: of widths that are multiples of 16. inputs: what the layers share, a list of one.
    """

    def __init__(self, linear: nn.Linear, inputs: list[tuple]):
        super().__init__()
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())  # [1, N]
        self.bias, self._inputs = linear.bias, inputs

    def forward(self, x: Tensor) -> Tensor:
        if self._inputs[0][0] is not x:
            self._inputs[0] = x, *quantize(x.reshape(-1, x.shape[-1]))
        _, rows, scale = self._inputs[0]
        if x.is_cuda:
            y = torch._scaled_mm(
                rows, self.weight.T, scale, self.scale, out_dtype=torch.bfloat16,
                use_fast_accum=True,
            ).to(x.dtype)  # fmt: skip
        else:
            y = ((rows.float() @ self.weight.float().T) * scale * self.scale).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, x.shape[:-1])


def quantize_layers(backbone) -> None:
    """Change a causal LM in place: the linear layers behind its embeddings to fp8.

    The head that makes logits stays as it is, as do layers of odd widths.

    Raises:
        ValueError: on a GPU that cannot multiply float8, in one line.
    """
    device = backbone.get_input_embeddings().weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"dtype: fp8 expected a GPU of compute capability 8.9 or more, got {major}.{minor}"
        )
    inputs = [(None, None, None)]
    for module in list(backbone.base_model.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear and not any(n % MULTIPLE for n in layer.weight.shape):
                setattr(module, name, Float8Linear(layer, inputs))
