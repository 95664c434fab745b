"""How many kernels one call launches: of ours, and of everybody's on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from goat_kernels.benchmarking.failures import in_words


def triton_launches(call: Callable[[], object]) -> int:
    """Launches of ours that ``call()`` makes; it runs once."""
    from goat_kernels.kernels.launch import Launch, observed  # imports Triton

    names = []

    def count(launch: Launch) -> None:
        names.append(launch.name)
        launch.run()

    with observed(count):
        call()
    return len(names)


def kernel_launches(call: Callable[[], object]) -> int:
    """Kernels that ``call()`` runs on the current GPU, whoever launches them, less copies and fills; it runs once.

    Raises:
        RuntimeError: the profiler has seen nothing on the GPU; it may need a permission.
    """
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.profiler.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA]
    if not on_gpu:
        raise RuntimeError("the profiler has seen nothing on the GPU")
    return sum(not event.name().startswith(("Memcpy", "Memset")) for event in on_gpu)


def launches_row(call: Callable[[], object], backend: str | None, device: torch.device) -> dict:
    """The fields of a result, as far as they can be counted here; ``backend`` is ours that ``call`` uses, or None."""
    row = {"triton_launches": triton_launches(call)} if backend == "triton" else {}
    if device.type == "cuda":
        try:
            row["kernel_launches"] = kernel_launches(call)
        except Exception as failure:  # the time is worth more than the count
            row["kernel_launches_unknown"] = in_words(failure)
    return row
