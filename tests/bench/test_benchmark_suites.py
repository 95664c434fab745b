"""The suites of the benchmarks, their results, and what follows from these: comparisons, tables, figures, documents.

Nothing here asserts how long anything takes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_cases import CPU, SMALL, quick

from bench import machine, memory, models, passes, plots, report, results, suites, tables, tuning
from bench.cases import KERNELS, LAYERS, MEMORY, SCALING
from bench.layers import FROZEN, HALF_LORA, LORA, layer_rows
from goat_kernels.checks.problem import LayerCase, make_problem
from goat_kernels.cli import bench, main
from goat_kernels.linear import GoatLinear
from goat_kernels.numerics import TOLERANCES

ROOT = Path(__file__).parents[2]


# --- suites and results ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_standard_cases(device):
    assert all(case.R % case.E == 0 and case.K <= case.E for case in (*LAYERS[device], *SCALING[device]))
    assert {case.varied for case in SCALING[device]} == set("TNREK")
    assert KERNELS[device]
    of_memory = tuple(case for case in LAYERS[device] if "both" in case.modes and not case.dropout_p)
    assert of_memory == MEMORY[device]


def test_the_shapes_with_a_target_are_measured_in_both_forms_and_with_dropout():
    targets = [(8192, 4096, 4096, 32), (8192, 4096, 4096, 8), (8192, 4096, 11008, 32), (8192, 11008, 4096, 32)]
    targets += [(8192, 5120, 13824, 128), (8192, 13824, 5120, 128), (16384, 8192, 8192, 64)]
    targets += [(3200, 768, 768, 8), (3200, 768, 3072, 8)]
    cases = LAYERS["cuda"]
    assert all(case.forms == ("fold", "path") for case in cases)
    of_mode = {
        (mode, dropout): [(c.T, c.N, c.M, c.R) for c in cases if mode in c.modes and c.dropout_p == dropout]
        for mode, dropout in (("both", 0.0), ("both", 0.05), ("inference", 0.0))
    }
    assert of_mode["both", 0.0] == of_mode["both", 0.05] == targets
    assert of_mode["inference", 0.0] == [(T, 4096, 4096, 32) for T in (1, 16, 64)]


def test_a_case_with_dropout_times_what_drops_and_nothing_else():
    case = dataclasses.replace(SMALL, modes=("both",), dropout_p=0.25)
    rows = {row["contender"]: row for row in layer_rows(case, quick(dtype=torch.bfloat16))}
    timed = {name for name, row in rows.items() if "time_ms_p50" in row}
    assert timed == {FROZEN, LORA, HALF_LORA, "GOAT fold, torch", "GOAT path, torch"}
    table = tables.layer_tables([{**case.row(), **row} for row in rows.values()])
    assert table.startswith("Forward and backward with dropout")


def test_launches_of_our_kernels_are_counted(device):
    layer = GoatLinear(32, 40, r=16, num_experts=8, top_k=2, init="lora", backend="triton", device=device)
    assert memory.triton_launches(lambda: layer(torch.randn(1, 32, device=device))) == 2


@pytest.mark.long
def test_the_hosts_time_is_that_of_calls_that_compute_what_they_should(quick_run):
    rows = [row for row in results.read_rows(quick_run) if row["suite"] == "host"]
    names = {row["contender"] for row in rows if "time_ms_p50" in row}
    assert {FROZEN, LORA, "GOAT path, torch", "GOAT path, triton", "GOAT path, triton, without plans"} <= names
    for name in names:
        times = {row["mode"]: row["time_ms_p50"] for row in rows if row["contender"] == name}
        assert times["both"] > max(times["forward"], times["backward"]) > 0
    both = {row["contender"]: row for row in rows if row.get("mode") == "both"}
    assert both["GOAT path, triton"]["triton_launches"] == both["GOAT path, triton, without plans"]["triton_launches"]
    if not torch.cuda.is_available():
        assert "launches nothing" in both["GOAT path, triton"]["how"] and "T=2" in both[LORA]["how"]


def test_the_dry_driver_comes_before_the_kernels():
    code = (
        "import goat_kernels.kernels.launch\nfrom bench import dry_driver\n"
        "try:\n    dry_driver.install()\nexcept RuntimeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "before the kernels are imported" in done.stdout, done.stderr


def test_kernels_are_compiled_ahead_for_either_kind_of_scaling():
    problems = list(suites.problems_of([SMALL], torch.bfloat16))
    kinds = [(p.adapter.residual_rank, p.adapter.scaling_E is None) for p in problems]
    assert kinds == [(0, True), (SMALL.R, False), (SMALL.R, True)]
    assert all(p.x_TN.is_meta and p.adapter.lora_A.is_meta for p in problems)


def test_a_router_in_half_precision_is_too_far_off(device):
    problem = make_problem(LayerCase(66, 40, 72, R=16, dtype=torch.float16), device)
    results = passes.pass_calls("torch", problem)["prefill"]()
    expected, bound = passes.expected_of(problem)["prefill"], TOLERANCES[torch.float16].relative
    assert passes.results_error(results, expected, problem) <= bound
    results[2].gate_ET.copy_(results[2].gate_ET.half())
    assert not passes.results_error(results, expected, problem) <= bound


@pytest.mark.parametrize("path", [False, True], ids=["fold", "path"])
def test_a_pass_is_compared_with_float64_result_by_result(backend, path, device):
    problem = make_problem(LayerCase(66, 40, 72, R=16, path=path, dtype=torch.float16), device)
    expected, bound = passes.expected_of(problem), TOLERANCES[torch.float16].relative
    for name, call in passes.pass_calls(backend, problem).items():
        results = call()
        assert passes.results_error(results, expected[name], problem) <= bound
        for part in passes.parts_of(results, problem):
            kept = part.clone()
            part *= 1 + 2 * bound
            assert not passes.results_error(results, expected[name], problem) <= bound
            part.copy_(kept)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a test of its own runs the suite on a GPU")
def test_neighbours_of_a_tile_are_checked_and_timed_beside_it(monkeypatch):
    layer = LayerCase(40, 32, 24, R=16, path=False, dtype=torch.float32)
    choices = {choice.kernel: choice for choice in tuning.choices_of(layer, CPU)}
    assert {"weight_gradient", "expand_columns"} <= set(choices)
    table, *around = tuning.neighbours(choices["expand_columns"])
    assert table not in around and len(around) > 4
    monkeypatch.setattr(tuning, "choices_of", lambda *_: [choices["expand_columns"]])
    monkeypatch.setattr(tuning, "neighbours", lambda choice: [table, around[0]])
    rows = list(tuning.tile_rows(layer, CPU, time_ms=lambda launch: float(launch.tile.features + launch.tile.rows)))
    assert [(row["pass"], row["is_in_table"]) for row in rows] == [("expand_columns", True), ("expand_columns", False)]
    assert rows[1]["contender"] == tuning.words_of(around[0])
    assert rows[0]["ratio_p50"] == 1 and rows[1]["ratio_p50"] == rows[1]["time_ms_p50"] / rows[0]["time_ms_p50"]
    monkeypatch.setattr(tuning, "results_error", lambda *_: math.nan)
    assert all("not timed" in row["failed"] for row in tuning.tile_rows(layer, CPU, time_ms=lambda launch: 1.0))


def test_the_layers_of_a_model_are_those_that_are_compiled_ahead():
    llama, vit = models.MODELS["cuda"]
    assert {(c.T, c.R) for c in llama.layers()} == {(8192, 32)}
    assert {(c.T, c.N, c.M) for c in vit.layers()} == {
        (3200, 768, 768), (3200, 768, 3072), (3200, 3072, 768),
    }  # fmt: skip


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> Path:
    """Every suite at tiny sizes, by the command."""
    path = tmp_path_factory.mktemp("results") / "run.jsonl"
    code = main(["bench", "--suite", "all", "--quick", "--without", "compiled", "--output", str(path)])
    assert code == 0
    return path


def test_rows_say_what_was_measured_on_what(quick_run):
    rows = results.read_rows(quick_run)
    assert {row["suite"] for row in rows} == set(suites.SUITES)
    needed = {"date", "commit", "device", "gpu", "cpu", "driver", "threads", "versions", "cases", "contender"}
    for row in rows:
        assert needed <= set(row)
        assert bool({"time_ms_p50", "peak_mib"} & set(row)) != ("skipped" in row)
        assert row["cases"] == "quick"
    text = quick_run.read_text()
    assert str(ROOT) not in text and str(Path.home()) not in text
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text


def test_what_cannot_run_is_skipped_with_a_reason_once(quick_run):
    skipped = [row for row in results.read_rows(quick_run) if "skipped" in row and row["suite"] == "layer"]
    reasons = {row["contender"]: row["skipped"] for row in skipped}
    assert len(skipped) == len(reasons)
    if not torch.cuda.is_available():
        assert "GPU" in reasons["GOAT path, triton"] and "GPU" in reasons["GOAT path, triton, CUDA graph"]


def test_every_suite_makes_a_table_and_a_figure(quick_run):
    rows = results.read_rows(quick_run)
    for name in suites.SUITES:
        of_suite = [row for row in rows if row["suite"] == name]
        text = suites.SUITES[name].table(of_suite)
        assert text.count("|") > 10 and "nan" not in text
        if name == "scaling":
            assert plots.png(plots.scaling, of_suite).startswith(b"\x89PNG")


def test_a_compiled_layer_is_timed_like_the_others():
    case = dataclasses.replace(SMALL, forms=("fold",), modes=("backward", "both"))
    settings = quick(without=frozenset({"lora", "loop", "triton", "graph"}))
    rows = [row for row in layer_rows(case, settings) if "compiled" in row["contender"]]
    assert [row["mode"] for row in rows if "time_ms_p50" in row] == ["both"]


def _suite(cases, rows) -> suites.Suite:
    return suites.Suite("", tables.layer_tables, rows, {"quick": cases})


def test_a_run_that_stopped_goes_on_with_the_case_that_it_was_in(monkeypatch):
    cases = [dataclasses.replace(SMALL, R=R) for R in (8, 16, 24)]
    ran = []

    def rows(case, settings):
        ran.append(case.R)
        yield {**case.row(), **settings.dtypes(), "contender": "x", "time_ms_p50": 1.0}

    monkeypatch.setitem(suites.SUITES, "layer", _suite(cases, rows))
    before = list(suites.suite_rows("layer", quick()))
    list(suites.suite_rows("layer", quick(), before[:2]))
    assert ran == [8, 16, 24, 16, 24]  # the last case of a run that stopped may be a part
    ran.clear()
    list(suites.suite_rows("layer", quick(dtype=torch.bfloat16), before))
    other_code = [{**row, "commit": "another"} for row in before]
    list(suites.suite_rows("layer", quick(), other_code))
    assert ran == 2 * [8, 16, 24]


def test_a_case_that_raises_is_a_row_and_the_next_one_runs(monkeypatch):
    def rows(case, settings):
        if case.R == 8:
            raise RuntimeError("out of memory")
        yield {**case.row(), "contender": "x", "time_ms_p50": 1.0}

    cases = [dataclasses.replace(SMALL, R=R) for R in (8, 16)]
    monkeypatch.setitem(suites.SUITES, "layer", _suite(cases, rows))
    reported = list(suites.suite_rows("layer", quick()))
    assert [(row["R"], "failed" in row) for row in reported] == [(8, True), (16, False)]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_results_of_a_run_do_not_make_its_checkout_dirty(tmp_path, monkeypatch):
    def git(*command: str) -> None:
        identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com")
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True)

    module = tmp_path / "package" / "machine.py"
    module.parent.mkdir()
    module.write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr(machine, "__file__", str(module))
    results.append(tmp_path / results.RESULTS_FOLDER / "run.jsonl", {"suite": "layer"})
    assert machine.commit()["commit_is_dirty"] is False and len(machine.commit()["commit"]) == 12
    module.write_text("2\n")
    assert machine.commit()["commit_is_dirty"] is True
    monkeypatch.setattr(machine, "__file__", str(tmp_path.parent / "elsewhere.py"))
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc")
    assert machine.commit() == {"commit": "abc", "commit_is_dirty": None}


def test_a_line_that_an_interrupted_run_left_is_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"suite": "layer", "R": 1}\n{"suite": "la')
    with pytest.warns(UserWarning, match="line 2"):
        assert [row["R"] for row in results.read_rows(path)] == [1]
    with pytest.warns(UserWarning, match="removed"):
        results.append(path, {"suite": "layer", "R": 2})
    assert [row["R"] for row in results.read_rows(path)] == [1, 2]


def test_numbers_are_rounded_and_not_a_number_is_null(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    results.append(path, {"suite": "layer", "time_ms_p50": 1.23456789, "versions": {"torch": "2"}, "losses": [1 / 3]})
    results.append(path, {"suite": "layer", "time_ms_p50": math.nan})
    first, second = results.read_rows(path)
    assert first["time_ms_p50"] == 1.23457 and first["losses"] == [0.333333] and second["time_ms_p50"] is None


def test_the_newest_standard_run_counts():
    row = {"suite": "layer", "device": "cpu", "cases": "standard", "date": "2026-01-01"}
    later, custom = {**row, "date": "2026-02-01"}, {**row, "date": "2026-03-01", "cases": "custom"}
    other = {**row, "date": "2026-04-01", "device": "cuda"}
    assert results.newest([row, later, custom, other], "layer", "cpu") == [later]
    assert results.newest([row], "kernels", "cpu") == []


# --- the report -----------------------------------------------------------------------------------------------------


def test_tables_and_figures_are_those_of_the_results():
    stale = [str(path) for path in report.out_of_date(ROOT)]
    assert not stale, f"out of date: {stale}; run goat-kernels bench --report"


@pytest.fixture
def checkout(tmp_path, quick_run) -> Path:
    """A checkout with one run, which says that its cases are the standard ones."""
    (tmp_path / "docs").mkdir()
    for path in report.PAGES:
        shutil.copy(ROOT / path, tmp_path / path)
    for row in results.read_rows(quick_run):
        results.append(tmp_path / results.RESULTS_FOLDER / "run.jsonl", {**row, "cases": "standard"})
    return tmp_path


def test_a_section_is_there_where_there_are_results_and_nothing_elsewhere(checkout):
    pages = report.pages(checkout)
    page = pages[Path("docs/benchmarks.md")]
    assert "### Host time\n" in page and "### Tiles near" not in page
    assert page.endswith("<!-- bench:sections cuda -->\n<!-- /bench -->\n") and "On a GPU\n" not in page
    path = checkout / results.RESULTS_FOLDER / "run.jsonl"
    for row in results.read_rows(path):
        if row["suite"] == "scaling":
            results.append(path, {**row, "device": "cuda", "gpu": "a GPU", "driver": "1", "cuda": "1"})
    page = report.pages(checkout)[Path("docs/benchmarks.md")]
    assert "## On a GPU\n\n### As one size grows on a GPU\n" in page and "bench-scaling-gpu.png" in page


def test_new_results_make_documents_and_figures_out_of_date(checkout):
    report.write(checkout)
    folder = checkout / results.RESULTS_FOLDER
    rows = [
        row for row in results.read_rows(folder / "run.jsonl") if row["suite"] == "scaling" and "time_ms_p50" in row
    ]
    for row in rows:
        results.append(folder / "later.jsonl", {**row, "date": "2999-01-01T00:00:00+00:00", "time_ms_p50": 123.0})
    assert set(report.out_of_date(checkout)) == {
        Path("docs/benchmarks.md"),
        Path("docs/figures/bench-scaling-cpu.png"),
    }


# --- bad options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--shape", "1,2,3"], ["--shape", "'1,2,3'", "T,N,M,R"]),
        (["--shape", "8,8,8,x"], ["--shape", "T,N,M,R"]),
        (["--shape", "0,8,8,8"], ["--shape", "at least 1"]),
        (["--shape", "8,8,8,12"], ["--shape", "multiple of 8"]),
        (["--shape", "8,8,8,8", "--suite", "model"], ["--shape", "model"]),
        (["--shape", "8,8,8,8", "--quick"], ["--shape", "--quick"]),
        (["--resume"], ["--resume", "--output"]),
        (["--suite", "speed"], ["--suite", "'speed'", "kernels"]),
        (["--without", "everything"], ["--without", "'everything'"]),
        (["--rounds", "0"], ["--rounds", "0"]),
        (["--output", "."], ["--output", "file"]),
        pytest.param(
            ["--device", "cuda"],
            ["--device", "GPU"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=" ".join,
)
def test_bad_options_are_named(options, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in named), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", [["bench", "--suite", "layer"], ["bench", "--help"], ["tune", "--r", "8"]], ids=" ".join
)
def test_without_a_checkout_the_command_says_what_to_do(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "_ROOT", tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "clone" in error and "pip install -e" in error


def test_the_help_is_that_of_the_checkout(capsys):
    for name, option in (("bench", "--resume"), ("tune", "--candidates")):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert option in capsys.readouterr().out


def test_a_file_that_holds_no_results_is_named(tmp_path, capsys, monkeypatch):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"suite": "layer"}\nnotes\n')
    assert main(["bench", "--quick", "--output", str(path), "--resume"]) == 2
    assert "line 2" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--report"]) == 2
    assert "README.md" in capsys.readouterr().err


# --- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", suites.SUITES)
def test_suites_run_on_a_gpu(name, device):
    rows = list(suites.suite_rows(name, quick(torch.device("cuda", 0), torch.bfloat16)))
    failed = [json.dumps(row) for row in rows if "failed" in row]
    assert not failed
    if name in ("layer", "kernels", "model"):
        assert any("triton" in row["contender"] for row in rows if "time_ms_p50" in row)
    if name == "layer":
        assert any("CUDA graph" in row["contender"] for row in rows if "ratio_p50" in row)
