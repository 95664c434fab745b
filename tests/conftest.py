"""What every test starts from: a fixed seed, no backend chosen by the environment, one thread; and where there is no
GPU, Triton's interpreter: tests marked ``gpu`` skip there.

Tests with the fixture ``device`` run in the interpreter there, and where there is a GPU they run on it: they then have
the mark too, so that ``-m gpu`` is everything that uses the GPU and ``-m "not gpu"`` the rest.
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


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HAS_GPU and _uses_device(item):
            item.add_marker(pytest.mark.gpu)
        elif not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _uses_device(item: pytest.Item) -> bool:
    """Whether ``item`` has the fixture below, and not a parameter of that name."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "device" in getattr(item, "fixturenames", ()) and "device" not in parameters


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run: the GPU, or the CPU in Triton's interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend in turn: what holds for both is one test. Tensors belong on ``device``."""
    return request.param


@pytest.fixture(autouse=True)
def _fresh_start(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that it is absent again afterwards whatever the test's commands put there.
    monkeypatch.setenv("GOAT_KERNELS_BACKEND", "")
    monkeypatch.delenv("GOAT_KERNELS_BACKEND")
    torch.manual_seed(0)
