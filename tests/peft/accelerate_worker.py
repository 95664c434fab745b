"""What test_accelerate_fsdp2.py launches in two processes; writes what each found to ``<rank>.pt``."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import load_fsdp_model, save_fsdp_model
from test_fsdp2 import adam, build, train


def prepared(accelerator: Accelerator, **changes):
    model = build(**changes)
    accelerator.free_memory()
    return accelerator.prepare(model, adam(model))


def gradients(accelerator: Accelerator, rank: int) -> dict[str, torch.Tensor]:
    from peft_tiny_models import batch

    model, _ = prepared(accelerator)
    accelerator.backward(model(**batch("llama", seed=10 + rank)).loss)
    return {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    accelerator = Accelerator()
    rank, plugin = accelerator.process_index, accelerator.state.fsdp_plugin
    found = {"gradients": gradients(accelerator, rank)}

    model, optimizer = prepared(accelerator)
    train(model, rank, range(2), optimizer)
    accelerator.save_state("state")
    save_fsdp_model(plugin, accelerator, model, "adapter_alone", adapter_only=True)  # as Trainer's checkpoints do
    found["losses"] = train(model, rank, range(2, 4), optimizer)

    model, optimizer = prepared(accelerator, init="random", seed=7)
    accelerator.load_state("state")
    found["resumed"] = train(model, rank, range(2, 4), optimizer)

    model, optimizer = prepared(accelerator, init="random", seed=7)
    load_fsdp_model(plugin, accelerator, model, "adapter_alone", adapter_only=True)
    found["first loss of the adapter alone"] = train(model, rank, range(2, 3), optimizer)

    whole = accelerator.get_state_dict(model)
    model.save_pretrained("adapter", state_dict=whole, is_main_process=accelerator.is_main_process)
    torch.save(found, f"{rank}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main()
