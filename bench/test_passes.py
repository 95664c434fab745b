"""pytest-benchmark over each pass alone, at a small size: ``pytest bench --benchmark-enable``.

Without ``--benchmark-enable`` each pass runs once, which shows that it runs; nothing here asserts a time. Figures for
the README come from ``goat-kernels bench``, whose rounds are interleaved.
"""

from __future__ import annotations

import pytest
import torch

from goat_kernels.backends import get_backend, why_not_auto
from goat_kernels.benchmarking.passes import CHECKED_BY, base_calls, pass_calls
from goat_kernels.checks.problem import LayerCase, make_problem

pytest.importorskip("pytest_benchmark")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
SIZES = {"T": 4096, "N": 1024, "M": 1024} if GPU else {"T": 256, "N": 128, "M": 192, "R": 16}
BACKENDS = [name for name in ("torch", "triton") if why_not_auto(name, DEVICE, DTYPE) is None]


def _synchronised(call):
    def run():
        call()
        if GPU:
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("name", CHECKED_BY)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", [False, True], ids=["fold", "path"])
def test_pass(benchmark, backend, path, name):
    calls = pass_calls(get_backend(backend), make_problem(LayerCase(**SIZES, dtype=DTYPE, path=path), DEVICE))
    benchmark.group = f"{name}, {'path' if path else 'fold'}"
    benchmark(_synchronised(calls[name]))


@pytest.mark.parametrize("name", base_calls(make_problem(LayerCase(T=1, N=1, M=1), "meta")))
def test_base_product(benchmark, name):
    calls = base_calls(make_problem(LayerCase(**SIZES, dtype=DTYPE, path=False), DEVICE))
    benchmark.group = "base products"
    benchmark(_synchronised(calls[name]))
