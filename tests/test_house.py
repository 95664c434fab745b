"""The house rules: imports run downwards, the code is linted, documented snippets run and documented commands hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "goat_kernels"

#: From the bottom up; a module may import modules of lower layers, and of its own layer within one package.
LAYERS = (
    ("passes", "dropout"),
    ("rules", "reference", "routed_module", "autocast", "command_errors", "files", "registration"),
    ("settings", "numerics"),
    ("argument_checks", "initialisation", "kernels"),
    ("backends",),
    ("forward_backward",),
    ("operators", "plain"),
    ("functional",),
    ("adapter",),
    ("linear",),
    ("checks",),
    ("training",),
    ("peft",),
    ("finetuning",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Units of goat_kernels that a file imports, wherever in the file."""
    units = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module]
            if node.module == "goat_kernels":
                names = [f"goat_kernels.{alias.name}" for alias in node.names]
        units |= {name.split(".")[1] for name in names if name.startswith("goat_kernels.")}
    return units


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_strictly_downwards(path):
    unit = _unit(path)
    assert unit in LEVEL, f"{unit} has no place in LAYERS"
    for imported in _imports(path) - {unit}:
        if imported in ("__version__", "GoatConfig"):  # names of the package itself
            continue
        assert LEVEL[imported] < LEVEL[unit], f"{path.relative_to(ROOT)} imports {imported}, which is not below {unit}"


def test_the_oracle_imports_nothing_of_the_package():
    assert _imports(PACKAGE / "reference.py") == set()


@pytest.mark.long
def test_importing_the_package_needs_torch_alone():
    code = (
        "import sys\n"
        "for name in ('triton', 'peft', 'transformers', 'accelerate', 'sklearn', 'matplotlib', 'tqdm'):\n"
        "    sys.modules[name] = None\n"
        "import goat_kernels, torch\n"
        "layer = goat_kernels.GoatLinear(16, 16, r=8)\n"
        "layer(torch.randn(2, 16)).sum().backward()\n"
        "print(goat_kernels.available_backends()['torch'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["ruff check", "ruff format"])
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def _snippets() -> list:
    found = []
    for document in DOCUMENTS:
        for number, match in enumerate(re.finditer(r"```python\n(.*?)```", document.read_text(), re.S), start=1):
            found.append(pytest.param(match.group(1), id=f"{document.relative_to(ROOT)}-{number}"))
    return found


@pytest.mark.long
@pytest.mark.parametrize("snippet", _snippets())
def test_documented_snippets_run(snippet, tmp_path):
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) == 2, "the README has two commands: the main job and the tests"
    assert "goat-kernels finetune" in commands[0]
    assert commands[1].endswith("pytest -n 2 --dist loadfile")
    assert f"bash -c '{commands[1]}'" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_placeholder_is_left(document):
    assert not re.search(r"@@|TODO|TBD|FIXME", document.read_text())


def test_links_between_documents_exist():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which does not exist"


def test_the_tests_that_documents_name_exist():
    named = {
        (path, name)
        for document in DOCUMENTS
        for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", document.read_text())
    }
    assert len(named) >= 30
    for path, name in sorted(named):
        defined = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in defined, f"{path} has no {name}"


COLLECT = """
import pytest, torch
torch.cuda.is_available = lambda: True
pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/kernels/test_tiles.py"])
"""


@pytest.mark.long
def test_what_runs_on_a_gpu_where_there_is_one_has_the_mark_there():
    done = subprocess.run([sys.executable, "-c", COLLECT], capture_output=True, text=True, cwd=ROOT)
    collected = {line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line}
    assert collected == {  # it has the fixture ``device``
        "test_the_tuner_takes_the_fastest_candidate_of_each_kernel_and_writes_the_tables_form"
    }
