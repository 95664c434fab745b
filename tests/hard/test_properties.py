"""Whatever the layer, both backends compute the float64 oracle's output, balance loss and gradients.

Hypothesis draws the layers (``drawn_layers.py``); GOAT_KERNELS_TESTS=long draws many and new ones.
"""

from __future__ import annotations

import pytest
import torch
from drawn_layers import assert_within_the_table, layers, many, oracle_of, run, scales_of
from hypothesis import given

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter


def check(layer, device) -> None:
    outcome, selection = run(layer, device)
    assert bool((selection.sum(dim=1) == layer.problem.top_k).all())
    assert_within_the_table(layer, outcome, oracle_of(layer, selection), scales_of(layer, selection))


@many
@given(layer=layers("torch"))
def test_any_layer_on_the_torch_backend_equals_the_oracle(layer):
    check(layer, torch.device("cpu"))


@pytest.mark.long
@given(layer=layers("triton"))
def test_any_layer_on_the_triton_backend_equals_the_oracle(layer, device):
    check(layer, device)
