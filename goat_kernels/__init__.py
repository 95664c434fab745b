"""Fused, exact and deterministic GOAT (Great LoRA Mixture-of-Experts) layers for PyTorch, PEFT and transformers.

    goat_linear      the layer as a function
    GoatLinear       a drop-in nn.Linear
    GoatConfig       for peft.get_peft_model (imports PEFT when first used)
    goat_reference   the plain implementation that the fast ones are tested against

Importing this package needs PyTorch alone: no GPU, Triton, transformers or PEFT. It also makes GOAT known to PEFT,
before or after PEFT is imported, so that ``peft.PeftModel.from_pretrained`` loads a saved adapter.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from goat_kernels.registration import register_with_peft

if TYPE_CHECKING:
    from goat_kernels.backends import available_backends
    from goat_kernels.functional import GoatOutput, goat_linear
    from goat_kernels.linear import GoatLinear
    from goat_kernels.peft import GoatConfig
    from goat_kernels.reference import ReferenceOutput, goat_reference
    from goat_kernels.settings import AdapterSettings

__version__ = "0.2.0"

#: Public name -> the module it is in, imported when the name is first used: `goat-kernels --help` answers at once, and
#: PEFT is imported only where GoatConfig is.
_PUBLIC = {
    "AdapterSettings": "settings",
    "GoatConfig": "peft",
    "GoatLinear": "linear",
    "GoatOutput": "functional",
    "ReferenceOutput": "reference",
    "available_backends": "backends",
    "goat_linear": "functional",
    "goat_reference": "reference",
}

__all__ = [
    "AdapterSettings",
    "GoatConfig",
    "GoatLinear",
    "GoatOutput",
    "ReferenceOutput",
    "available_backends",
    "goat_linear",
    "goat_reference",
]


if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists

    def __getattr__(name: str):
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"goat_kernels.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register_with_peft()
