"""What every row of ``goat-kernels check --json`` says besides its numbers: the versions and the layer."""

from __future__ import annotations

import importlib.util
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from goat_kernels.checks.problem import LayerCase


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def versions() -> dict[str, str]:
    import torch

    import goat_kernels

    found = {"goat_kernels": goat_kernels.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if has_triton():
        import triton

        found["triton"] = triton.__version__
    return found


def case_json(case: LayerCase) -> dict:
    sizes = {letter: getattr(case, letter) for letter in "TNMREK"}
    dtypes = {name: str(getattr(case, name)).removeprefix("torch.") for name in ("dtype", "adapter_dtype")}
    return {**sizes, **dtypes, "residual": "path" if case.path else "fold", "dropout": case.dropout_p}
