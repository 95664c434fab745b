"""Fused, exact and deterministic GOAT (Great LoRA Mixture-of-Experts) layers for PyTorch, PEFT and transformers.

    goat_linear      the layer as a function
    GoatLinear       a drop-in nn.Linear
    GoatConfig       for peft.get_peft_model (imports PEFT when first used)
    goat_reference   the plain implementation that the fast ones are tested against

Importing this package needs PyTorch alone: no GPU, Triton, transformers or PEFT. To load a saved GOAT adapter with
PEFT, import ``goat_kernels.peft`` first, which registers the method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from goat_kernels.backends import available_backends
from goat_kernels.functional import GoatOutput, goat_linear
from goat_kernels.linear import GoatLinear
from goat_kernels.reference import ReferenceOutput, goat_reference
from goat_kernels.settings import AdapterSettings

if TYPE_CHECKING:
    from goat_kernels.peft import GoatConfig

__version__ = "0.1.0"

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


def __getattr__(name: str):
    if name == "GoatConfig":
        from goat_kernels.peft import GoatConfig

        return GoatConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
