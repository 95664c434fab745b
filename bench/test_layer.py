"""pytest-benchmark over the layer's contenders, at a small size: ``pytest bench --benchmark-enable``.

Without ``--benchmark-enable`` each contender runs once, after it has been compared with float64, and nothing is timed.
Figures for the README come from ``goat-kernels bench``, whose rounds are interleaved.
"""

from __future__ import annotations

import pytest
import torch

from goat_kernels.benchmarking.cases import TRAINING_MODES, Case
from goat_kernels.benchmarking.layers import CONTENDERS, LayerTensors, error_bound, expected_results, layer_error
from goat_kernels.benchmarking.steps import call_of

pytest.importorskip("pytest_benchmark")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
CASE = Case(4096, 1024, 1024, 32) if GPU else Case(256, 128, 192, 16)
EAGER = [
    contender
    for contender in CONTENDERS
    if not contender.graph and contender.kind != "compiled" and contender.skipped_reason(DEVICE, DTYPE) is None
]


@pytest.fixture(scope="module")
def tensors() -> LayerTensors:
    return LayerTensors.draw(CASE, DTYPE, DEVICE)


@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize("contender", EAGER, ids=lambda contender: contender.name)
def test_layer(benchmark, tensors, contender, mode):
    layer = contender.make(tensors)
    assert layer_error(layer, tensors, expected_results(contender.computes, tensors)) <= error_bound(DTYPE)
    call = call_of(mode, layer, tensors.x_TN, tensors.grad_y_TM)
    benchmark.group = f"{mode}, {CASE}"

    def run() -> None:
        call()
        if GPU:
            torch.cuda.synchronize()

    benchmark(run)
