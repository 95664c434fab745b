"""The layer and what it keeps: rows of time, of ratio to the frozen layer, and of memory, for every contender."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.cases import FORMS, BenchSettings, Case, copies_of
from bench.layers import (
    CONTENDERS,
    Contender,
    call_of,
    expected_results,
    layer_error,
    layer_problem,
    results_error,
)
from bench.memory import peak_bytes, saved_bytes
from bench.steps import Candidate, measured, too_far
from bench.timing import without_time
from goat_kernels.checks.problem import Problem
from goat_kernels.numerics import TOLERANCES

#: Does not run twice on one forward.
COMPILED_BACKWARD = ("compiled", "backward")

#: What a contender computes -> its results in float64.
Expected = Callable[[str], list[Tensor]]


def layer_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Check every contender on the case's tensors, then time those that are right, beside one another.

    With dropout, contenders draw masks of their own: they are checked without it.
    """
    first = layer_problem(case, settings.dtype, settings.device)
    # Of what the frozen layer reads in a step: the least that a rotation has to push out of the cache.
    problems = copies_of(first, first.x_TN.nbytes + first.weight_MN.nbytes + first.grad_y_TM.nbytes, settings)
    common = {**case.row(), **settings.dtypes(), "copies": len(problems)}
    expected = functools.cache(lambda computes: expected_results(computes, first))
    right = {}
    for contender, layer, fields in checked_layers(case, settings, first, expected):
        if layer is not None:
            right[contender] = layer, fields
        else:
            yield from ({**common, **row} for row in rows_without_time(contender, fields, case.modes))
    if case.dropout_p:
        problems = [dataclasses.replace(p, adapter=p.adapter._replace(dropout_p=case.dropout_p)) for p in problems]
        common["checked"] = "without dropout"

    @functools.cache
    def layer_on(contender: Contender, copy: int) -> nn.Module:
        # The module that was checked drops nothing.
        return right[contender][0] if copy == 0 and not case.dropout_p else contender.make(problems[copy])

    def candidate(contender: Contender, mode: str) -> Candidate:
        def call(copy: int) -> Callable[[], object]:
            return call_of(mode, layer_on(contender, copy), problems[copy].x_TN, problems[copy].grad_y_TM)

        def error(_: int, results: Tensor | tuple[Tensor, ...]) -> float:
            """Of the output of a forward, else of the gradients."""
            output, *gradients = expected(contender.computes)
            if isinstance(results, Tensor):
                return results_error([results], case.E, [output])
            return results_error(list(results), case.E, gradients)

        return Candidate(
            {"contender": contender.name, **right[contender][1]},
            call,
            None if case.dropout_p else error,
            TOLERANCES[settings.dtype].relative,
            graph=contender.graph,
            ratios=contender.ratios_to,
        )

    for mode in case.modes:
        candidates = (candidate(contender, mode) for contender in right if (contender.kind, mode) != COMPILED_BACKWARD)
        for row in measured(candidates, len(problems), settings):
            yield {**common, "mode": mode, **row}
        gc.collect()  # graphs of autograd remember the streams that they ran on


def checked_layers(
    case: Case, settings: BenchSettings, p: Problem, expected: Expected
) -> Iterator[tuple[Contender, nn.Module | None, dict]]:
    """(contender, its module on ``p``, its error) of those that compute what they should; (contender, None, why not).

    Args:
        case: what is run.
        settings: of the run.
        p: its tensors, without dropout.
        expected: what such a contender computes -> its results in float64.
    """
    bound = TOLERANCES[settings.dtype].relative
    if "compiled" not in settings.without:
        torch._dynamo.reset()  # a further shape would otherwise have it compile for symbolic sizes
    for contender in CONTENDERS:
        if (
            (contender.computes in FORMS and contender.computes not in case.forms)
            or contender.kind in settings.without
            or (contender.half and settings.dtype.itemsize != 2)
            or (case.dropout_p and not contender.knows_dropout)
        ):
            continue
        reason = contender.skipped_reason(settings.device, settings.dtype)
        if reason is not None:
            yield contender, None, {"skipped": reason}
            continue
        try:
            layer = contender.make(p)
            error = layer_error(layer, p, expected(contender.computes))
        except Exception as failure:  # whatever a peer, a compiler or a driver raises is a result, and others follow
            yield contender, None, without_time(failure)
            continue
        if error <= bound:
            yield contender, layer, {"relative_error": error, "relative_error_bound": bound}
        else:
            yield contender, None, {"failed": too_far(error, bound)}


def rows_without_time(contender: Contender, reason: dict, modes: tuple[str, ...]) -> Iterator[dict]:
    """A skipped contender once, a failed one once for each mode: such a row stands where its time would."""
    if "skipped" in reason:
        yield {"contender": contender.name, **reason}
    else:
        yield from ({"contender": contender.name, "mode": mode, **reason} for mode in modes)


def memory_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Bytes that each eager contender saves for backward, and the peak of a forward and backward, results included."""
    p = layer_problem(case, settings.dtype, settings.device)
    common = {**case.row(), **settings.dtypes()}
    expected = functools.cache(lambda computes: expected_results(computes, p))
    for contender, layer, fields in checked_layers(case, settings, p, expected):
        if layer is None:
            yield from ({**common, **row} for row in rows_without_time(contender, fields, ("both",)))
        elif not contender.graph:  # a graph's memory is reserved as long as it lives
            row = {**common, "mode": "both", "contender": contender.name}
            try:
                step = call_of("both", layer, p.x_TN, p.grad_y_TM)
                step()  # workspaces and constants that stay
                not_counted = [*layer.parameters(), *layer.buffers(), p.x_TN]
                row["saved_for_backward_bytes"] = saved_bytes(functools.partial(layer, p.x_TN), not_counted)
                row["peak_mib"] = round(peak_bytes(step, settings.device) / 2**20, 3)
                yield {**row, "x_bytes": p.x_TN.nbytes, **fields}
            except Exception as failure:
                yield {**row, **without_time(failure)}
