"""The backends by name, where each can run, and the choice among them.

``"auto"`` is triton on GPUs that it runs on, and torch elsewhere; the environment variable ``GOAT_KERNELS_BACKEND``
replaces ``"auto"`` where a call does not name a backend. Triton is imported only where it is to be used.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from goat_kernels.backends.torch_backend import TorchPasses
from goat_kernels.passes import Passes

ENVIRONMENT_VARIABLE = "GOAT_KERNELS_BACKEND"

BACKEND_NAMES = ("auto", "triton", "torch")

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run on this machine, or the reason why it cannot."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]
    reasons = [_why_not("triton", device, torch.float32) for device in devices]
    return {"triton": None if None in reasons else reasons[-1], "torch": None}


@functools.cache
def get_backend(name: str) -> Passes:
    """The passes of the backend called ``name``; the name comes from :func:`resolve_backend`."""
    if name == "torch":
        return TorchPasses()
    from goat_kernels.kernels.passes import TritonPasses

    return TritonPasses()


@functools.cache
def _interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1 before Triton was first imported)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def triton_unavailable() -> str | None:
    """None, or why the triton backend cannot run on this machine."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "PyTorch sees no GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, for checking)"
    return None


def triton_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why the triton backend cannot compute x of ``dtype`` on ``device``."""
    if dtype not in _TRITON_DTYPES:
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


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why the backend called ``name`` cannot compute x of ``dtype`` on ``device``; torch always can."""
    return (triton_unavailable() or triton_unsupported(device, dtype)) if name == "triton" else None


def why_not_auto(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why ``auto`` passes over the backend called ``name``."""
    reason = _why_not(name, device, dtype)
    if reason is None and name == "triton" and (device.type != "cuda" or _interpreted()):
        return f"it is not meant for {device.type!r}: ask for it by name"
    return reason


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that computes x of ``dtype`` on ``device``.

    ``name`` is a backend, or ``"auto"``, which GOAT_KERNELS_BACKEND may replace.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend asked for cannot run here, and why.
    """
    asked = name if name != "auto" else os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    argument = "backend" if name != "auto" else ENVIRONMENT_VARIABLE
    key = (device, dtype, asked)
    if torch.compiler.is_compiling():  # a tracer guards on what it reads: filling the cache would recompile the graph
        return _resolve(*key, argument=argument)
    if key not in _RESOLVED:
        _RESOLVED[key] = _resolve(*key, argument=argument)
    return _RESOLVED[key]


#: Choices made so far; a layer asks at every call.
_RESOLVED: dict[tuple[torch.device, torch.dtype, str], str] = {}


@torch.compiler.assume_constant_result  # device queries, which Dynamo cannot trace
def _resolve(device: torch.device, dtype: torch.dtype, asked: str, argument: str) -> str:
    if asked not in BACKEND_NAMES:
        raise ValueError(f"{argument}={asked!r} is unknown; it must be one of {', '.join(BACKEND_NAMES)}")
    if asked == "auto":
        return "torch" if why_not_auto("triton", device, dtype) else "triton"
    reason = _why_not(asked, device, dtype)
    if reason is not None:
        raise RuntimeError(f"{argument}={asked!r} cannot run: {reason}")
    return asked
