"""What one eager call of a layer costs the host, forward and backward, where nothing keeps the host waiting.

On a GPU the queue is empty when a sample begins and a sample is a few calls, so that it never fills. Without one the
Triton contenders run with a driver that launches nothing (``goat_kernels/checks/dry_driver.py``), in a process of its
own, and their base products, like the other contenders as a whole, are so small that arithmetic does not count. A
row's ``how`` says which it was.
"""

from __future__ import annotations

import cProfile
import dataclasses
import io
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from goat_kernels.backends import get_backend
from goat_kernels.benchmarking.cases import TRAINING_MODES, Case
from goat_kernels.benchmarking.failures import in_words, too_far
from goat_kernels.benchmarking.launches import launches_row
from goat_kernels.benchmarking.layers import (
    CONTENDERS,
    FROZEN,
    HALF_LORA,
    LORA,
    Contender,
    LayerTensors,
    error_bound,
    expected_results,
    layer_error,
)
from goat_kernels.benchmarking.settings import BenchSettings
from goat_kernels.benchmarking.steps import call_of, differentiated, outputs_of
from goat_kernels.benchmarking.timing import Timing, no_collection
from goat_kernels.checks import dry_driver
from goat_kernels.kernels.configs import KNOWN_TARGETS, forced_target

#: Calls one after the other, with fewer launches than fit a GPU's queue of 1024.
CALLS = 20

_WARMING_ROUNDS = 3

#: Where a call costs the host alone: the arithmetic takes well under a microsecond.
_SMALL = Case(T=2, N=16, M=16, R=8)

WITHOUT_PLANS = ", without plans"

_PROFILED_CALLS, _PRINTED_FUNCTIONS = 200, 25

_DRY_PROCESS = """
import sys
from goat_kernels.checks import dry_driver
dry_driver.install()
from goat_kernels.benchmarking.host_suite import print_dry_rows
print_dry_rows(sys.argv[1])
"""


def host_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Forward, backward and both of every contender; in bfloat16, whatever the settings say.

    With ``settings.profile`` the functions that take most time are printed too.
    """
    settings = dataclasses.replace(settings, dtype=torch.bfloat16)
    rows = _rows(case, settings, dry=False) if settings.device.type == "cuda" else _rows_of_process(case, settings)
    for row in rows:
        if "profile" in row:
            print(row["profile"], flush=True)
        else:
            yield {**case.row(), **settings.dtypes(), **row}


# --- the process without a GPU --------------------------------------------------------------------------------------


def _rows_of_process(case: Case, settings: BenchSettings) -> Iterator[dict]:
    given = {"case": dataclasses.asdict(case), "threads": torch.get_num_threads()}
    given |= {name: getattr(settings, name) for name in ("rounds", "quick", "profile")}
    given["without"] = sorted(settings.without)
    command = [sys.executable, "-c", _DRY_PROCESS, json.dumps(given)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1])
    yield from map(json.loads, done.stdout.splitlines())


def print_dry_rows(given: str) -> None:
    """What the process started by :func:`host_rows` does; the dry driver is installed."""
    options = json.loads(given)
    torch.set_num_threads(options.pop("threads"))
    case, without = Case(**options.pop("case")), frozenset(options.pop("without"))
    settings = BenchSettings(torch.device("cpu"), torch.bfloat16, without=without, **options)
    with forced_target(KNOWN_TARGETS[dry_driver.TARGET]):
        for row in _rows(case, settings, dry=True):
            print(json.dumps(row))


@contextmanager
def _small_products() -> Iterator[None]:
    """The product that accumulates onto the adapter's share, of 2 x 16 by 16 x 16: what it costs the host remains."""
    product, (onto, left, right) = torch.addmm, (torch.zeros(n, 16, dtype=torch.bfloat16) for n in (2, 2, 16))

    def addmm(*_: Tensor, out: Tensor) -> Tensor:
        product(onto, left, right, out=onto)
        return out

    torch.addmm = addmm
    try:
        yield
    finally:
        torch.addmm = product


# --- what is timed --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Host:
    """A contender ready to be called.

    Attributes:
        name, backend: as of the layer suite's contender.
        layer, x, grad_y: a call.
        how: where its calls run.
        around: entered for a sample.
        plans: whether the Triton backend may replay what it did before.
        ratios_to: quantity -> the contender that it refers to.
    """

    name: str
    backend: str | None
    layer: nn.Module
    x: Tensor
    grad_y: Tensor
    how: str
    around: Callable[[], AbstractContextManager]
    ratios_to: dict[str, str]
    plans: bool = True

    def sample_ms(self, calls: int) -> tuple[float, float, float]:
        """Medians of the forward, the backward and both, as the host issues them."""
        x, forward, backward, both = self.x, [], [], []
        inputs = differentiated(self.layer, x)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        for _ in range(calls):
            start = time.perf_counter()
            outputs, gradients = outputs_of(self.layer, x, self.grad_y)
            middle = time.perf_counter()
            torch.autograd.grad(outputs, inputs, gradients)
            end = time.perf_counter()
            forward.append(middle - start)
            backward.append(end - middle)
            both.append(end - start)
        return tuple(1e3 * statistics.median(times) for times in (forward, backward, both))


@contextmanager
def _without_plans() -> Iterator[None]:
    """Every call of the Triton backend chooses tiles, names arguments and looks kernels up anew."""
    passes: Any = get_backend("triton")
    passes.call = lambda function, *arguments, **options: function(passes, *arguments, **options)
    try:
        yield
    finally:
        del passes.call


def _contenders(case: Case, settings: BenchSettings) -> list[Contender]:
    form = case.forms[-1]
    names = (FROZEN, LORA, HALF_LORA, f"GOAT {form}, triton", f"GOAT {form}, torch")
    by_name = {contender.name: contender for contender in CONTENDERS}
    return [by_name[name] for name in names if by_name[name].kind not in settings.without]


def _rows(case: Case, settings: BenchSettings, *, dry: bool) -> Iterator[dict]:
    hosts: list[_Host] = []
    for contender in _contenders(case, settings):
        is_dry = dry and contender.backend == "triton"
        reason = None if is_dry else contender.skipped_reason(settings.device, settings.dtype)
        if reason is not None:
            yield {"contender": contender.name, "skipped": reason}
            continue
        try:
            hosts += _ready(contender, case, settings, is_dry=is_dry, is_small=dry and not is_dry)
        except Exception as failure:
            yield from ({"contender": contender.name, "mode": m, "failed": in_words(failure)} for m in TRAINING_MODES)
    yield from _timed_rows(hosts, settings)
    if settings.profile:
        yield from ({"profile": _profile(host)} for host in hosts if host.backend == "triton" and host.plans)


def _ready(
    contender: Contender, case: Case, settings: BenchSettings, *, is_dry: bool, is_small: bool
) -> Iterator[_Host]:
    """The contender, checked where it computes anything; the Triton backend's without plans too."""
    t = LayerTensors.draw(_SMALL if is_small else case, settings.dtype, settings.device)
    layer, how = contender.make(t), "on the GPU, not waited for"
    if is_dry:
        how = "a driver that launches nothing; base products of 2 x 16 by 16 x 16"
    else:
        error, bound = layer_error(layer, t, expected_results(contender.computes, t)), error_bound(settings.dtype)
        if not error <= bound:
            raise RuntimeError(too_far(error, bound))
    if is_small:
        how = f"on the CPU at {_SMALL}"
    around = _small_products if is_dry else nullcontext
    common = {"backend": contender.backend, "layer": layer, "x": t.x_TN, "grad_y": t.grad_y_TM, "how": how}
    yield _Host(contender.name, around=around, ratios_to=contender.ratios_to, **common)
    if contender.backend == "triton":

        @contextmanager
        def as_if_first() -> Iterator[None]:
            with around(), _without_plans():
                yield

        ratios_to = {"ratio": FROZEN}
        yield _Host(contender.name + WITHOUT_PLANS, around=as_if_first, ratios_to=ratios_to, plans=False, **common)


def _timed_rows(hosts: list[_Host], settings: BenchSettings) -> Iterator[dict]:
    """Every contender once a round, in an order that rotates."""
    calls = 2 if settings.quick else CALLS
    times: dict[str, list[tuple[float, float, float]]] = {host.name: [] for host in hosts}
    with no_collection():
        for round_ in range(-_WARMING_ROUNDS, settings.rounds):
            start = round_ % max(len(hosts), 1)
            for host in hosts[start:] + hosts[:start]:
                with host.around():
                    sample = host.sample_ms(calls)
                if round_ >= 0:
                    times[host.name].append(sample)
    for host in hosts:
        with host.around():
            call = call_of("both", host.layer, host.x, host.grad_y)
            launches = launches_row(call, host.backend, settings.device)
        for index, mode in enumerate(TRAINING_MODES):
            own = tuple(sample[index] for sample in times[host.name])
            to = {q: base for q, base in host.ratios_to.items() if base in times and base != host.name}
            ratios = {
                q: tuple(ms / other[index] for ms, other in zip(own, times[base], strict=True))
                for q, base in to.items()
            }
            row = {"contender": host.name, "mode": mode, "how": host.how, **Timing(own, ratios, calls).row()}
            yield row | {f"{q}_to": base for q, base in to.items()} | (launches if mode == "both" else {})


def _profile(host: _Host) -> str:
    """The functions in which most time goes, callees left out; on a GPU less what autograd's own thread runs."""
    profile, text = cProfile.Profile(), io.StringIO()
    with host.around():
        host.sample_ms(CALLS)
        profile.enable()
        host.sample_ms(_PROFILED_CALLS)
        profile.disable()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(_PRINTED_FUNCTIONS)
    return f"{host.name}: {_PROFILED_CALLS} calls, forward and backward\n{text.getvalue().rstrip()}\n"
