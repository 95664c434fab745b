"""pytest-benchmark over each pass, the base products and whole layers: ``pytest bench --benchmark-enable``.

Without ``--benchmark-enable`` each runs once, which shows that it runs; nothing here asserts a time. Figures for the
README come from ``goat-kernels bench``, whose rounds are interleaved.
"""

from __future__ import annotations

import pytest
import torch

from bench.layers import call_of, goat_layer
from bench.passes import PASSES, base_calls, pass_calls
from goat_kernels.backends import why_not_auto
from goat_kernels.checks.problem import LayerCase, make_problem

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
SIZES = {"T": 4096, "N": 1024, "M": 1024} if GPU else {"T": 256, "N": 128, "M": 192, "R": 16}
BACKENDS = [name for name in ("torch", "triton") if why_not_auto(name, DEVICE, DTYPE) is None]


def problem(form: str):
    return make_problem(LayerCase(**SIZES, dtype=DTYPE, path=form == "path"), DEVICE)


def timed(benchmark, call, group: str) -> None:
    benchmark.group = group
    benchmark(lambda: (call(), torch.cuda.synchronize() if GPU else None))


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["fold", "path"])
def test_pass(benchmark, form, backend, name):
    timed(benchmark, pass_calls(backend, problem(form))[name], f"{name}, {form}")


@pytest.mark.parametrize("name", base_calls(make_problem(LayerCase(T=1, N=1, M=1), "meta")))
def test_base_product(benchmark, name):
    timed(benchmark, base_calls(problem("fold"))[name], "base products")


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["fold", "path"])
def test_layer(benchmark, form, backend, mode):
    p = problem("path")  # which goat_layer folds
    p.x_TN.requires_grad_()
    timed(benchmark, call_of(mode, goat_layer(p, form, backend), p.x_TN, p.grad_y_TM), f"layer, {mode}")
