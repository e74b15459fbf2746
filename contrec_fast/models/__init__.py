"""The model in plain PyTorch: the specification that every fast version is compared with."""

from contrec_fast.models.denoisers import (
    DENOISERS,
    AdaLNDenoiser,
    Denoiser,
    LinearDenoiser,
    MLPDenoiser,
)

__all__ = ["DENOISERS", "AdaLNDenoiser", "Denoiser", "LinearDenoiser", "MLPDenoiser"]
