"""Two processes under DistributedDataParallel: gradients are the mean over the processes, balance losses included."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_tiny_models import batch, tiny_llama
from torch.nn.parallel import DistributedDataParallel
from two_processes import needs_gloo, run_two

from goat_kernels.peft import GoatConfig

pytestmark = [pytest.mark.long, needs_gloo]


def build():
    model = tiny_llama()
    torch.manual_seed(3)
    config = GoatConfig(r=8, num_experts=4, target_modules=["q_proj", "v_proj"], balance_coefficient=0.5)
    return get_peft_model(model, config).train()


def losses(model, rank: int) -> torch.Tensor:
    """Two forwards before the one backward, as contrastive and preference losses do."""
    return model(**batch("llama", seed=10 + rank)).loss + model(**batch("llama", seed=20 + rank)).loss


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def save_gradients(rank: int, folder: str) -> None:
    model = build()
    parallel = DistributedDataParallel(model)  # by name: its reducer dies with it
    losses(parallel, rank).backward()
    torch.save(gradients(model), f"{folder}/{rank}.pt")


def test_gradients_are_the_mean_over_the_processes(tmp_path):
    run_two(save_gradients, tmp_path)
    model = build()
    sum(losses(model, rank) / 2 for rank in range(2)).backward()
    expected = gradients(model)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def train(model, rank: int, steps: range, optimizer) -> list[float]:
    found = []
    for step in steps:
        loss = model(**batch("llama", seed=10 * step + rank)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def adam(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def interrupt_and_resume(rank: int, folder: str) -> None:
    model = build()
    parallel, optimizer = DistributedDataParallel(model, broadcast_buffers=False), adam(model)
    train(parallel, rank, range(2), optimizer)
    model.save_pretrained(f"{folder}/adapter", is_main_process=rank == 0)
    if rank == 0:
        torch.save(optimizer.state_dict(), f"{folder}/optimizer.pt")
    torch.distributed.barrier()
    uninterrupted = train(parallel, rank, range(2, 5), optimizer)

    model = PeftModel.from_pretrained(tiny_llama(), f"{folder}/adapter", is_trainable=True).train()
    parallel, optimizer = DistributedDataParallel(model, broadcast_buffers=False), adam(model)
    optimizer.load_state_dict(torch.load(f"{folder}/optimizer.pt"))
    torch.save((uninterrupted, train(parallel, rank, range(2, 5), optimizer)), f"{folder}/{rank}.pt")


def test_a_saved_adapter_resumes_with_the_same_losses(tmp_path):
    run_two(interrupt_and_resume, tmp_path)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert of_ranks[0] != of_ranks[1]
    for uninterrupted, resumed in of_ranks:
        assert resumed == uninterrupted
