"""What autocast asks of a layer, in one place."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would compute a linear layer on x in; None where it is off or leaves x alone.

    Autocast casts floating-point tensors other than float64, on devices that have it (the meta device has not).
    """
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    if x.dtype == torch.float64 or not x.is_floating_point():
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_disabled(device_type: str) -> contextlib.AbstractContextManager:
    """A context without autocast, free where it is off anyway."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
