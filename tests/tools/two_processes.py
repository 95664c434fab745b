"""Runs a function of a test file in two processes that are joined by gloo, on a machine without GPUs."""

from __future__ import annotations

import contextlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import goat_kernels

needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")

_CODE = """
import sys
import torch
torch.set_num_threads(1)
import {module}
from two_processes import joined
with joined(int(sys.argv[1]), sys.argv[2]):
    {module}.{function}(int(sys.argv[1]), sys.argv[2])
"""


@contextlib.contextmanager
def joined(rank: int, folder: str):
    """A process group of two."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def environment(*folders: Path) -> dict[str, str]:
    """Where this package, the tests' tools and ``folders`` can be imported, without a hub and without a GPU."""
    paths = [str(folder) for folder in (Path(goat_kernels.__file__).parents[1], Path(__file__).parent, *folders)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    ours = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **ours, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _launched(rank: int) -> dict[str, str]:
    """What a launcher tells each process; trainers and DeepSpeed look there. The group is joined through a file."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}


def run_two(function, folder: Path) -> None:
    """Call ``function(rank, folder)`` in both processes and wait; AssertionError with its errors where one fails."""
    code = _CODE.format(module=function.__module__, function=function.__name__)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder)],
            env={**environment(Path(inspect.getfile(function)).parent), **_launched(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
