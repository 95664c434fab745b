"""Every kernel moves exactly the bytes that its tiles imply, and a layer goes through x, y, dY and dX as designed.

Counted in Triton's interpreter (``goat_kernels/checks/traffic.py``), in which a small layer on an imitated GPU takes
the kernels and tiles that a large one takes on a real one.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from goat_kernels.checks import traffic, traffic_formulas
from goat_kernels.checks.problem import LayerCase
from goat_kernels.checks.traffic import CASES, REAL_CASES, count, count_layer, plan_layer, stream_passes
from goat_kernels.kernels.common import INTERPRETED
from goat_kernels.kernels.configs import Tile
from goat_kernels.kernels.launch import Launch

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in Triton's interpreter")

FUSED = CASES[0].layer


@pytest.fixture(scope="module")
def counted():
    """Case -> what its launches moved, counted once."""
    rows = {}

    def of(case):
        if case.name not in rows:
            rows[case.name] = count_layer(case.layer)
        return rows[case.name]

    return of


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_launch_moves_what_its_tiles_imply(case, counted):
    rows = counted(case)
    assert not [row for row in rows if not row.passed]
    assert not [row for row in rows if row.what == "outside"]
    assert not [row for row in stream_passes(case, rows) if not row.passed]


def test_the_cases_reach_every_kernel_and_the_splits_of_both_kinds(counted):
    rows = [row for case in CASES for row in counted(case)]
    assert {row.kernel for row in rows} == set(traffic_formulas.FORMULAS)
    gradients = [row for row in rows if (row.kernel, row.what) == ("weight_gradient", "gradient")]
    assert {row.times for row in gradients} > {1.0}, "no case splits T in a weight gradient"


def test_the_tallest_tiles_by_hand(counted):
    """The bytes of the first case written out: T = 128 in two blocks of 64 rows, bfloat16, float32 adapters packed."""
    layer = FUSED
    R0, blocks = layer.R, 2
    into = (layer.R + 2 * layer.E + R0) * layer.N  # lora_A, the router's two parts, A0
    out_of = (layer.R + R0) * layer.M
    x, y = 2 * layer.T * layer.N, 2 * layer.T * layer.M
    of_gradient_x = (layer.R + layer.E + R0) * layer.N
    expected = {
        ("fused_forward", "x"): (x, 0),
        ("fused_forward", "adapter"): (2 * blocks * (into + out_of), 0),
        ("fused_forward", "y"): (0, y),
        ("fused_hidden_gradient", "dY"): (y, 0),
        ("fused_hidden_gradient", "adapter"): (2 * blocks * out_of, 0),
        ("weight_gradient", "dY"): (y, 0),
        ("expand_columns", "adapter"): (2 * blocks * of_gradient_x, 0),
        ("expand_columns", "dX"): (0, x),
        ("weight_gradient", "x"): (x, 0),
    }
    found = {(row.kernel, row.what): (row.read_bytes, row.written_bytes) for row in counted(CASES[0])}
    assert {key: found[key] for key in expected} == expected


def test_unaligned_layers_move_no_byte_more(counted):
    case = next(case for case in CASES if "unaligned" in case.name)
    layer = case.layer
    for row in counted(case):
        if row.what in ("x", "dX"):
            assert row.moved_bytes == 2 * layer.T * layer.N
        if row.what in ("dY", "y"):
            assert row.moved_bytes == 2 * layer.T * layer.M


def test_a_plan_needs_no_run():
    """The tables of real sizes come from plans on tensors without values."""
    assert [dataclasses.replace(row, launch_bytes=0) for row in plan_layer(FUSED)] == [
        dataclasses.replace(row, launch_bytes=0) for row in count_layer(FUSED) if row.planned is not None
    ]
    for layer in REAL_CASES[:2]:
        streams = stream_passes(traffic.TrafficCase("", layer), plan_layer(layer))
        assert all(row.passed for row in streams), "4096 x 4096 at R = 32 runs fused on an H200"


# --- the check can fail -------------------------------------------------------------------------------------------


def run_twice(launch):
    launch.run()
    launch.run()


def with_a_second_grid(launch):
    """Programs beyond T: what they load of x is masked off, what they load of the adapter is not."""
    dataclasses.replace(launch, grid=(2 * launch.grid[0], *launch.grid[1:])).run()


def test_a_second_read_is_noticed():
    case = CASES[0]
    rows = count_layer(case.layer, run=run_twice)
    assert not any(row.passed for row in rows if row.planned is not None)
    assert [(row.what, row.times) for row in stream_passes(case, rows)] == [
        ("x", 2.0),
        ("y", 2.0),
        ("dY", 4.0),
        ("dX", 2.0),
        ("x", 2.0),
    ]
    assert not any(row.passed for row in stream_passes(case, rows))


def test_programs_without_tokens_are_noticed():
    def run(launch):
        (with_a_second_grid if launch.name == "fused_hidden_gradient" else Launch.run)(launch)

    failed = {(row.kernel, row.what) for row in count_layer(FUSED, run=run) if not row.passed}
    assert ("fused_hidden_gradient", "adapter") in failed
    assert ("fused_hidden_gradient", "dY") not in failed
    assert {kernel for kernel, _ in failed} == {"fused_hidden_gradient"}


@triton.jit
def copy(x_ptr, y_ptr, T, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    tl.store(y_ptr + row, tl.load(x_ptr + row, mask=row < T, other=0.0))


def launch_of_copy(x, y, T):
    return Launch(copy, (1,), {"x_ptr": x, "y_ptr": y, "T": T}, {"BLOCK": 32}, Tile(32, 32, 1, 1))


def test_what_is_outside_of_every_argument_is_counted_apart(monkeypatch):
    monkeypatch.setitem(traffic_formulas.FORMULAS, "copy", (lambda v: {"in": (v.T * v.x_bytes, 0)}, {}))
    x, y = torch.zeros(64)[:20], torch.zeros(32)
    assert count(launch_of_copy(x, y, 20)) == {"in": (80, 0), "out": (0, 128)}
    assert count(launch_of_copy(x, y, 25)) == {"in": (80, 0), "out": (0, 128), "outside": (20, 0)}


def test_a_kernel_without_a_plan_is_an_error():
    with pytest.raises(KeyError, match="copy"):
        count(launch_of_copy(torch.zeros(32), torch.zeros(32), 32))


def test_the_interpreter_is_left_as_it_was():
    builder = triton.runtime.interpreter.InterpreterBuilder
    before = builder.create_masked_load, builder.create_masked_store
    with pytest.raises(ZeroDivisionError):
        count_layer(LayerCase(T=80, N=16, M=16, target=FUSED.target), run=lambda launch: 1 / 0)
    assert (builder.create_masked_load, builder.create_masked_store) == before
