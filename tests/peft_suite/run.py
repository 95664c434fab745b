"""PEFT's own test suite, pointed at GoatConfig: ``python tests/peft_suite/run.py``.

Fetches the source distribution of the installed PEFT with pip, unpacks it outside the checkout, puts goat_conftest.py
into its tests (which replaces the lists of configurations and models), runs it, and compares what came of every test
with expectations.toml. Needs a package index for pip and the packages of the ``test`` extra; no hub, no GPU.

Exits with 0 when everything was as expected, with 1 otherwise: an unexpected failure, an expected failure that passed,
a skip for an unlisted reason, an expectation that nothing met.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from judge import judge, read_expectations
from peft_source import FILES, fetch_suite

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]


def run_suite(root: Path, models: Path, arguments: list[str]) -> list[dict[str, str]]:
    """Run the suite at ``root``; one record (test, outcome, message) per test.

    Raises:
        SystemExit: pytest could not run the tests at all.
    """
    (root / "tests" / "__init__.py").touch()
    shutil.copy(HERE / "goat_conftest.py", root / "tests" / "conftest.py")
    shutil.copy(HERE / "goat_suite_models.py", root)
    results = root / "results.jsonl"
    results.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(CHECKOUT)]),
        "GOAT_SUITE_MODELS": str(models),
        "GOAT_SUITE_RESULTS": str(results),
        "GOAT_KERNELS_ALLOW_PICKLE": "1",  # PEFT also tests saving without safetensors
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider"]
    command += ["-q", "--tb=no", "-W", "ignore", "--no-header", "--show-capture=no", "-r", "N", *arguments]
    done = subprocess.run(
        [*command, *(f"tests/{name}.py" for name in FILES)], cwd=root, env=environment, stdout=sys.stderr
    )
    if done.returncode not in (0, 1) or not results.exists():  # 1: some tests failed
        raise SystemExit(f"pytest could not run PEFT's tests (exit code {done.returncode}), see above")
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to unpack PEFT and keep it; a temporary folder by default")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    options = parser.parse_args()
    version = importlib.metadata.version("peft")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        if folder.is_relative_to(CHECKOUT):
            parser.error(f"--folder {str(folder)!r} lies in the checkout; it needs a folder outside {str(CHECKOUT)!r}")
        folder.mkdir(parents=True, exist_ok=True)
        records = run_suite(fetch_suite(folder, version), folder / "models", options.pytest)
    verdict = judge(records, read_expectations(HERE / "expectations.toml"))
    print(f"PEFT {version}'s own tests with GoatConfig, {time.monotonic() - started:.0f} s")
    print(verdict)
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
