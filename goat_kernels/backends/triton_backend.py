"""The Triton backend: where it can run. The passes themselves, which import Triton, are loaded when first used."""

from __future__ import annotations

import functools
import importlib.util

import torch

from goat_kernels.passes import Passes

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1 before Triton was first imported)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


class TritonBackend:
    """Implements :class:`goat_kernels.backends.Backend`."""

    name = "triton"

    def unavailable_reason(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and not _interpreted():
            return "PyTorch sees no GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, for checking)"
        return None

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in _DTYPES:
            return f"it computes float32, float16 and bfloat16, not {dtype}"
        if device.type == "cpu":
            if _interpreted():
                return None
            return "the tensors are on the CPU (TRITON_INTERPRET=1 interprets the kernels there, slowly, for checking)"
        if device.type != "cuda":
            return f"it runs on NVIDIA and AMD GPUs, not on {device.type!r}"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "the GPU is older than NVIDIA's Ampere (compute capability 8.0)"
        return None

    def preferred_on(self, device: torch.device) -> bool:
        return device.type == "cuda" and not _interpreted()

    def passes(self) -> Passes:
        from goat_kernels.kernels.passes import TritonPasses

        return TritonPasses()
