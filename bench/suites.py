"""The suites by name, in the order of their sections in docs/benchmarks.md. Adding one is adding an entry."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from bench import cases, tables
from bench.cases import BenchSettings, Case
from bench.host import host_rows
from bench.layers import layer_rows, memory_rows
from bench.machine import describe
from bench.models import MODELS, model_rows
from bench.passes import kernel_rows
from bench.results import CASE_FIELDS, finished_cases, part_of
from bench.timing import in_words
from bench.tuning import tuning_rows
from goat_kernels.backends import why_not_auto
from goat_kernels.checks.problem import Problem, compile_ahead, make_problem


class Suite(NamedTuple):
    """One suite.

    Attributes:
        title: the heading of its section.
        table: its rows -> its tables in Markdown.
        rows: (case, settings) -> its rows, without the fields that say which case and dtype it was.
        cases: ``BenchSettings.kind`` -> what it runs, one after the other.
        shaped: whether --shape stands in for its cases.
    """

    title: str
    table: Callable[[list[dict]], str]
    rows: Callable[[object, BenchSettings], Iterator[dict]]
    cases: dict[str, Sequence]
    shaped: bool = True


SUITES = {
    "layer": Suite("One layer", tables.layer_tables, layer_rows, cases.LAYERS),
    "host": Suite("Host time", tables.host_table, host_rows, cases.HOST),
    "kernels": Suite("Each pass alone", tables.kernels_table, kernel_rows, cases.KERNELS),
    "memory": Suite("Memory", tables.memory_table, memory_rows, cases.MEMORY),
    "scaling": Suite("As one size grows", tables.scaling_table, layer_rows, cases.SCALING, shaped=False),
    "model": Suite("Training steps of whole models", tables.model_table, model_rows, MODELS, shaped=False),
    "tuning": Suite("Tiles near the table's", tables.tuning_table, tuning_rows, cases.TUNING),
}


def suite_rows(name: str, settings: BenchSettings, before: Sequence[dict] = ()) -> Iterator[dict]:
    """Run a suite: every row as soon as it is there.

    A case that raises becomes a row that says so, and the next one runs. Cases that ``before``, the rows of a run that
    stopped, has whole are left out.
    """
    suite, common = SUITES[name], {"cases": settings.cases, **describe(settings.device)}
    finished = finished_cases(before, name, {**common, **settings.dtypes()})
    asked = (suite.shaped and settings.shapes) or suite.cases[settings.kind]
    to_run = [case for case in asked if part_of(case.row(), CASE_FIELDS) not in finished]
    if why_not_auto("triton", settings.device, settings.dtype) is None:
        try:
            layers = (layer for case in to_run for layer in case.layers())
            compile_ahead(problems_of(layers, settings.dtype), settings.device)
        except Exception as failure:  # what does not compile is met again when it is launched
            warnings.warn(f"compiling ahead: {in_words(failure)}", stacklevel=2)
    skipped = set()
    for case in tqdm(to_run, desc=name, unit="case", leave=False, delay=1):
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
        of_case = {"suite": name, **case.row(), **settings.dtypes()}
        try:
            for row in suite.rows(case, settings):
                reason = (row["contender"], row.get("skipped"))
                if "skipped" not in row or reason not in skipped:  # once is enough
                    yield {**of_case, **row, **common}
                skipped.add(reason)
        except Exception as failure:
            yield {**of_case, "contender": "the rest of this case", "failed": in_words(failure), **common}


def problems_of(layers: Iterable[Case], dtype: torch.dtype) -> Iterator[Problem]:
    """What to compile for ``layers``, on "meta".

    The checks' layers have one scaling with "fold" and one per expert with "path"; the benchmarks' have one in either
    form, so that "path" has both kernels.
    """
    for case in layers:
        for form in case.forms:
            problem = make_problem(case.layer(dtype, form), "meta")
            yield problem
            if problem.adapter.scaling_E is not None:
                yield dataclasses.replace(problem, adapter=problem.adapter._replace(scaling_E=None))
