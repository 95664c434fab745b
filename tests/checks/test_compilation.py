"""The compile gate: every kernel for GPUs that are not here, and that it notices what it is there to notice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from goat_kernels.checks import compilation
from goat_kernels.checks.compilation import Case, fault_of, layers, record
from goat_kernels.checks.problem import LayerCase
from goat_kernels.kernels.configs import KNOWN_TARGETS

ROOT = Path(__file__).parents[2]

KERNELS = {
    "pack_adapter",
    "fused_forward",
    "finish_balance",
    "project",
    "dropped_hidden",
    "route_and_prefill",
    "fused_hidden_gradient",
    "finish_hidden_gradient",
    "weight_gradient",
    "add_splits",
    "expand_columns",
}


@pytest.mark.long
def test_every_kernel_compiles_for_every_target_without_a_fault(tmp_path):
    command = [sys.executable, "-m", "goat_kernels", "check", "--compile", "--json", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, [line for line in done.stdout.splitlines() if "FAIL" in line]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["target"] for row in rows} == set(KNOWN_TARGETS)
    for target, limits in KNOWN_TARGETS.items():
        of_target = [row for row in rows if row["target"] == target]
        assert {row["kernel"] for row in of_target} == KERNELS
        assert {row["R"] for row in of_target} >= {8, 16, 32, 128, 512}
        assert all(row["registers"] > 0 and row["spilled_bytes"] == 0 for row in of_target)
        assert all(row["shared_bytes"] <= limits.shared_bytes for row in of_target)
    found = {target: {row["matrix_instruction"] for row in rows if row["target"] == target} for target in KNOWN_TARGETS}
    assert "wgmma.mma_async" in found["sm_90"]
    assert "tcgen05.mma" in found["sm_100"]
    assert "mma.sync" in found["sm_80"]
    assert "v_mfma" in found["gfx942"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ((8, 1000, 1000, True), ["spills", "8 bytes"]),
        ((0, 1001, 1000, True), ["1001", "1000", "shared memory"]),
        ((0, 1000, 1000, False), ["matrix instructions"]),
    ],
    ids=["spill", "shared memory", "no matrix instruction"],
)
def test_a_fault_is_named(found, words):
    assert fault_of(0, 1000, 1000, True) is None
    assert all(word in fault_of(*found) for word in words)


def compiling(code: str) -> str:
    """What ``code`` prints in a process in which Triton compiles; these tests' own interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


IMPORTS = """
import torch, triton
from triton.backends.compiler import GPUTarget
from goat_kernels.checks.compilation import Case, compile_case, record, source_of
from goat_kernels.checks.problem import LayerCase
from goat_kernels.kernels.configs import forced_tile
from goat_kernels.kernels.tiles import Tile
"""


@pytest.mark.long
def test_a_tile_that_spills_is_noticed():
    code = """
layer = LayerCase(8192, 4096, 4096, R=128)
with forced_tile("expand_columns", Tile(128, 128, 4, 2, 64)):
    names = [launch.name for launch in record(layer, "sm_80")]
    print(compile_case(Case("sm_80", layer, names.index("expand_columns")))["fault"])
"""
    assert compiling(IMPORTS + code).startswith("spills")


@pytest.mark.long
def test_arguments_are_specialised_as_triton_would():
    code = """
layer = LayerCase(64, 48, 50, R=8, path=False, dtype=torch.float16)
launch = next(launch for launch in record(layer, "sm_90") if launch.name == "project")
source = source_of(launch)
aligned = [name for index, name in enumerate(launch.kernel.arg_names) if (index,) in source.attrs]
print(*(source.signature[name] for name in ("x_ptr", "W1_ptr", "stride_xn")), "N" in aligned, "T" in aligned)
"""
    # Few tokens read the float32 adapter as it is; a stride of 1 is a constant; 48 is a multiple of 16, and T = 64 too,
    # but T changes from batch to batch and is not specialised.
    assert compiling(IMPORTS + code).split() == ["*fp16", "*fp32", "constexpr", "True", "False"]


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[str, str]]:
    """Kernel -> what the compiler makes of it for sm_90, by the name of the form, with the constants."""
    code = """
import json
texts = {}
for layer, names in (
    (LayerCase(16384, 256, 256, R=8), ("fused_forward", "finish_balance")),
    (LayerCase(16, 4096, 4096, R=32, path=False), ("project", "route_and_prefill", "finish_hidden_gradient")),
):
    launches = {launch.name: launch for launch in reversed(record(layer, "sm_90"))}  # the first of each name
    for name in names:
        tile, source = launches[name].tile, source_of(launches[name])
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
        texts[name] = {"ttgir": asm["ttgir"], "ptx": asm["ptx"], "constants": launches[name].constants}
print(json.dumps(texts))
"""
    return json.loads(compiling(IMPORTS + code))


@pytest.mark.long
def test_shares_of_tokens_and_gates_are_divided_exactly(texts):
    """A GPU's plain division is up to two units in the last place off, which no interpreter shows."""
    exact = {name: text["ptx"].count("div.rn.f32") for name, text in texts.items()}
    plain = {name: text["ptx"].count("div.full.f32") for name, text in texts.items()}
    assert exact["finish_balance"] and not plain["finish_balance"]
    # Of a forward's divisions, those of the probabilities over all experts may be plain: they are exponentials.
    for name in ("fused_forward", "route_and_prefill"):
        assert exact[name] and plain[name]


def test_loads_of_many_splits_do_not_wait_for_their_additions(texts):
    """With each load behind the addition before it, 32 splits would be 32 round trips through memory."""
    # The router's high and low part and the hidden columns; the hidden columns alone. One copy of each is in the loop.
    for name, kinds in (("route_and_prefill", 3), ("finish_hidden_gradient", 1)):
        stages = texts[name]["constants"]["SPLIT_STAGES"]
        assert stages == 8
        assert texts[name]["ttgir"].count("ttg.async_copy_global_to_local") == kinds * stages


def test_the_routers_products_start_anew_at_each_block(texts):
    """What matrix units cut off adds up along a chain; Triton would make one of a product and its addition."""
    for name in ("fused_forward", "project"):
        products = re.findall(r"(?:tt\.dot|warp_group_dot) (.*maxNumImpreciseAcc.*)", texts[name]["ttgir"])
        assert products, name
        for operands in products:
            assert re.match(r"%[^,]+, %[^,]+, %cst", operands), operands


@pytest.mark.parametrize("target", KNOWN_TARGETS)
@pytest.mark.parametrize("N", [4096, 14336])
def test_few_tokens_take_at_most_32_splits_and_a_token_the_same_whatever_their_number(N, target):
    of_rows: dict[int, set] = {}
    for T in range(1, 65):
        layer = LayerCase(T, N, 4096, R=32)
        (project, route) = (launch for launch in record(layer, target)[:2])
        assert (project.name, route.name) == ("project", "route_and_prefill")
        assert project.grid[2] == route.arguments["splits"] <= 32
        of_rows.setdefault(project.tile.rows, set()).add((project.arguments["split_steps"], project.tile, route.tile))
    assert all(len(ways) == 1 for ways in of_rows.values())


def test_all_covers_the_ranks_of_the_short_list():
    assert {layer.R for layer in layers(everything=True)} >= {8, 32, 128, 512}


def test_a_case_names_one_launch():
    case = Case("sm_90", LayerCase(8192, 256, 256), 1)
    assert record(case.layer, case.target)[case.index].name == "fused_forward"


def _crashing(case: str) -> dict:
    if case == "crashes":
        os._exit(1)
    return {"kernel": case}


def test_a_crash_of_the_compiler_is_told_of_the_kernel_that_crashed_it(monkeypatch):
    monkeypatch.setattr(compilation, "compile_case", _crashing)
    found = dict(compilation.compile_all(["first", "crashes", "second", "third"]))
    assert str(found.pop("crashes")) == "the compiler crashed"
    assert found == {name: {"kernel": name} for name in ("first", "second", "third")}
