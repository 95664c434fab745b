"""The layer and what it keeps: rows of time, of ratio to the frozen layer, and of memory, for every contender."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from goat_kernels.benchmarking.cases import FORMS, Case
from goat_kernels.benchmarking.layers import (
    CONTENDERS,
    Contender,
    LayerTensors,
    error_bound,
    expected_results,
    layer_error,
    results_error,
)
from goat_kernels.benchmarking.machine import cache_bytes
from goat_kernels.benchmarking.memory import peak_bytes, saved_bytes
from goat_kernels.benchmarking.settings import BenchSettings
from goat_kernels.benchmarking.steps import call_of
from goat_kernels.benchmarking.timing import Captured, Step, copies_for, step_of, time_interleaved


def layer_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Check every contender on the case's tensors, then time those that are right, beside one another."""
    device, dtype = settings.device, settings.dtype
    first = LayerTensors.draw(case, dtype, device)
    copies = copies_for(first.input_bytes, 0 if settings.quick else cache_bytes(device))
    tensors = [first, *(first.copy() for _ in range(copies - 1))]
    common = {**case.row(), **settings.dtypes(), "copies": copies}
    checked = _Checked(case, settings, first)
    yield from ({**common, **row} for row in checked.rows)
    modules = {c: [layer, *(c.make(t) for t in tensors[1:])] for c, layer in checked.layers.items()}
    for mode in case.modes:
        steps: dict[str, Step] = {}
        for contender, layers in modules.items():
            if mode not in contender.modes(case.modes):
                continue
            row = {**common, "mode": mode, "contender": contender.name}
            try:
                step = _step(mode, contender, layers, tensors)
                error = checked.errors[contender.name]
                if isinstance(step, Captured):
                    error = _replay_error(mode, step, first, checked.expected[contender.computes])
            except Exception as failure:  # a capture that a driver refuses is a result, and others follow
                yield {**row, "failed": _in_words(failure)}
                continue
            if error <= error_bound(dtype):
                steps[contender.name] = step
            else:
                yield {**row, "failed": _too_far(error, dtype)}
        bases = {c.name: c.base for c in modules if c.name in steps and c.base in steps}
        timings = time_interleaved(
            steps, device=device, copies=copies, rounds=settings.rounds, bases=bases, label=f"{case}, {mode}"
        )
        for name, timing in timings.items():
            of_base = {"ratio_to": bases[name]} if name in bases else {}
            error = {"relative_error": checked.errors[name], "relative_error_bound": error_bound(dtype)}
            yield {**common, "mode": mode, "contender": name, **timing.row(), **of_base, **error}
        del steps


class _Checked:
    """The contenders of a case that compute what they should, and rows for those that do not, or cannot run.

    Attributes:
        layers: contender -> its module on the first tensors.
        errors: contender's name -> largest relative error against float64.
        expected: what is computed -> the results in float64.
        rows: of skipped and failed contenders.
    """

    def __init__(self, case: Case, settings: BenchSettings, t: LayerTensors) -> None:
        self.layers: dict[Contender, nn.Module] = {}
        self.errors: dict[str, float] = {}
        self.expected: dict[str, list] = {}
        self.rows: list[dict] = []
        if "compiled" not in settings.without:
            torch._dynamo.reset()  # a further shape would otherwise have it compile for symbolic sizes
        for contender in CONTENDERS:
            if contender.computes in FORMS and contender.computes not in case.forms:
                continue
            if contender.kind in settings.without or (contender.half and settings.dtype.itemsize != 2):
                continue
            reason = contender.skipped_reason(settings.device, settings.dtype)
            if reason is not None:
                self.rows.append({"contender": contender.name, "skipped": reason})
                continue
            self._check(contender, settings, t)

    def _check(self, contender: Contender, settings: BenchSettings, t: LayerTensors) -> None:
        if contender.computes not in self.expected:
            self.expected[contender.computes] = expected_results(contender.computes, t)
        try:
            layer = contender.make(t)
            error = layer_error(layer, t, self.expected[contender.computes])
        except Exception as failure:  # whatever a peer, a compiler or a driver raises is a result, and others follow
            self.rows.append({"contender": contender.name, "failed": _in_words(failure)})
            return
        if error <= error_bound(settings.dtype):
            self.layers[contender], self.errors[contender.name] = layer, error
        else:
            self.rows.append({"contender": contender.name, "failed": _too_far(error, settings.dtype)})


def _step(mode: str, contender: Contender, layers: list[nn.Module], tensors: list[LayerTensors]) -> Step:
    def make(copy: int):
        return call_of(mode, layers[copy], tensors[copy].x_TN, tensors[copy].grad_y_TM)

    return step_of(make, len(layers), graph=contender.graph)


def _replay_error(mode: str, step: Captured, t: LayerTensors, expected: list) -> float:
    """Of what a replay wrote: the output in a forward, else the gradients."""
    results = step.results()
    if mode in ("forward", "inference"):
        return results_error([results.detach()], t, expected[:1])
    return results_error(list(results), t, expected[1:])


def _in_words(failure: Exception) -> str:
    return f"raised {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"


def _too_far(error: float, dtype: torch.dtype) -> str:
    return f"{error:.1e} away from float64, allowed is {error_bound(dtype):.0e}; not timed"


def memory_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Bytes that each eager contender saves for backward, and the peak of a forward and backward, results included."""
    t = LayerTensors.draw(case, settings.dtype, settings.device)
    common = {**case.row(), **settings.dtypes()}
    checked = _Checked(case, settings, t)
    yield from ({**common, **row} for row in checked.rows)
    for contender, layer in checked.layers.items():
        if contender.graph:
            continue  # a graph's memory is reserved as long as it lives
        step = call_of("both", layer, t.x_TN, t.grad_y_TM)
        step()  # workspaces and constants that stay
        of_layer = [*layer.parameters(), *layer.buffers(), t.x_TN]
        saved = saved_bytes(lambda layer=layer: layer(t.x_TN), of_layer)
        yield {
            **common,
            "mode": "both",
            "contender": contender.name,
            "saved_for_backward_bytes": saved,
            "x_bytes": t.x_TN.numel() * t.x_TN.element_size(),
            "peak_mib": round(peak_bytes(step, settings.device) / 2**20, 3),
            "relative_error": checked.errors[contender.name],
            "relative_error_bound": error_bound(settings.dtype),
        }
