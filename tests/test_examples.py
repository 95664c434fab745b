"""The scripts of docs/examples/ run as they stand, and the page of environment variables is complete."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"


def _run(script: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_three_short_examples():
    scripts = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == {"check_my_gpu.py", "goat_linear_loop.py", "peft_trainer.py"}
    assert max(scripts.values()) <= 60


@pytest.mark.long
@pytest.mark.parametrize("script", ["goat_linear_loop.py", "peft_trainer.py"])
def test_training_lowers_the_loss(script, tmp_path):
    printed = _run(script, tmp_path)
    first, last = re.search(r"the loss went from ([\d.]+) to ([\d.]+)", printed).groups()
    assert float(last) < 0.9 * float(first)
    if script == "peft_trainer.py":
        assert "the reloaded model gives the same outputs: True" in printed


@pytest.mark.long
def test_the_check_of_the_gpu_runs_in_the_interpreter_too(tmp_path):
    printed = _run("check_my_gpu.py", tmp_path)
    assert "device: " in printed and "WRONG" not in printed
    for backend in ("triton", "torch"):
        assert len(re.findall(rf"^{backend} +(?:output|gradient of \w+) .* ok$", printed, re.M)) == 5


# --- environment variables ------------------------------------------------------------------------------------------


def _constants(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def _read(node: ast.AST) -> ast.expr | None:
    """The expression that names the variable, where ``node`` reads one: environ.get(name), environ[name], getenv."""
    if isinstance(node, ast.Subscript) and _is_environ(node.value) and isinstance(node.ctx, ast.Load):
        return node.slice
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        methods = ("get", "pop", "setdefault")
        if node.func.attr == "getenv" or (node.func.attr in methods and _is_environ(node.func.value)):
            return node.args[0]
    return None


def _variables_read(files: list[Path]) -> set[str]:
    """Names of the environment variables that ``files`` read."""
    trees = [ast.parse(path.read_text()) for path in files]
    named = {  # NAME = "VALUE", wherever it is defined
        target.id: node.value.value
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = set()
    for tree in trees:
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for scope in [tree, *functions]:
            for asked in filter(None, map(_read, ast.walk(scope))):
                if isinstance(asked, ast.Constant):
                    found.add(asked.value)
                elif isinstance(asked, ast.Name) and asked.id in named:
                    found.add(named[asked.id])
                elif scope is not tree:  # a variable of a loop over names that the function holds
                    found |= {
                        value for value in _constants(scope) if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", value)
                    }
        found |= {value for value in _constants(tree) if re.fullmatch(r"GOAT_KERNELS_[A-Z_]+", value)}
    return found


def test_the_reader_of_variables_finds_each_way_of_reading(tmp_path):
    (tmp_path / "names.py").write_text('ONE = "A_ONE"\n')
    (tmp_path / "reader.py").write_text(
        "import os\nfrom names import ONE\nos.environ.get(ONE)\nos.environ['A_TWO']\nos.getenv('A_THREE')\n"
        "os.environ['A_WRITTEN'] = '1'\n"
        "def loop():\n    for name in ('A_FOUR', 'A_FIVE'):\n        os.environ.get(name, 'a default')\n"
    )
    assert _variables_read(sorted(tmp_path.glob("*.py"))) == {"A_ONE", "A_TWO", "A_THREE", "A_FOUR", "A_FIVE"}


def test_the_page_of_environment_variables_names_those_that_are_read():
    page = (ROOT / "docs" / "environment.md").read_text()
    documented = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert len(documented) == len(set(documented))
    files = [*(ROOT / "goat_kernels").rglob("*.py"), *(ROOT / "bench").rglob("*.py"), ROOT / "tests/hard/conftest.py"]
    assert set(documented) == _variables_read(sorted(files))
