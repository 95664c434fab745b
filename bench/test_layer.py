"""pytest-benchmark over the contenders of ``bench.layer``: ``pytest bench --benchmark-enable``.

A quick look at one small shape. The README's figures come from ``python -m bench.layer``, whose rounds are interleaved.
Without ``--benchmark-enable`` each contender runs once, which checks GOAT against the oracle and times nothing.
"""

from __future__ import annotations

import pytest

from bench.layer import make_contenders

SHAPE = (256, 128, 192, 16)  # T, N, M, R


@pytest.fixture(scope="module")
def contenders():
    return make_contenders(*SHAPE)


@pytest.mark.parametrize("name", ["frozen linear", "PEFT LoRA", "GOAT fold", "GOAT path", "expert loop"])
def test_forward_and_backward(benchmark, contenders, name):
    benchmark.group = "T, N, M, R = {}, {}, {}, {}".format(*SHAPE)
    benchmark(contenders[name])
