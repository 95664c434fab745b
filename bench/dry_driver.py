"""A driver that launches nothing: the path of a launch on a machine without a GPU, up to the call into the driver.

Kernels are compiled for sm_90 as they would be there; a launch notes what it would have handed to the GPU. Tensors are
CPU tensors that nothing reads or writes. So what a replayed launch hands over can be compared with what the first one
did, and what a call costs the host can be timed where there is no GPU.

Triton decides once, while kernels are defined, whether it interprets them: :func:`install` comes first in a process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

#: The GPU that is imitated, as ``goat_kernels.kernels.configs`` names it.
TARGET = "sm_90"


class Noted(NamedTuple):
    """One launch: the kernel's name, its grid, its run-time arguments; a pointer is a tensor or an address."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


_notes: list[Noted] | None = None


@contextmanager
def noted() -> Iterator[list[Noted]]:
    """The launches of the block, in order; outside of one they leave no trace."""
    global _notes
    previous, _notes = _notes, []
    try:
        yield _notes
    finally:
        _notes = previous


class _DryLauncher:
    """In place of the compiled function through which Triton launches a kernel."""

    def __init__(self, source, metadata) -> None:
        self._name = metadata.name

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments) -> None:
        if _notes is not None:
            _notes.append(Noted(self._name, (x, y, z), arguments))


class _DryUtils:
    """What Triton asks of a device."""

    @staticmethod
    def load_binary(name, binary, shared, device):
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads

    @staticmethod
    def unload_module(module) -> None: ...

    @staticmethod
    def get_device_properties(device):
        return {"max_shared_mem": 232448}


class _DryDriver:
    """As much of Triton's driver as a launch asks for."""

    launcher_cls = _DryLauncher
    utils = _DryUtils

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(TARGET.removeprefix("sm_")), 32)


def install() -> None:
    """For the rest of this process, kernels are compiled and not launched, and the Triton backend takes CPU tensors.

    Raises:
        RuntimeError: kernels have been defined in this process, perhaps for the interpreter.
    """
    if "goat_kernels.kernels.launch" in sys.modules:
        raise RuntimeError("the dry driver has to be installed before the kernels are imported")
    os.environ["TRITON_INTERPRET"] = "0"
    from triton.runtime import driver

    driver.set_active(_DryDriver())
    from goat_kernels import backends

    backends.triton_unavailable = lambda: None
    backends.triton_unsupported = lambda device, dtype: None
