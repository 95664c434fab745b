"""Compiling what is going to be launched, on all processors at once: one kernel after the other would take minutes."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from goat_kernels.checks.problem import Problem, run_passes
from goat_kernels.kernels.configs import current_target, forced_target, forced_tile
from goat_kernels.kernels.launch import Launch, observed
from goat_kernels.kernels.tiles import Tile


def compile_ahead(
    problems: Iterable[Problem], device: torch.device, tiles: Iterable[tuple[str, Tile]] | None = None
) -> None:
    """Compile every launch of a forward and backward of ``problems`` for ``device``; none is made.

    Args:
        problems: on "meta": their tensors need no values.
        device: a GPU.
        tiles: (kernel, tile) to compile with, each in turn, in place of the tiles that would be taken. What a tile
            does not fit is met again where it is launched, as is whatever else does not compile.
    """
    from goat_kernels.kernels.passes import TritonPasses

    with (
        forced_target(current_target(device)),
        ThreadPoolExecutor() as pool,
        compiled_together(pool),
        observed(_compile),
    ):
        for problem in problems:
            if tiles is None:
                run_passes(TritonPasses(), problem)
            for kernel, tile in tiles or ():
                with forced_tile(kernel, tile), contextlib.suppress(Exception):
                    run_passes(TritonPasses(), problem)


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
