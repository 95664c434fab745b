"""Compiling what is going to be launched, on all processors at once: one kernel after the other would take minutes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
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
        tiles: (kernel, tile) to compile with, each in turn, in place of the tiles that would be taken. Errors are
            left to the launches: a tile that does not fit raises again there.
    """
    import triton

    from goat_kernels.kernels.passes import TritonPasses

    with (
        forced_target(current_target(device)),
        ThreadPoolExecutor() as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        observed(_compile),
    ):
        for problem in problems:
            if tiles is None:
                run_passes(TritonPasses(), problem)
            for kernel, tile in tiles or ():
                with forced_tile(kernel, tile), contextlib.suppress(Exception):
                    run_passes(TritonPasses(), problem)


def _compile(launch: Launch) -> None:
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages}
    launch.kernel.warmup(**launch.arguments, **launch.constants, grid=launch.grid, **options)
