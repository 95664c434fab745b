"""The backends by name, and the choice among them.

A backend is one object that implements :class:`Backend`; adding one is adding an entry to
``_BACKENDS``. ``"auto"`` takes the first entry that supports the tensors and is meant for their device; the environment
variable ``GOAT_KERNELS_BACKEND`` replaces ``"auto"`` where a call does not name a backend.
"""

from __future__ import annotations

import functools
import os
from typing import Protocol

import torch

from goat_kernels.backends.torch_backend import TorchBackend
from goat_kernels.backends.triton_backend import TritonBackend
from goat_kernels.passes import Passes

ENVIRONMENT_VARIABLE = "GOAT_KERNELS_BACKEND"


class Backend(Protocol):
    """Where a set of passes can run; asked before the passes are loaded."""

    name: str

    def unavailable_reason(self) -> str | None:
        """None, or why this backend cannot run on this machine."""

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None, or why x of ``dtype`` on ``device`` cannot be computed."""

    def preferred_on(self, device: torch.device) -> bool:
        """Whether ``auto`` may pick this backend for ``device``."""

    def passes(self) -> Passes:
        """The passes."""


#: In the order in which ``auto`` tries them.
_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TritonBackend(), TorchBackend())}

BACKEND_NAMES: tuple[str, ...] = ("auto", *_BACKENDS)


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run on this machine, or the reason why it cannot."""
    return {name: backend.unavailable_reason() or _why_on_no_device(backend) for name, backend in _BACKENDS.items()}


def _why_on_no_device(backend: Backend) -> str | None:
    """None, or why no device of this machine is supported."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]
    reasons = [backend.unsupported_reason(device, torch.float32) for device in devices]
    return None if None in reasons else reasons[-1]


@functools.cache
def get_backend(name: str) -> Passes:
    """The passes of the backend called ``name``; the name comes from :func:`resolve_backend`."""
    return _BACKENDS[name].passes()


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that computes x of ``dtype`` on ``device``.

    Args:
        name: a backend, or ``"auto"``, which GOAT_KERNELS_BACKEND may replace.
        device: where the tensors are.
        dtype: the compute dtype, x's.

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
    if asked == "auto":
        reasons = {name: why_not_auto(name, device, dtype) for name in _BACKENDS}
        for name, reason in reasons.items():
            if reason is None:
                return name
        raise RuntimeError(f"no backend computes {dtype} on {device.type!r}: {reasons}")
    if asked not in _BACKENDS:
        raise ValueError(f"{argument}={asked!r} is unknown; it must be one of {', '.join(BACKEND_NAMES)}")
    backend = _BACKENDS[asked]
    reason = backend.unavailable_reason() or backend.unsupported_reason(device, dtype)
    if reason is not None:
        raise RuntimeError(f"{argument}={asked!r} cannot run: {reason}")
    return asked


def why_not_auto(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why ``auto`` passes over the backend called ``name``."""
    backend = _BACKENDS[name]
    reason = backend.unavailable_reason() or backend.unsupported_reason(device, dtype)
    if reason is None and not backend.preferred_on(device):
        return f"it is not meant for {device.type!r}: ask for it by name"
    return reason
