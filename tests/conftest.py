"""What every test starts from: a fixed global seed and no backend chosen by the environment; one thread."""

from __future__ import annotations

import pytest
import torch

# Tests are small and may share a machine: waiting for threads would cost more than they give.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_start(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that it is absent again afterwards whatever the test's commands put there.
    monkeypatch.setenv("GOAT_KERNELS_BACKEND", "")
    monkeypatch.delenv("GOAT_KERNELS_BACKEND")
    torch.manual_seed(0)
