"""Two processes under DistributedDataParallel: gradients are the mean over the processes, balance losses included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from peft_tiny_models import batch, tiny_llama

import goat_kernels
from goat_kernels.peft import GoatConfig

# Each process takes its own batches, runs two forwards before the one backward (as contrastive and preference
# losses do), and saves its gradients.
WORKER = """
import sys
import torch
torch.set_num_threads(1)
from test_training_distributed import build, losses, save_gradients

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = build()
parallel = torch.nn.parallel.DistributedDataParallel(model)
losses(parallel, rank).backward()
save_gradients(model, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def build():
    model = tiny_llama()
    torch.manual_seed(3)
    config = GoatConfig(r=8, num_experts=4, target_modules=["q_proj", "v_proj"], balance_coefficient=0.5)
    return get_peft_model(model, config).train()


def losses(model, rank: int) -> torch.Tensor:
    return model(**batch("llama", seed=10 + rank)).loss + model(**batch("llama", seed=20 + rank)).loss


def save_gradients(model, file: str) -> None:
    torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, file)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
def test_gradients_are_the_mean_over_the_processes(tmp_path):
    paths = [str(Path(goat_kernels.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-3000:]
    model = build()
    sum(losses(model, rank) / 2 for rank in range(2)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
