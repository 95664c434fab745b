"""Compile what a suite will launch on a GPU, on all processors at once: one after the other would take minutes.

``goat-kernels check`` does the same for its own layers, whose scaling is one number with "fold" and one per expert
with "path"; here layers have one number in either form, and both kernels are compiled.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from goat_kernels.backends import why_not_auto
from goat_kernels.benchmarking.cases import Case
from goat_kernels.benchmarking.failures import in_words
from goat_kernels.benchmarking.settings import BenchSettings
from goat_kernels.checks.problem import Problem, make_problem, run_passes
from goat_kernels.kernels.configs import current_target, forced_target
from goat_kernels.kernels.launch import Launch, observed


def compile_ahead(cases: Iterable[Case], settings: BenchSettings) -> None:
    """Compile every launch of a forward and backward of ``cases``; what does not compile raises when it is launched.

    The passes run on tensors without values, and their launches are compiled in place of being made.
    """
    device = settings.device
    if device.type != "cuda" or why_not_auto("triton", device, settings.dtype) is not None:
        return
    from goat_kernels.backends.triton_backend.passes import TritonPasses

    with compiling(device):
        for problem in _problems(cases, settings.dtype):
            run_passes(TritonPasses(), problem)


@contextlib.contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Launches inside the block are compiled for ``device`` and not made; their tensors may be without values."""
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
            warnings.warn(f"compiling ahead: {in_words(failure)}", stacklevel=3)


def _problems(cases: Iterable[Case], dtype: torch.dtype) -> Iterator[Problem]:
    for case in cases:
        for form in case.forms:
            problem = make_problem(case.layer(dtype, form), "meta")
            yield problem
            if problem.adapter.scaling_E is not None:
                adapter = problem.adapter._replace(scaling_E=None)
                yield Problem(**{**vars(problem), "adapter": adapter})


def _compile(launch: Launch) -> None:
    launch.kernel.warmup(
        **launch.arguments,
        **launch.constants,
        grid=launch.grid,
        num_warps=launch.tile.warps,
        num_stages=launch.tile.stages,
    )
