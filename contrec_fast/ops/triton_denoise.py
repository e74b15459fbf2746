"""`denoise` by the Triton kernels of `contrec_kernels`, which are imported at the first call."""

from torch import Tensor

from contrec_fast.ops import denoise_gradients, triton_sampling
from contrec_fast.ops.dispatch import implements

SOURCES = (
    "contrec_kernels.denoise",
    "contrec_kernels.denoise_kernels",
    "contrec_kernels.sampling",
    "contrec_kernels.sampling_steps",
    "contrec_fast.ops.denoise_gradients",
    "contrec_fast.ops.denoise_steps",
    "contrec_fast.ops.triton_denoise",
)


def _obstacle(x: Tensor, *rest) -> str | None:
    return triton_sampling.obstacle(x) or denoise_gradients.obstacle(x, *rest)


def _bucket(x, condition, t, weights, description, guidance, drop) -> str:
    """The architecture with its widths, dtype, the class of the batch, guidance, single steps."""
    most = next((f"<={m}" for m in triton_sampling.MOST_ROWS if len(x) <= m), ">4096")
    dtype = str(x.dtype).removeprefix("torch.")
    kind = f"{'guided' if guidance and condition is not None else 'plain'}"
    return f"{description} {dtype} rows{most} {kind} t{'[1]' if len(t) == 1 else '[B]'}"


@implements("denoise", "triton", _obstacle, _bucket, SOURCES)
def _denoise(x: Tensor, *arguments) -> Tensor:
    from contrec_kernels.denoise import TritonSteps

    return denoise_gradients.denoise_recomputed(TritonSteps(), x, *arguments)
