"""What is installed: every import is declared, the public names have types, and the built distributions work.

The long tests build the distributions without a network, with the build backend that is installed.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# --- imports --------------------------------------------------------------------------------------------------------

#: Folder -> the extras that its files may import from; the core's dependencies are always allowed.
ALLOWED = {
    "goat_kernels": set(),
    "goat_kernels/cli": {"demo"},
    "goat_kernels/finetuning": {"demo"},
    "bench": {"bench"},
    "docs/examples": set(),
    "tests": {"test"},
}

#: Packages that are asked for where they are imported, and that no extra installs.
OPTIONAL = {
    "deepspeed": "imported where it has partitioned a parameter, so it is there",
    "onnx": "a test that skips without it",
}

FIRST_PARTY = {"goat_kernels", "bench", "tests"}


def _declared(extras: set[str]) -> set[str]:
    """Distributions that the core and ``extras`` name, with the extras that those include."""
    names = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    for extra in extras:
        for requirement in map(Requirement, EXTRAS[extra]):
            if canonicalize_name(requirement.name) == PROJECT["name"]:
                names |= _declared(requirement.extras)
            else:
                names.add(canonicalize_name(requirement.name))
    return names


def _guards_against_import_errors(node: ast.AST) -> bool:
    names = {name.id for handler in getattr(node, "handlers", ()) for name in ast.walk(handler) if hasattr(name, "id")}
    return isinstance(node, ast.Try) and not names.isdisjoint({"ImportError", "ModuleNotFoundError"})


def _imported(tree: ast.AST) -> set[str]:
    """Top-level modules that a file imports anywhere, but for those that it can do without (try ... ImportError)."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
        elif not _guards_against_import_errors(node):
            names |= _imported(node)
    return names


def test_every_import_is_declared():
    local = {path.stem for path in (ROOT / "tests").rglob("*.py")}  # pytest puts a test's folder on the path
    distributions = importlib.metadata.packages_distributions()
    undeclared = []
    for folder, extras in ALLOWED.items():
        declared = _declared(extras)
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT).as_posix()
            closest = max((other for other in ALLOWED if relative.startswith(other + "/")), key=len)
            if folder != closest:
                continue
            allowed = _declared({"test"}) if path.name.startswith("test_") else declared
            known = set(sys.stdlib_module_names) | FIRST_PARTY | set(OPTIONAL) | (local if folder == "tests" else set())
            for name in sorted(_imported(ast.parse(path.read_text())) - known):
                if allowed.isdisjoint(map(canonicalize_name, distributions.get(name, [name]))):
                    undeclared.append(
                        f"{relative} imports {name}, which no dependency or extra {sorted(extras)} brings"
                    )
    assert not undeclared, "\n".join(undeclared)


def test_the_package_imports_bench_in_one_place_alone():
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "goat_kernels").rglob("*.py")
        if "bench" in _imported(ast.parse(path.read_text()))
    }
    assert importers <= {"goat_kernels/cli/bench.py"}  # which says what to do where there is no checkout


def test_an_undeclared_import_is_found():
    tree = ast.parse(
        "def f():\n    import left.right\n\ntry:\n    import guarded\nexcept ImportError:\n    from other import a"
    )
    assert _imported(tree) == {"left"}
    assert {"torch", "peft"} <= _declared(set())
    assert "scikit-learn" not in _declared(set())
    assert "scikit-learn" in _declared({"test"})


def test_every_dependency_has_a_lower_bound():
    for requirement in map(
        Requirement, [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    ):
        if canonicalize_name(requirement.name) != PROJECT["name"]:
            assert ">=" in str(requirement.specifier), f"{requirement} has no lower bound"


# --- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_public_names_have_types(tmp_path):
    """mypy accepts what users write, with the types that they expect, and reports each mistake, strictly."""
    folder = ROOT / "tests" / "typing"
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(tmp_path)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "right.py", "wrong.py"], capture_output=True, text=True, cwd=folder, env=environment, timeout=1200
    )
    found = set(re.findall(r"^(\w+\.py):(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.M))
    lines = enumerate((folder / "wrong.py").read_text().splitlines(), start=1)
    expected = {
        ("wrong.py", str(number), line.split("# expect: ")[1]) for number, line in lines if "# expect: " in line
    }
    assert found == expected, done.stdout + done.stderr
    assert "error: Cannot find" not in done.stdout


# --- distributions --------------------------------------------------------------------------------------------------

#: What a distribution is built from.
PARTS = (
    ".ci",
    ".gitignore",
    ".pre-commit-config.yaml",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "bench",
    "docs",
    "goat_kernels",
    "pyproject.toml",
    "tests",
)


def _clean_environment(**more: str) -> dict[str, str]:
    """This process's, without what would let a process find the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", **more}


def _check_call(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=_clean_environment(**environment), timeout=900
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution and the wheel, which is built from it as an installer would."""
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"  # a copy: building writes into it
    source.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source)
    _check_call([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)], folder)
    shutil.rmtree(source)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The ``bin`` folder of a new virtual environment that holds the wheel and sees the dependencies installed here."""
    environment = tmp_path_factory.mktemp("environment")
    _check_call([sys.executable, "-m", "venv", "--without-pip", str(environment)], environment)
    python = environment / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    options = ["--quiet", "--no-deps", "--no-index"]
    _check_call([sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)], environment)
    # A folder on the path whose own .pth files are not read: those of an editable install of the checkout are in one.
    purelib = _check_call([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], environment)
    here = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(purelib.strip(), "dependencies.pth").write_text("\n".join(here) + "\n")
    return python.parent


USE = """
import pathlib, sys
import torch
import goat_kernels
from goat_kernels import GoatLinear

assert pathlib.Path(goat_kernels.__file__).is_relative_to(sys.prefix), goat_kernels.__file__
assert (pathlib.Path(goat_kernels.__file__).parent / "py.typed").is_file()
assert "peft" not in sys.modules and "transformers" not in sys.modules
layer = GoatLinear(16, 16, r=8)
layer(torch.randn(4, 16)).sum().backward()
assert layer.lora_B.grad is not None

from goat_kernels import GoatConfig
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
tokens = torch.randint(64, (2, 8))
expected = base(tokens).logits
model = get_peft_model(base, GoatConfig(r=8, target_modules="all-linear"))
model(tokens, labels=tokens).loss.backward()
model.save_pretrained("adapter")
with model.disable_adapter():
    assert torch.equal(model(tokens).logits, expected)
"""

IMPORT_ALL = """
import importlib, pkgutil, sys
import goat_kernels

names = [module.name for module in pkgutil.walk_packages(goat_kernels.__path__, "goat_kernels.")]
for name in names:
    if not name.endswith(".__main__"):
        importlib.import_module(name)
assert "bench" not in sys.modules
print(len(names))
"""


@pytest.mark.long
def test_the_wheel_holds_the_package_alone(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "goat_kernels").rglob("*.py")}
    code = {name for name in names if ".dist-info/" not in name}
    assert code == here | {"goat_kernels/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.long
def test_the_wheel_works_outside_the_checkout(installed, tmp_path):
    help_text = _check_call([str(installed / "goat-kernels"), "--help"], tmp_path)
    assert all(command in help_text for command in ("finetune", "check", "bench", "convert", "tune"))
    _check_call([str(installed / "python"), "-c", USE], tmp_path)
    assert int(_check_call([str(installed / "python"), "-c", IMPORT_ALL], tmp_path)) > 50
    checked = _check_call([str(installed / "goat-kernels"), "check", "--dtype", "float32"], tmp_path)
    assert "float32" in checked


@pytest.mark.long
@pytest.mark.parametrize("command", ["bench", "tune"])
def test_measuring_without_a_checkout_says_what_to_do(command, installed, tmp_path):
    call = [str(installed / "goat-kernels"), command]
    environment = _clean_environment()
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith(f"goat-kernels {command}: error: ") and done.stderr.count("\n") == 1
    assert "clone" in done.stderr and "pip install -e" in done.stderr


@pytest.mark.long
def test_the_source_distribution_holds_what_its_tests_need(built, tmp_path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()

    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    parts = [ROOT / part for part in PARTS]
    wanted = {
        path.relative_to(ROOT).as_posix()
        for part in parts
        for path in (part.rglob("*") if part.is_dir() else [part])
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted - files == set()

    collect = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-p", "no:cacheprovider", "-m", ""]
    here = _check_call(collect, ROOT, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    there = _check_call(collect, unpacked, PYTHONPATH=str(unpacked))
    tests = [{line for line in printed.splitlines() if "::" in line} for printed in (here, there)]
    assert len(tests[0]) > 1000
    assert tests[0] == tests[1]
