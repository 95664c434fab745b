"""PEFT's source distribution, which holds its tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

#: Those of PEFT's test files that are run.
FILES = (
    "test_config",
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
)


class NotDownloaded(SystemExit):
    """pip could not get the source distribution."""


def fetch_suite(folder: Path, version: str) -> Path:
    """Download and unpack PEFT's source distribution into ``folder``; the unpacked root. What is there is used again.

    Raises:
        NotDownloaded: pip could not get it.
        SystemExit: it has no tests.
    """
    root = folder / f"peft-{version}"
    archive = folder / f"peft-{version}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        done = subprocess.run([*command, f"peft=={version}", "--dest", str(folder)], capture_output=True, text=True)
        if done.returncode != 0 or not archive.exists():
            raise NotDownloaded(f"pip could not download the source distribution of peft {version}:\n{done.stderr}")
    shutil.rmtree(root, ignore_errors=True)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    missing = [name for name in FILES if not (root / "tests" / f"{name}.py").is_file()]
    if missing:
        raise SystemExit(f"the source distribution of peft {version} lacks tests/{', '.join(missing)}")
    return root
