"""``goat-kernels check``: it checks this machine by itself, it can fail, and it says what failed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from goat_kernels.checks import correctness, traffic
from goat_kernels.cli import check, main
from goat_kernels.kernels.common import INTERPRETED
from goat_kernels.kernels.passes import TritonPasses

PASSES = (
    "prefill",
    "gate and balance loss",
    "hidden gradient",
    "lora_B gradient",
    "lora_A and router gradient",
    "input gradient",
)
RESULTS = (
    "output",
    "balance loss",
    *(f"gradient of {name}" for name in ("x", "weight", "bias", "lora_A", "lora_B", "router")),
)

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in Triton's interpreter")


def run_check(*arguments, code=None, cwd=None):
    """The command in a process of its own, as a user starts it: nobody has told Triton to interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["-c", code] if code else ["-m", "goat_kernels", "check", *arguments]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=cwd)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.long
def test_the_whole_table(tmp_path):
    done = run_check("--json", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"torch {torch.__version__}" in done.stdout and "goat_kernels 0" in done.stdout and "triton 3" in done.stdout
    assert "FAIL" not in done.stdout
    if torch.cuda.is_available():
        assert "auto picks triton for bfloat16" in done.stdout
    else:
        assert "GPU: PyTorch sees none" in done.stdout
        assert "auto picks torch for bfloat16; triton is passed over" in done.stdout
        assert "run in Triton's interpreter" in done.stdout
    for dtypes in ("float32", "float16, adapter float32", "float16", "bfloat16, adapter float32", "bfloat16"):
        assert f"\n{dtypes}; many tokens: T=" in done.stdout
    for label in ("prefill (fused)", "prefill (staged)", "hidden gradient (fused)", "hidden gradient (staged)"):
        assert f"\n  {label} " in done.stdout
    lines = re.findall(r"^  (.{34})((?:\d\.\de[-+]\d\d \(\d\.\de[-+]\d\d\) *)+)\S+ +pass$", done.stdout, re.M)
    assert {re.sub(r" \(.*", "", label.strip()) for label, _ in lines} == {*PASSES, *RESULTS}

    rows = rows_of(tmp_path / "rows.jsonl")
    assert f"{len(rows)} of {len(rows)} within bounds" in done.stdout
    assert all(row["passed"] and row["error"] <= row["bound"] and row["backend"] == "triton" for row in rows)
    forms = {(row["dtype"], row["adapter_dtype"], row["residual"], row["dropout"] > 0, row["what"]) for row in rows}
    assert len(forms) == 5 * 2 * 2 * len(PASSES + RESULTS)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.long
def test_without_triton_the_torch_backend_is_checked_alone():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from goat_kernels.cli import main; sys.exit(main(['check', '--dtype', 'bfloat16']))"
    )
    done = run_check(code=code)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "torch backend alone is checked" in done.stdout and "triton is not installed" in done.stdout
    assert "interpreter" not in done.stdout and "FAIL" not in done.stdout
    assert re.search(r"^  gradient of router .* pass$", done.stdout, re.M)


# --- it can fail --------------------------------------------------------------------------------------------------


@pytest.fixture
def one_case(monkeypatch, device):
    """The command takes a moment: one dtype, one form, and in this process."""
    groups = correctness.groups

    def one_group(**options):
        title, cases = groups(**options)[0]
        return [(title, cases[2:3])]

    monkeypatch.setattr(correctness, "groups", one_group)


def broken_by(monkeypatch, name, change):
    whole = getattr(TritonPasses, name)
    monkeypatch.setattr(TritonPasses, name, lambda self, *args, **options: change(whole(self, *args, **options)))


def failed_rows(output):
    return {re.sub(r" \(.*", "", row) for row in re.findall(r"^FAILED: ([^:]*):", output, re.M)}


def test_all_is_well_with_one_case(one_case, capsys):
    assert main(["check", "--dtype", "float32"]) == 0
    output = capsys.readouterr().out
    assert "FAIL" not in output
    told = r"^Replay is on \(GOAT_KERNELS_REPLAY=0 turns it off\): 3 steps of one layer, 2 of 6 calls replayed, "
    assert re.search(told, output, re.M)


@pytest.mark.long
@pytest.mark.parametrize("wrong", [1.001, float("nan")], ids=["wrong", "nan"])
def test_a_wrong_gradient_of_lora_B_is_named(one_case, monkeypatch, capsys, tmp_path, wrong):
    broken_by(monkeypatch, "weight_gradients", lambda grads: (grads[0], grads[1] * wrong, grads[2]))
    assert main(["check", "--dtype", "float32", "--json", str(tmp_path / "rows.jsonl")]) == 1
    output = capsys.readouterr().out
    assert failed_rows(output) == {"lora_B gradient", "gradient of lora_B"}
    assert re.search(r"^  lora_B gradient .* FAIL$", output, re.M)
    assert re.search(r"^FAILED: lora_B gradient: .* above 1e-05; float32; path; T=", output, re.M)
    failed = [row for row in rows_of(tmp_path / "rows.jsonl") if not row["passed"]]
    assert {row["what"] for row in failed} == {"lora_B gradient", "gradient of lora_B"}
    assert all((row["error"] is None) == (wrong != wrong) for row in failed)


def test_a_wrong_gate_is_named(one_case, monkeypatch, capsys):
    """1e-4 beside the gate: less than half precision shows, more than a router in float32 may be wrong."""
    broken_by(
        monkeypatch,
        "prefill",
        lambda results: (*results[:2], results[2]._replace(gate_ET=results[2].gate_ET * 1.0001)),
    )
    assert main(["check", "--dtype", "bfloat16"]) == 1
    assert failed_rows(capsys.readouterr().out) == {"gate and balance loss"}


def test_a_pass_that_raises_is_named(one_case, monkeypatch, capsys, tmp_path):
    broken_by(monkeypatch, "input_prefill", lambda grad_x: 1 / 0)
    assert main(["check", "--dtype", "float32", "--json", str(tmp_path / "rows.jsonl")]) == 1
    message = "raised ZeroDivisionError: division by zero"
    assert re.search(rf"^FAILED: float32; path; T=.*: {message}$", capsys.readouterr().out, re.M)
    assert [(row["what"], row["passed"]) for row in rows_of(tmp_path / "rows.jsonl")] == [(message, False)]


def test_the_exit_code_of_the_interpreting_process_is_passed_on(monkeypatch):
    calls = []

    def run(command, env):
        calls.append((command, env["TRITON_INTERPRET"]))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(check, "_needs_interpreter", lambda **options: True)
    monkeypatch.setattr(check.subprocess, "run", run)
    assert main(["check", "--traffic", "--dtype", "float32", "--json", "rows.jsonl"]) == 1
    command = [sys.executable, "-m", "goat_kernels", "check"]
    assert calls == [([*command, "--traffic", "--dtype", "float32", "--json", "rows.jsonl"], "1")]


# --- traffic ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_traffic_in_a_process_of_its_own(tmp_path):
    done = run_check("--traffic", "--dtype", "float32", "--json", "rows.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^  fused_forward +x +131,072 +0 +131,072 +1\.00  ok$", done.stdout, re.M)
    assert re.search(r"^  whole layer: forward x 1.00 of 1, .* backward dY 2.00 of 2, ", done.stdout, re.M)
    assert re.search(r"^  path; T=8192 N=4096 M=4096 R=32 E=8 K=2 ", done.stdout, re.M)
    assert "0 out of bounds" in done.stdout and "FAIL" not in done.stdout
    assert {"kernel", "what", "read_bytes", "once_bytes", "passed"} <= rows_of(tmp_path / "rows.jsonl")[0].keys()


@pytest.mark.long
@needs_interpreter
def test_a_kernel_that_reads_twice_fails_the_traffic_check(monkeypatch, capsys):
    case = next(case for case in traffic.CASES if case.layer.dtype == torch.float32)
    monkeypatch.setattr(traffic, "CASES", (case,))

    def run(launch):
        for _ in range(1 + (launch.name == "fused_forward")):
            launch.run()

    count_layer = traffic.count_layer
    monkeypatch.setattr(traffic, "count_layer", lambda layer: count_layer(layer, run))
    assert main(["check", "--traffic"]) == 1
    output = capsys.readouterr().out
    assert re.search(r"^FAILED: fused_forward: x 262,144 read, 0 written, not 131,072 and 0; ", output, re.M)
    assert re.search(r"^FAILED: whole layer: forward x 2\.00 of 1 FAIL; ", output, re.M)
    assert "FAILED: expand_columns" not in output


# --- compiling ahead ----------------------------------------------------------------------------------------------

AHEAD = """
import torch, triton
from triton.backends.compiler import GPUTarget

class Driver:  # an H200 that is not there
    get_current_device = get_current_stream = lambda self, device=0: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    map_python_to_cpp_type = lambda self, name: name

triton.runtime.driver.set_active(Driver())
from goat_kernels.checks.problem import LayerCase, compile_ahead, make_problem
submitted = []
submit = triton.AsyncCompileMode.submit
triton.AsyncCompileMode.submit = lambda self, *args: submitted.append(1) or submit(self, *args)
problem = make_problem(LayerCase(T=16, N=64, M=64, R=8, E=4, dtype=torch.float32), "meta")
for _ in range(2):
    compile_ahead([problem], torch.device("cpu"))
    print(len(submitted))
from goat_kernels.kernels.tiles import Tile
tiles = [("expand_columns", Tile(16, 64, warps, 1, 16)) for warps in (4, 8)]
compile_ahead([problem], torch.device("cpu"), tiles)
print(len(submitted))
"""


@pytest.mark.long
def test_kernels_compile_ahead_without_running(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = run_check(code=AHEAD)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, with_tiles = map(int, done.stdout.split())
    assert first >= 5 and second == first, "the second time, every kernel of the first is found"
    assert with_tiles == first + 2, "each tile to try, and the other kernels are there already"
    assert list(tmp_path.rglob("*.cubin"))


# --- bad input ----------------------------------------------------------------------------------------------------

BAD = {
    "dtype": (["--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
    "json without folder": (["--json", "nowhere/rows.jsonl"], ["--json 'nowhere/rows.jsonl'", "a folder that exists"]),
    "json is a folder": (["--json", "."], ["--json '.'", "the name of a file"]),
    "unknown option": (["--speed"], ["--speed"]),
    "a dtype not counted": (["--traffic", "--dtype", "float16"], ["--dtype 'float16'", "--traffic", "bfloat16"]),
}


@pytest.mark.parametrize(("arguments", "parts"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_names_it(arguments, parts, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "_needs_interpreter", lambda **options: False)
    assert main(["check", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("goat-kernels check: error: ")
    for part in parts:
        assert part in captured.err


def test_a_backend_of_the_environment_that_does_not_exist_is_one_line(one_case, monkeypatch, capsys):
    monkeypatch.setenv("GOAT_KERNELS_BACKEND", "cuda")
    assert main(["check"]) == 2
    assert "GOAT_KERNELS_BACKEND='cuda' is unknown" in capsys.readouterr().err


def test_traffic_without_triton_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(check, "has_triton", lambda: False)
    assert main(["check", "--traffic"]) == 2
    assert "--traffic needs Triton's interpreter, and the package triton is not installed" in capsys.readouterr().err


def test_an_interpreter_that_comes_too_late_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(check, "_is_interpreting", lambda: False)
    assert main(["check", "--traffic"]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for phrase in ("count the bytes", "check this dtype of x alone", "one JSON object per line", "Exit code"):
        assert phrase in text
