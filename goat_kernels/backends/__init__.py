"""The backends by name, and the choice among them.

A backend is one object that implements :class:`goat_kernels.backends.base.Passes`; adding one is adding an entry to
``_BACKENDS``. ``"auto"`` takes the first entry that supports the tensors' device; the environment variable
``GOAT_KERNELS_BACKEND`` stands in for ``"auto"`` where a call does not name a backend.
"""

from __future__ import annotations

import os

import torch

from goat_kernels.backends.base import Passes
from goat_kernels.backends.torch_backend import TorchPasses

ENVIRONMENT_VARIABLE = "GOAT_KERNELS_BACKEND"

#: In the order in which ``auto`` tries them.
_BACKENDS: dict[str, Passes] = {"torch": TorchPasses()}

#: Names that are part of the interface but not in this version, with the reason given to who asks.
_NOT_YET: dict[str, str] = {"triton": "this version of goat_kernels has no Triton kernels yet; use backend='torch'"}

BACKEND_NAMES: tuple[str, ...] = ("auto", *_NOT_YET, *_BACKENDS)


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run on this machine, or the reason why it cannot."""
    return {**_NOT_YET, **{name: backend.unavailable_reason() for name, backend in _BACKENDS.items()}}


def get_backend(name: str) -> Passes:
    """The backend called ``name``; the name comes from :func:`resolve_backend`."""
    return _BACKENDS[name]


def resolve_backend(name: str, device: torch.device) -> str:
    """The name of the backend that computes on ``device``.

    Args:
        name: a backend, or ``"auto"``, for which GOAT_KERNELS_BACKEND may stand in.
        device: where the tensors are.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend asked for cannot run here, and why.
    """
    asked = name if name != "auto" else os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    argument = "backend" if name != "auto" else ENVIRONMENT_VARIABLE
    key = (device.type, asked)
    if torch.compiler.is_compiling():  # a tracer guards on what it reads: filling the cache would recompile the graph
        return _resolve(*key, argument=argument)
    if key not in _RESOLVED:
        _RESOLVED[key] = _resolve(*key, argument=argument)
    return _RESOLVED[key]


#: Choices made so far; a layer asks at every call.
_RESOLVED: dict[tuple[str, str], str] = {}


def _resolve(device_type: str, asked: str, argument: str) -> str:
    device = torch.device(device_type)
    if asked == "auto":
        for name, backend in _BACKENDS.items():
            if backend.unavailable_reason() is None and backend.supports(device) is None:
                return name
        raise RuntimeError(f"no backend supports device {device_type!r}; available: {available_backends()}")
    if asked not in BACKEND_NAMES:
        raise ValueError(f"{argument}={asked!r} is unknown; it must be one of {', '.join(BACKEND_NAMES)}")
    reason = _NOT_YET.get(asked)
    if reason is None:
        backend = _BACKENDS[asked]
        reason = backend.unavailable_reason() or backend.supports(device)
    if reason is not None:
        raise RuntimeError(f"{argument}={asked!r} cannot run: {reason}")
    return asked
