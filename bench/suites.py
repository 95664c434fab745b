"""The suites by name. Adding one is adding an entry to ``SUITES``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bench.cases import (
    BenchSettings,
    Case,
    host_cases,
    kernel_cases,
    layer_cases,
    memory_cases,
    scaling_cases,
    tuning_cases,
)
from bench.host import host_rows
from bench.layer_suites import layer_rows, memory_rows
from bench.machine import describe
from bench.models import model_cases, model_layers, model_rows
from bench.passes import kernel_rows
from bench.results import case_of, finished_cases
from bench.timing import in_words, tracked
from bench.tuning import tuning_rows
from goat_kernels.backends import why_not_auto
from goat_kernels.checks.ahead import compile_ahead
from goat_kernels.checks.problem import Problem, make_problem


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


def _roofline_rows(case: None, settings: BenchSettings) -> Iterator[dict]:
    for row in settings.roofline.measured:
        yield {**row, **settings.dtypes(), **settings.roofline.row()}


_COMPILED = frozenset({"compiled"})

SUITES: dict[str, Suite] = {
    "roofline": Suite(
        "how fast this machine reads, copies and multiplies",
        lambda device, quick: (None,),
        _roofline_rows,
        layers=None,
        shaped=False,
    ),
    "kernels": Suite("each pass alone, against the machine's roofline", kernel_cases, kernel_rows),
    "layer": Suite("forward, backward, both; ratio to the frozen nn.Linear", layer_cases, layer_rows),
    "host": Suite("what a call of the layer costs the host", host_cases, host_rows),
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
    "tuning": Suite("each step away from the table's tiles", tuning_cases, tuning_rows),
}


def suite_rows(name: str, settings: BenchSettings, before: Sequence[dict] = ()) -> Iterator[dict]:
    """Run a suite: every row as soon as it is there.

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
    if suite.layers is not None and why_not_auto("triton", settings.device, settings.dtype) is None:
        try:
            layers = (layer for case in cases for layer in suite.layers(case))
            compile_ahead(problems_of(layers, settings.dtype), settings.device)
        except Exception as failure:  # what does not compile is met again when it is launched
            warnings.warn(f"compiling ahead: {in_words(failure)}", stacklevel=2)
    skipped = set()
    for case in tracked(cases, name, "case"):
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            for row in suite.rows(case, of_suite):
                reason = (row["contender"], row.get("skipped"))
                if "skipped" not in row or reason not in skipped:  # once is enough
                    yield {"suite": name, **row, **common}
                skipped.add(reason)
        except Exception as failure:
            of_case = {} if case is None else {**case.row(), **settings.dtypes()}
            raised = {"contender": "the rest of this case", "failed": in_words(failure)}
            yield {"suite": name, **of_case, **raised, **common}


def problems_of(cases: Iterable[Case], dtype: torch.dtype) -> Iterator[Problem]:
    """What to compile for ``cases``, on "meta".

    The checks' layers have one scaling with "fold" and one per expert with "path"; the benchmarks' have one in either
    form, so that "path" has both kernels.
    """
    for case in cases:
        for form in case.forms:
            problem = make_problem(case.layer(dtype, form), "meta")
            yield problem
            if problem.adapter.scaling_E is not None:
                yield dataclasses.replace(problem, adapter=problem.adapter._replace(scaling_E=None))
