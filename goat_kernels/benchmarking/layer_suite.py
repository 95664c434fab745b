"""The layer and what it keeps: rows of time, of ratio to the frozen layer, and of memory, for every contender."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Iterator

import torch
from torch import nn

from goat_kernels.benchmarking.capture import Captured, Eager, step_of, worst_error
from goat_kernels.benchmarking.cases import FORMS, Case
from goat_kernels.benchmarking.failures import drops_nothing, in_words, too_far
from goat_kernels.benchmarking.launches import launches_row
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
from goat_kernels.benchmarking.timing import copies_for, time_interleaved


def layer_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Check every contender on the case's tensors, then time those that are right, beside one another.

    With dropout, contenders draw masks of their own: they are checked without it, and what is timed has to differ.
    """
    device, dtype = settings.device, settings.dtype
    first = LayerTensors.draw(case, dtype, device)
    copies = copies_for(first.input_bytes, 0 if settings.quick else cache_bytes(device))
    tensors = [first, *(first.copy() for _ in range(copies - 1))]
    common = {**case.row(), **settings.dtypes(), "copies": copies}
    checked = _Checked(case, settings, first)
    yield from ({**common, **row} for row in checked.rows(case.modes))
    modules: dict[Contender, list[nn.Module]] = {}
    if case.dropout_p:
        tensors = [dataclasses.replace(t, dropout_p=case.dropout_p) for t in tensors]
        common["checked"] = "without dropout"
    for contender, layer in checked.layers.items():
        try:
            of_first = contender.make(tensors[0]) if case.dropout_p else layer
            modules[contender] = [of_first, *(contender.make(t) for t in tensors[1:])]
        except Exception as failure:
            yield from ({**common, **row} for row in failed_rows(contender, in_words(failure), case.modes))
    for mode in case.modes:
        fitting = {c: layers for c, layers in modules.items() if mode in c.modes(case.modes)}
        label = f"{case}, {mode}"
        for row in _mode_rows(mode, fitting, tensors, checked, settings, label):
            yield {**common, "mode": mode, **row}
        gc.collect()  # graphs of autograd remember the streams that they ran on


def _mode_rows(
    mode: str,
    modules: dict[Contender, list[nn.Module]],
    tensors: list[LayerTensors],
    checked: _Checked,
    settings: BenchSettings,
    label: str,
) -> Iterator[dict]:
    steps: dict[str, Captured | Eager] = {}
    errors: dict[str, float] = {}
    bases: dict[str, dict[str, str]] = {}
    launches: dict[str, dict] = {}
    bound = error_bound(settings.dtype)
    for contender, layers in modules.items():
        try:
            step = _step(mode, contender, layers, tensors)
            error = _step_error(mode, step, tensors[0], checked.expected[contender.computes])
        except Exception as failure:  # a capture that a driver refuses is a result, and others follow
            yield {"contender": contender.name, "failed": in_words(failure)}
            continue
        if tensors[0].dropout_p and contender.computes != "frozen":
            if not error > bound:
                yield {"contender": contender.name, "failed": drops_nothing(error)}
                continue
            error = checked.errors[contender.name]
        elif not error <= bound:
            yield {"contender": contender.name, "failed": too_far(error, bound)}
            continue
        if not contender.graph:  # which repeats what the eager one launches
            launches[contender.name] = launches_row(functools.partial(step, 0), contender.backend, settings.device)
        steps[contender.name], errors[contender.name] = step, error
        for quantity, base in contender.ratios_to.items():
            bases.setdefault(quantity, {})[contender.name] = base
    timings = time_interleaved(
        steps, device=settings.device, copies=len(tensors), rounds=settings.rounds, ratios=bases, label=label
    )
    for name, timing in timings.items():
        to = {f"{quantity}_to": bases[quantity][name] for quantity in timing.ratios}
        error = {"relative_error": errors[name], "relative_error_bound": bound}
        yield {"contender": name, **timing.row(), **to, **error, **launches.get(name, {})}


class _Checked:
    """The contenders of a case that compute what they should, and why others have no time.

    Attributes:
        layers: contender -> its module on the first tensors.
        errors: contender's name -> largest relative error against float64.
        expected: what is computed -> the results in float64.
    """

    def __init__(self, case: Case, settings: BenchSettings, t: LayerTensors) -> None:
        self.layers: dict[Contender, nn.Module] = {}
        self.errors: dict[str, float] = {}
        self.expected: dict[str, list] = {}
        self._skipped: list[dict] = []
        self._failed: dict[Contender, str] = {}
        if "compiled" not in settings.without:
            torch._dynamo.reset()  # a further shape would otherwise have it compile for symbolic sizes
        for contender in CONTENDERS:
            if contender.computes in FORMS and contender.computes not in case.forms:
                continue
            if contender.kind in settings.without or (contender.half and settings.dtype.itemsize != 2):
                continue
            if case.dropout_p and not contender.knows_dropout:
                continue
            reason = contender.skipped_reason(settings.device, settings.dtype)
            if reason is not None:
                self._skipped.append({"contender": contender.name, "skipped": reason})
                continue
            self._check(contender, settings, t)

    def rows(self, modes: tuple[str, ...]) -> list[dict]:
        """Skipped contenders once, failed ones once for each mode: such a row stands where its time would."""
        failed = [row for contender, reason in self._failed.items() for row in failed_rows(contender, reason, modes)]
        return [*self._skipped, *failed]

    def _check(self, contender: Contender, settings: BenchSettings, t: LayerTensors) -> None:
        bound = error_bound(settings.dtype)
        try:
            if contender.computes not in self.expected:
                self.expected[contender.computes] = expected_results(contender.computes, t)
            layer = contender.make(t)
            error = layer_error(layer, t, self.expected[contender.computes])
        except Exception as failure:  # whatever a peer, a compiler or a driver raises is a result, and others follow
            self._failed[contender] = in_words(failure)
            return
        if error <= bound:
            self.layers[contender], self.errors[contender.name] = layer, error
        else:
            self._failed[contender] = too_far(error, bound)


def failed_rows(contender: Contender, reason: str, modes: tuple[str, ...]) -> list[dict]:
    """One for each mode in which it would have had a time."""
    return [{"contender": contender.name, "mode": mode, "failed": reason} for mode in contender.modes(modes)]


def _step(mode: str, contender: Contender, layers: list[nn.Module], tensors: list[LayerTensors]) -> Captured | Eager:
    def make(copy: int):
        return call_of(mode, layers[copy], tensors[copy].x_TN, tensors[copy].grad_y_TM)

    return step_of(make, len(layers), graph=contender.graph)


def _step_error(mode: str, step: Captured | Eager, t: LayerTensors, expected: list) -> float:
    """Of what the very step that is timed gives, on every copy: the output of a forward, else the gradients."""
    if mode in ("forward", "inference"):
        return worst_error(step, lambda _, y: results_error([y], t, expected[:1]))
    return worst_error(step, lambda _, gradients: results_error(list(gradients), t, expected[1:]))


def memory_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Bytes that each eager contender saves for backward, and the peak of a forward and backward, results included."""
    t = LayerTensors.draw(case, settings.dtype, settings.device)
    common = {**case.row(), **settings.dtypes()}
    checked = _Checked(case, settings, t)
    yield from ({**common, **row} for row in checked.rows(("both",)))
    for contender, layer in checked.layers.items():
        if contender.graph:
            continue  # a graph's memory is reserved as long as it lives
        row = {**common, "mode": "both", "contender": contender.name}
        try:
            row |= _memory(layer, t, settings.device)
        except Exception as failure:
            yield {**row, "failed": in_words(failure)}
            continue
        row |= {"relative_error": checked.errors[contender.name], "relative_error_bound": error_bound(settings.dtype)}
        yield row


def _memory(layer: nn.Module, t: LayerTensors, device: torch.device) -> dict:
    step = call_of("both", layer, t.x_TN, t.grad_y_TM)
    step()  # workspaces and constants that stay
    of_layer = [*layer.parameters(), *layer.buffers(), t.x_TN]
    return {
        "saved_for_backward_bytes": saved_bytes(lambda: layer(t.x_TN), of_layer),
        "x_bytes": t.x_TN.numel() * t.x_TN.element_size(),
        "peak_mib": round(peak_bytes(step, device) / 2**20, 3),
    }
