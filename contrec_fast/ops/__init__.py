"""The hot operations: one public function each, with a plain-PyTorch reference.

Eager calls go straight to the chosen backend; compiled code goes through the operators
registered under `torch.ops.contrec`.
"""

from contrec_fast.ops import denoise_cpp, noise, triton_denoise  # noqa: F401, two are backends
from contrec_fast.ops.catalog import Catalog, SeenLists
from contrec_fast.ops.cross_entropy import catalog_cross_entropy
from contrec_fast.ops.denoise import denoise
from contrec_fast.ops.dispatch import backends, last_backend
from contrec_fast.ops.gather import FactoredTable, gather_tokens
from contrec_fast.ops.sampling import SamplingPlan, plan_sampling
from contrec_fast.ops.topk import cosine_topk
from contrec_fast.ops.triton_topk import stream_topk

__all__ = [
    "Catalog",
    "FactoredTable",
    "SamplingPlan",
    "SeenLists",
    "backends",
    "catalog_cross_entropy",
    "cosine_topk",
    "denoise",
    "gather_tokens",
    "last_backend",
    "noise",
    "plan_sampling",
    "stream_topk",
]
