"""PEFT's own test suite on GoatConfig, as run.py runs it: about a minute."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from judge import read_expectations
from peft_source import NotDownloaded, fetch_suite

HERE = Path(__file__).parent


@pytest.mark.long
def test_pefts_own_tests(tmp_path):
    version, known = importlib.metadata.version("peft"), read_expectations(HERE / "expectations.toml")["versions"]
    if version not in known:
        pytest.skip(f"expectations.toml is written for PEFT {', '.join(known)}, and this is {version}")
    try:
        fetch_suite(tmp_path, version)
    except NotDownloaded as error:
        pytest.skip(str(error.code).partition("\n")[0])
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), "--folder", str(tmp_path)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "passed" in done.stdout and "PROBLEMS" not in done.stdout
