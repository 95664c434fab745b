"""What a step keeps, needs and launches: bytes saved for backward, the allocator's peak, launches of our kernels.

All are exact and repeat. On a CPU the peak is counted from the profiler's record of every allocation, because
resident memory depends on what the process did before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], not_counted: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that ``forward`` saves for backward, but for those of ``not_counted``."""
    skipped = {tensor.untyped_storage().data_ptr() for tensor in not_counted}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())  # alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(size for _, size in kept.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """By how many bytes memory that torch allocated rose, at its peak, while ``run()`` ran."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on standard error: torch's profiler announces itself there, from C++."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def triton_launches(call: Callable[[], object]) -> int:
    """Launches of our Triton kernels that ``call()`` makes; it runs once."""
    from goat_kernels.kernels.launch import Launch, observed  # imports Triton

    names = []

    def count(launch: Launch) -> None:
        names.append(launch.name)
        launch.run()

    with observed(count):
        call()
    return len(names)
