"""The suites by name. Adding one is adding an entry to ``SUITES``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from goat_kernels.benchmarking.ahead import compile_ahead
from goat_kernels.benchmarking.cases import (
    Case,
    design_cases,
    host_cases,
    kernel_cases,
    layer_cases,
    memory_cases,
    scaling_cases,
    tuning_cases,
)
from goat_kernels.benchmarking.design_suite import design_rows
from goat_kernels.benchmarking.failures import in_words
from goat_kernels.benchmarking.host_suite import host_rows
from goat_kernels.benchmarking.layer_suite import layer_rows, memory_rows
from goat_kernels.benchmarking.machine import describe
from goat_kernels.benchmarking.models import model_cases, model_layers, model_rows
from goat_kernels.benchmarking.passes import kernel_rows
from goat_kernels.benchmarking.progress import tracked
from goat_kernels.benchmarking.results import case_of, finished_cases
from goat_kernels.benchmarking.settings import BenchSettings
from goat_kernels.benchmarking.startup import startup_rows
from goat_kernels.benchmarking.tuning import tuning_rows


def _itself(case: Case) -> tuple[Case, ...]:
    return (case,)


@dataclass(frozen=True)
class Suite:
    """One suite.

    Attributes:
        summary: what it measures, in a figure's description.
        cases: (device type, quick) -> what it runs, one after the other.
        rows: (case, settings) -> its rows.
        layers: case -> the layers whose kernels it launches, which are compiled ahead; None compiles nothing.
        shaped: whether --shape stands in for its cases.
        without: kinds of contenders that it leaves out: a compiled layer takes seconds for each shape.
    """

    summary: str
    cases: Callable[..., Sequence]
    rows: Callable[[object, BenchSettings], Iterator[dict]]
    layers: Callable[[object], Sequence[Case]] | None = _itself
    shaped: bool = True
    without: frozenset[str] = frozenset()


def _roofline_rows(settings: BenchSettings) -> Iterator[dict]:
    for ceiling in settings.roofline.measured:
        unit = "tflops" if ceiling.what == "product" else "gb_per_s"
        row = {"contender": ceiling.what, "size": ceiling.size, **settings.dtypes(), "time_ms_fastest": ceiling.time_ms}
        yield {**row, unit: ceiling.rate, **settings.roofline.row()}


_COMPILED = frozenset({"compiled"})

SUITES: dict[str, Suite] = {
    "roofline": Suite(
        "how fast this machine reads, copies and multiplies",
        lambda device, quick: (None,),
        lambda case, settings: _roofline_rows(settings),
        layers=None,
        shaped=False,
    ),
    "kernels": Suite("each pass alone, against the machine's roofline", kernel_cases, kernel_rows),
    "layer": Suite("forward, backward, both; ratio to the frozen nn.Linear", layer_cases, layer_rows),
    "host": Suite(
        "what a call of the layer costs the host", host_cases, host_rows, without=_COMPILED | frozenset({"graph"})
    ),
    "memory": Suite("bytes saved for backward, and the peak", memory_cases, memory_rows, without=_COMPILED),
    "scaling": Suite(
        "cost as T, N, R, E and K grow, each alone", scaling_cases, layer_rows, shaped=False, without=_COMPILED
    ),
    "model": Suite(
        "training steps of a Llama and a ViT with random weights",
        model_cases,
        model_rows,
        layers=model_layers,
        shaped=False,
    ),
    "startup": Suite(
        "import, first call, initialisation",
        lambda device, quick: (None,),
        lambda case, settings: startup_rows(settings),
        layers=None,
        shaped=False,
    ),
    "design": Suite(
        "the base product accumulating onto the adapter's share, against other orders", design_cases, design_rows
    ),
    "tuning": Suite("each step away from the table's tiles", tuning_cases, tuning_rows),
}


def run_suite(name: str, settings: BenchSettings, report: Callable[[dict], None], before: Sequence[dict] = ()) -> None:
    """Run a suite and hand every row to ``report`` as soon as it is there.

    A case that raises becomes a row that says so, and the next one runs. Cases that ``before``, the rows of a run that
    stopped, has whole are left out.
    """
    suite, common = SUITES[name], {"cases": settings.cases, **describe(settings.device)}
    cases = suite.cases(settings.device.type, quick=settings.quick)
    if settings.shapes and suite.shaped:
        cases = settings.shapes
    finished = finished_cases(before, name, {**common, **settings.dtypes()})
    cases = [case for case in cases if case is None or case_of(case.row()) not in finished]
    of_suite = dataclasses.replace(settings, without=settings.without | suite.without)
    if suite.layers is not None:
        try:
            compile_ahead((layer for case in cases for layer in suite.layers(case)), settings)
        except Exception as failure:  # what does not compile is met again when it is launched
            warnings.warn(f"compiling ahead: {in_words(failure)}", stacklevel=2)
    skipped = set()
    for case in tracked(cases, name, "case"):
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
        for row in _rows_until_it_raises(suite, case, of_suite):
            if "skipped" in row:
                if (row["contender"], row["skipped"]) in skipped:
                    continue  # once is enough
                skipped.add((row["contender"], row["skipped"]))
            report({"suite": name, **row, **common})


def _rows_until_it_raises(suite: Suite, case: object, settings: BenchSettings) -> Iterator[dict]:
    try:
        yield from suite.rows(case, settings)
    except Exception as failure:
        of_case = {} if case is None else {**case.row(), **settings.dtypes()}
        yield {**of_case, "contender": "the rest of this case", "failed": in_words(failure)}


def shapes_of(sizes: Sequence[tuple[int, int, int, int]], forms: tuple[str, ...]) -> tuple[Case, ...]:
    """Cases of (T, N, M, R), in all training modes."""
    return tuple(Case(*one, forms=forms) for one in sizes)
