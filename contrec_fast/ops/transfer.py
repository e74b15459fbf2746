"""From the host to the device without waiting for it."""

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device | str | None) -> Tensor:
    """A tensor on a device (by default where it is). A GPU copies one of the host when it comes to
    it: the host goes on at once, and may free or change x, as what is copied is a pinned copy."""
    if x.is_cpu and device is not None and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
