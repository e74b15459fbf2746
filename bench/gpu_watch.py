"""What a GPU and the host did while something ran: waits, busy time, memory.

On a CPU there is nothing to wait for: counts and shares are None there.
"""

import time
import warnings
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def count_waits(call: Callable[[], object], device: torch.device) -> int | None:
    """How often the host waits for the device in a call.

    Counted by CUDA's caching allocator and copies as PyTorch makes them: tensors read on the host
    and copies from or to memory that is not pinned. Explicit synchronisation is not counted.
    """
    if device.type != "cuda":
        call()
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in caught)


def busy_share(call: Callable[[], object], device: torch.device) -> float | None:
    """Share of a call's time in which at least one kernel or copy ran on the device."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    on_device = torch.autograd.DeviceType.CUDA
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == on_device
    ]
    return 1e-6 * covered(spans) / seconds


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that tensors take on the device during a call, what was there included."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device)
