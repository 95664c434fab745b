"""What one eager call of a layer costs the host, forward and backward, where nothing keeps the host waiting.

On a GPU the queue is empty when a sample begins and a sample is a few calls, so that it never fills. Without one the
Triton contenders run with a driver that launches nothing (``dry_driver.py``), in a process of its own, and their base
products, like the other contenders as a whole, are so small that arithmetic does not count. A row's ``how`` says which
it was.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

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
    expected_results,
    layer_error,
    layer_problem,
    outputs_of,
)
from bench.memory import triton_launches
from bench.steps import checked
from bench.timing import Samples, in_words, no_collection, rotating, timing_row
from goat_kernels.backends import get_backend

#: Calls one after the other, with fewer launches than fit a GPU's queue of 1024.
CALLS = 20

#: Where a call costs the host alone: the arithmetic takes well under a microsecond.
_SMALL = Case(T=2, N=16, M=16, R=8)

WITHOUT_PLANS = ", without plans"


def host_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Forward, backward and both of every contender; in bfloat16, whatever the settings say."""
    settings = dataclasses.replace(settings, dtype=torch.bfloat16)
    if settings.device.type == "cuda":
        rows = _rows(case, settings, dry=False)
    else:
        new_process = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, new_process, initializer=dry_driver.install) as pool:
            rows = pool.submit(_dry_rows, case, settings, torch.get_num_threads()).result()
    yield from ({**settings.dtypes(), **row} for row in rows)


def _dry_rows(case: Case, settings: BenchSettings, threads: int) -> list[dict]:
    """What the process without a GPU does; the dry driver is installed."""
    from goat_kernels.kernels.configs import KNOWN_TARGETS, forced_target

    torch.set_num_threads(threads)
    with forced_target(KNOWN_TARGETS[dry_driver.TARGET]):
        return list(_rows(case, settings, dry=True))


@dataclass(frozen=True)
class _Host:
    """A contender ready to be called: its name in results, where its calls run, with the Triton backend's plans or not.

    ``dry``: nothing is launched, and the base products are small ones.
    """

    name: str
    contender: Contender
    layer: nn.Module
    x: Tensor
    grad_y: Tensor
    how: str
    dry: bool
    plans: bool = True

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Entered for a sample."""
        with _small_products() if self.dry else nullcontext(), nullcontext() if self.plans else _without_plans():
            yield

    def sample_ms(self, calls: int) -> list[float]:
        """Medians of the forward, the backward and both, as the host issues them."""
        times, inputs = [], differentiated(self.layer, self.x)
        if self.x.device.type == "cuda":
            torch.cuda.synchronize(self.x.device)
        for _ in range(calls):
            start = time.perf_counter()
            outputs, gradients = outputs_of(self.layer, self.x, self.grad_y)
            middle = time.perf_counter()
            torch.autograd.grad(outputs, inputs, gradients)
            end = time.perf_counter()
            times.append((middle - start, end - middle, end - start))
        return [1e3 * statistics.median(of_mode) for of_mode in zip(*times, strict=True)]


def _small_products():
    """The product that accumulates onto the adapter's share, of 2 x 16 by 16 x 16: what it costs the host remains."""
    product, (onto, left, right) = torch.addmm, (torch.zeros(n, 16, dtype=torch.bfloat16) for n in (2, 2, 16))

    def addmm(*_: Tensor, out: Tensor) -> Tensor:
        product(onto, left, right, out=onto)
        return out

    return mock.patch.object(torch, "addmm", addmm)


def _without_plans():
    """Every call of the Triton backend chooses tiles, names arguments and looks kernels up anew."""
    passes = get_backend("triton")

    def call(function: Callable, *arguments: object, **options: object) -> object:
        return function(passes, *arguments, **options)

    return mock.patch.object(passes, "call", call)


def _rows(case: Case, settings: BenchSettings, *, dry: bool) -> Iterator[dict]:
    form, hosts = case.forms[-1], []
    names = (FROZEN, LORA, HALF_LORA, f"GOAT {form}, triton", f"GOAT {form}, torch")
    for contender in CONTENDERS:
        if contender.name not in names or contender.kind in settings.without:
            continue
        is_dry = dry and contender.backend == "triton"
        reason = None if is_dry else contender.skipped_reason(settings.device, settings.dtype)
        if reason is not None:
            yield {"contender": contender.name, "skipped": reason}
            continue
        try:
            hosts += _ready(contender, case, settings, is_dry=is_dry)
        except Exception as failure:  # whatever a peer or a driver raises is a result, and others follow
            yield {"contender": contender.name, "failed": in_words(failure)}
    yield from _timed_rows(hosts, settings)


def _ready(contender: Contender, case: Case, settings: BenchSettings, *, is_dry: bool) -> Iterator[_Host]:
    """The contender, checked where it computes anything; the Triton backend's without plans too."""
    is_small = not is_dry and settings.device.type == "cpu"
    p = layer_problem(_SMALL if is_small else case, settings.dtype, settings.device)
    layer, how = contender.make(p), "on the CPU at T=2 16->16 R=8" if is_small else "on the GPU, not waited for"
    if is_dry:
        how = "a driver that launches nothing; base products of 2 x 16 by 16 x 16"
    elif "failed" in (
        fields := checked(layer_error(layer, p, expected_results(contender.computes, p)), settings.dtype)
    ):
        raise RuntimeError(fields["failed"])
    host = _Host(contender.name, contender, layer, p.x_TN, p.grad_y_TM, how, is_dry)
    yield host
    if contender.backend == "triton":
        yield dataclasses.replace(host, name=contender.name + WITHOUT_PLANS, plans=False)


def _timed_rows(hosts: list[_Host], settings: BenchSettings) -> Iterator[dict]:
    """Every contender once a round, in an order that rotates."""
    calls = 2 if settings.quick else CALLS
    times: dict[str, list[list[float]]] = {host.name: [] for host in hosts}
    with no_collection():
        for round_, host in rotating(hosts, range(-3, settings.rounds)):  # three warm up
            with host.patched():
                sample = host.sample_ms(calls)
            if round_ >= 0:
                times[host.name].append(sample)
    for host in hosts:
        launches, ratios = {}, host.contender.ratios_to
        if host.contender.backend == "triton":
            with host.patched():
                launches["triton_launches"] = triton_launches(call_of("both", host.layer, host.x, host.grad_y))
        for index, mode in enumerate(TRAINING_MODES):
            of_mode = {name: Samples(calls, [one[index] for one in of_name]) for name, of_name in times.items()}
            row = {"contender": host.name, "mode": mode, "how": host.how, **timing_row(host.name, of_mode, ratios)}
            yield row | (launches if mode == "both" else {})
