"""Compiling what is going to be launched, on all processors at once: one kernel after the other would take minutes."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from goat_kernels.kernels.configs import current_target, forced_target
from goat_kernels.kernels.launch import Launch, observed


@contextlib.contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Launches inside the block are compiled for ``device`` and not made; their tensors may be without values.

    What does not compile raises when it is launched.
    """
    with (
        forced_target(current_target(device)),
        ThreadPoolExecutor() as pool,
        compiled_together(pool),
        observed(_compile),
    ):
        yield


@contextlib.contextmanager
def compiled_together(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Triton's own way to compile on several processors, whatever its version calls the options.

    Errors are left to the launches; a Triton without this way compiles one kernel after the other.
    """
    import triton

    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:
        yield
        return
    ignoring = {"ignore_errors": True} if "ignore_errors" in inspect.signature(mode).parameters else {}
    block = mode(pool, **ignoring)
    block.__enter__()
    try:
        yield
    finally:
        try:
            block.__exit__(None, None, None)  # waits for what is being compiled
        except Exception as failure:
            warnings.warn(f"compiling ahead raised {type(failure).__name__}: {failure}", stacklevel=3)


def _compile(launch: Launch) -> None:
    launch.kernel.warmup(
        **launch.arguments,
        **launch.constants,
        grid=launch.grid,
        num_warps=launch.tile.warps,
        num_stages=launch.tile.stages,
    )
