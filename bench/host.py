"""What one eager call of a layer costs the host, forward and backward, where nothing keeps the host waiting.

On a GPU the queue is empty when a sample begins and a sample is a few calls, so that it never fills. Without one the
Triton contenders run with a driver that launches nothing (``dry_driver.py``), in a process of its own, and their base
products, like the other contenders as a whole, are so small that arithmetic does not count. A row's ``how`` says which
it was.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import dry_driver
from bench.cases import TRAINING_MODES, BenchSettings, Case
from bench.layers import (
    CONTENDERS,
    FROZEN,
    HALF_LORA,
    LORA,
    Contender,
    call_of,
    differentiated,
    error_bound,
    expected_results,
    layer_error,
    layer_problem,
    outputs_of,
)
from bench.memory import launches_row
from bench.steps import too_far
from bench.timing import Samples, in_words, no_collection, rotating, timing_row
from goat_kernels.backends import get_backend

#: Calls one after the other, with fewer launches than fit a GPU's queue of 1024.
CALLS = 20

_WARMING_ROUNDS = 3

#: Where a call costs the host alone: the arithmetic takes well under a microsecond.
_SMALL = Case(T=2, N=16, M=16, R=8)

WITHOUT_PLANS = ", without plans"

_PROFILED_CALLS, _PRINTED_FUNCTIONS = 200, 25

_DRY_PROCESS = (
    "from bench import dry_driver; dry_driver.install(); from bench.host import print_dry_rows; print_dry_rows()"
)


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
    given = {name: getattr(settings, name) for name in ("rounds", "quick", "profile")}
    given |= {"without": sorted(settings.without), "threads": torch.get_num_threads(), "case": vars(case)}
    done = subprocess.run(
        [sys.executable, "-c", _DRY_PROCESS],
        input=json.dumps(given),
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1])
    yield from map(json.loads, done.stdout.splitlines())


def print_dry_rows() -> None:
    """What the process started by :func:`host_rows` does; the dry driver is installed."""
    from goat_kernels.kernels.configs import KNOWN_TARGETS, forced_target

    given = json.load(sys.stdin)
    torch.set_num_threads(given.pop("threads"))
    case, without = Case(**given.pop("case")), frozenset(given.pop("without"))
    with forced_target(KNOWN_TARGETS[dry_driver.TARGET]):
        for row in _rows(case, BenchSettings(torch.device("cpu"), torch.bfloat16, without=without, **given), dry=True):
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


@contextmanager
def _without_plans() -> Iterator[None]:
    """Every call of the Triton backend chooses tiles, names arguments and looks kernels up anew."""
    passes: Any = get_backend("triton")
    passes.call = lambda function, *arguments, **options: function(passes, *arguments, **options)
    try:
        yield
    finally:
        del passes.call


# --- what is timed --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Host:
    """A contender ready to be called.

    Attributes:
        contender: of the layer suite.
        layer, x, grad_y: a call.
        is_dry: whether the driver launches nothing.
        plans: whether the Triton backend may replay what it did before.
        how: where its calls run.
    """

    contender: Contender
    layer: nn.Module
    x: Tensor
    grad_y: Tensor
    is_dry: bool
    plans: bool
    how: str

    @property
    def name(self) -> str:
        return self.contender.name + ("" if self.plans else WITHOUT_PLANS)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Entered for a sample."""
        with ExitStack() as stack:
            if self.is_dry:
                stack.enter_context(_small_products())
            if not self.plans:
                stack.enter_context(_without_plans())
            yield

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


def _rows(case: Case, settings: BenchSettings, *, dry: bool) -> Iterator[dict]:
    form, hosts = case.forms[-1], []
    names = (FROZEN, LORA, HALF_LORA, f"GOAT {form}, triton", f"GOAT {form}, torch")
    by_name = {contender.name: contender for contender in CONTENDERS}
    for contender in (by_name[name] for name in names if by_name[name].kind not in settings.without):
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
        yield from ({"profile": _profile(h)} for h in hosts if h.contender.backend == "triton" and h.plans)


def _ready(
    contender: Contender, case: Case, settings: BenchSettings, *, is_dry: bool, is_small: bool
) -> Iterator[_Host]:
    """The contender, checked where it computes anything; the Triton backend's without plans too."""
    p = layer_problem(_SMALL if is_small else case, settings.dtype, settings.device)
    layer, how = contender.make(p), f"on the CPU at {_SMALL}" if is_small else "on the GPU, not waited for"
    if is_dry:
        how = "a driver that launches nothing; base products of 2 x 16 by 16 x 16"
    else:
        error, bound = layer_error(layer, p, expected_results(contender.computes, p)), error_bound(settings.dtype)
        if not error <= bound:
            raise RuntimeError(too_far(error, bound))
    for plans in (True, False) if contender.backend == "triton" else (True,):
        yield _Host(contender, layer, p.x_TN, p.grad_y_TM, is_dry, plans, how)


def _timed_rows(hosts: list[_Host], settings: BenchSettings) -> Iterator[dict]:
    """Every contender once a round, in an order that rotates."""
    calls = 2 if settings.quick else CALLS
    times: dict[str, list[tuple[float, float, float]]] = {host.name: [] for host in hosts}
    with no_collection():
        for round_, host in rotating(hosts, range(-_WARMING_ROUNDS, settings.rounds), "host"):
            with host.around():
                sample = host.sample_ms(calls)
            if round_ >= 0:
                times[host.name].append(sample)
    for host in hosts:
        with host.around():
            call = call_of("both", host.layer, host.x, host.grad_y)
            launches = launches_row(call, host.contender.backend, settings.device)
        to = {
            q: base
            for q, base in host.contender.ratios_to.items()
            if base != host.name and (host.plans or q == "ratio")
        }
        for index, mode in enumerate(TRAINING_MODES):
            of_mode = {name: Samples(calls, [one[index] for one in of_name]) for name, of_name in times.items()}
            row = {"contender": host.name, "mode": mode, "how": host.how, **timing_row(host.name, of_mode, to)}
            row |= {f"{quantity}_to": base for quantity, base in to.items() if f"{quantity}_p50" in row}
            yield row | (launches if mode == "both" else {})


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
