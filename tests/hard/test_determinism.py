"""The same bits from two processes; from other thread counts the same up to the order of the vendor's sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import goat_problems
import pytest
import torch
from drawn_layers import F32

from goat_kernels.numerics import TOLERANCES

#: Prints every result of forward, backward and 50 training steps as hexadecimal digits, by backend.
_RUN = """
import hashlib, json, sys
import torch
torch.set_num_threads(int(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
from goat_problems import evaluate, keep_mask, make_problem
from triton_cases import goat_on
from goat_kernels import GoatLinear

device = "cuda" if torch.cuda.is_available() else "cpu"

def digest(tensor):
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()

def training(backend):
    torch.manual_seed(3)
    torch.use_deterministic_algorithms(True, warn_only=True)
    layer = GoatLinear(24, 20, r=8, num_experts=4, init="lora", dropout=0.1, balance_coefficient=1e-2, backend=backend)
    layer = layer.to(device)
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    T = 40 if backend == "torch" or device == "cuda" else 9  # the interpreter is slow
    x, target = (torch.randn(shape, generator=torch.Generator().manual_seed(5)) for shape in ((T, 24), (T, 20)))
    for _ in range(50):
        optimiser.zero_grad()
        loss = (layer(x.to(device)) - target.to(device)).square().mean()
        loss.backward()
        optimiser.step()
    return float(loss), [digest(p) for p in trained]

bits, values = {}, {}
for backend in ("torch", "triton"):
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        T = 300 if backend == "torch" or device == "cuda" else 33
        problem = make_problem(T, 64, 48, R0=3, dtype=dtype, adapter_dtype=torch.float32)
        torch.manual_seed(1)
        outcome = evaluate(goat_on(torch.device(device), backend), problem, dropout_p=0.1, training=True)
        results = {"output": outcome.output, "balance_loss": outcome.balance_loss, **outcome.gradients}
        bits |= {f"{backend} {name} {result}": digest(tensor) for result, tensor in results.items()}
    loss, digests = training(backend)
    bits[f"{backend} training"] = digests
    values[f"{backend} loss"] = loss
bits["mask"] = digest(keep_mask(torch.tensor([1, 2], dtype=torch.int32), 500, 300, 2, 0.3))
print(json.dumps([bits, values]))
"""


def run(threads: int) -> tuple[dict, dict]:
    tests = str(Path(goat_problems.__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", "-c", _RUN, str(threads), tests]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def with_one_thread() -> tuple[dict, dict]:
    return run(1)


@pytest.mark.long
def test_two_processes_compute_the_same_bits(with_one_thread):
    """Forward, backward, and the parameters after 50 steps of AdamW with dropout and the balance loss."""
    bits, values = with_one_thread
    assert len(bits) == 2 * (2 * 8 + 1) + 1 and len(set(map(str, bits.values()))) == len(bits)
    assert run(1) == [bits, values]


@pytest.mark.long
def test_thread_counts_change_no_more_than_the_order_of_the_vendors_sums(with_one_thread):
    """PyTorch promises no bits of its products across thread counts; the masks, which are integers, have them."""
    bits, values = run(2)
    assert bits["mask"] == with_one_thread[0]["mask"]
    for name, loss in with_one_thread[1].items():
        # Fifty steps may carry a difference in the last place some way.
        assert abs(values[name] - loss) <= 50 * TOLERANCES[F32].relative * abs(loss), name
    assert torch.isfinite(torch.tensor(list(values.values()))).all()
