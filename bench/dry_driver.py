"""A driver that launches nothing: the path of a launch on a machine without a GPU, up to the call into the driver.

Kernels are compiled for sm_90 as they would be there. Tensors are CPU tensors that nothing reads or writes. So what a
call costs the host can be timed where there is no GPU, and a test can watch what launches would hand to one.

Triton decides once, while kernels are defined, whether it interprets them: :func:`install` comes first in a process.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

#: The GPU that is imitated, as ``goat_kernels.kernels.configs`` names it.
TARGET = "sm_90"


class DryLauncher:
    """In place of the compiled function through which Triton launches a kernel."""

    def __init__(self, source, metadata) -> None:
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments) -> None:
        """The grid is x, y, z; ``arguments`` are the kernel's at run time, a pointer as a tensor or an address."""


def _dry_driver():
    """As much of Triton's driver, and of what that says of a device, as a launch asks for."""
    from triton.backends.compiler import GPUTarget

    utils = SimpleNamespace(
        # module, function, registers, spills, most threads
        load_binary=lambda name, binary, shared, device: (1, 1, 32, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )
    return SimpleNamespace(
        launcher_cls=DryLauncher,
        utils=utils,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", int(TARGET.removeprefix("sm_")), 32),
    )


def install() -> None:
    """For the rest of this process, kernels are compiled and not launched, and the Triton backend takes CPU tensors.

    Raises:
        RuntimeError: kernels have been defined in this process, perhaps for the interpreter.
    """
    if "goat_kernels.kernels.launch" in sys.modules:
        raise RuntimeError("the dry driver has to be installed before the kernels are imported")
    os.environ["TRITON_INTERPRET"] = "0"
    from triton.runtime import driver

    driver.set_active(_dry_driver())
    from goat_kernels import backends

    backends.triton_unavailable = lambda: None
    backends.triton_unsupported = lambda device, dtype: None
