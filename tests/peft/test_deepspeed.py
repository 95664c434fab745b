"""DeepSpeed's ZeRO-3 itself, two gloo processes on a CPU: start, losses, checkpoints, saving.

DeepSpeed is no dependency of the tests, since it is built at installation and other libraries act on its presence.
test_zero3.py tests our share of it everywhere; these run after ``DS_BUILD_OPS=0 pip install deepspeed``.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft_tiny_models import batch, tiny_llama
from test_fsdp2 import adam, build
from transformers import AutoModelForCausalLM
from two_processes import needs_gloo, run_two

TOLERANCE = 1e-5
SETTINGS = {
    "train_micro_batch_size_per_gpu": 3,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # partitions the small tensors of the test too
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}

pytestmark = [pytest.mark.long, needs_gloo]


def partitioned_base(folder: str):
    """Loaded as Trainer loads it under ZeRO-3: each process holds its part of every weight."""
    from transformers.integrations import HfDeepSpeedConfig

    marks = HfDeepSpeedConfig(SETTINGS)  # transformers sees it for as long as it lives
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    assert all(p.numel() == 0 for p in base.parameters())
    return base, marks


def engine(model):
    import deepspeed

    made, *_ = deepspeed.initialize(model=model, optimizer=adam(model), config=SETTINGS)
    return made


def steps(made, rank: int, which: range) -> list[float]:
    found = []
    for step in which:
        loss = made(**batch("llama", seed=10 * step + rank)).loss
        made.backward(loss)
        made.step()
        found.append(loss.item())
    return found


def worker(rank: int, folder: str) -> None:
    os.environ["MASTER_PORT"] = Path(folder, "port").read_text()
    base, marks = partitioned_base(folder)
    made = engine(build(base))
    found = {"fingerprint": made.module.peft_config["default"].base_weights}
    found["start"] = made._zero3_consolidated_16bit_state_dict()
    found["losses"] = steps(made, rank, range(2))
    made.save_checkpoint(f"{folder}/checkpoint")
    found["losses"] += steps(made, rank, range(2, 4))
    with torch.no_grad():
        made.module.eval()
        found["logits"] = made(**batch("llama")).logits
    whole = made._zero3_consolidated_16bit_state_dict()
    made.module.save_pretrained(f"{folder}/adapter", state_dict=whole, is_main_process=rank == 0)

    base, marks = partitioned_base(folder)
    resumed = engine(build(base, init="random", seed=7))
    resumed.load_checkpoint(f"{folder}/checkpoint")
    found["resumed"] = steps(resumed, rank, range(2, 4))
    del marks
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    tiny_llama().save_pretrained(folder / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    run_two(worker, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)], folder


def test_the_start_is_that_of_one_process(ran):
    found, expected = ran[0][0], build(tiny_llama()).state_dict()
    ours = {name: tensor for name, tensor in found["start"].items() if "goat_" in name}
    assert len(ours) == 2 * 7 * 5
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name
    assert found["fingerprint"] == {}  # would cost a gathering of every weight at loading


def test_the_losses_are_those_of_one_process(ran):
    model = build(tiny_llama())
    optimizer, losses = adam(model), []
    for step in range(4):
        both = [model(**batch("llama", seed=10 * step + rank)).loss for rank in range(2)]
        (sum(both) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in both])
    for rank, found in enumerate(ran[0]):
        assert found["losses"] == pytest.approx([both[rank] for both in losses], rel=TOLERANCE)


def test_the_gathered_state_saves_as_a_peft_adapter(ran):
    reloaded = PeftModel.from_pretrained(tiny_llama(), ran[1] / "adapter").eval()
    with torch.no_grad():
        logits = reloaded(**batch("llama")).logits
    torch.testing.assert_close(logits, ran[0][0]["logits"], rtol=TOLERANCE, atol=TOLERANCE)


def test_a_partitioned_checkpoint_resumes_with_the_same_losses(ran):
    for found in ran[0]:
        assert found["resumed"] == pytest.approx(found["losses"][2:], rel=TOLERANCE)
