"""Telling PEFT of GOAT without importing it: ``import goat_kernels`` is enough to load an adapter, in either order."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder


class _PeftFinder(MetaPathFinder):
    """Finds ``peft`` as the other finders do, and registers GOAT once it has been imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _register()

        spec.loader.exec_module = exec_module
        return spec


def _register() -> None:
    try:
        importlib.import_module("goat_kernels.peft")
    except Exception as error:  # whatever is wrong with GOAT's half, PEFT itself can be imported
        warnings.warn(
            f"GOAT could not be registered with PEFT ({type(error).__name__}: {error}); GOAT adapters cannot be loaded",
            stacklevel=2,
        )


def register_with_peft() -> None:
    """Register GOAT now where PEFT has been imported, otherwise as soon as it is."""
    if sys.modules.get("peft") is not None:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())
