"""What every test starts from: a fixed seed, no backend chosen by the environment, one thread; and where there is no
GPU, Triton's interpreter: tests marked ``gpu`` skip there.
"""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Before anything imports Triton: its kernels then run on CPU tensors.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

# Tests are small and may share a machine: waiting for threads would cost more than they give.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run: the GPU, or the CPU in Triton's interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _fresh_start(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that it is absent again afterwards whatever the test's commands put there.
    monkeypatch.setenv("GOAT_KERNELS_BACKEND", "")
    monkeypatch.delenv("GOAT_KERNELS_BACKEND")
    torch.manual_seed(0)
