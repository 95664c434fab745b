"""FSDP2 (``fully_shard``) with two gloo processes: gradients, sharded checkpoints, saving, and what is refused.

The models are float64 but for what transformers itself computes in float32 (norms, rotary embeddings, the loss).
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model
from peft_tiny_models import batch, tiny_llama, tokens
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_processes import needs_gloo, run_two

from goat_kernels.peft import GoatConfig

TOLERANCE = 1e-6
COEFFICIENT = 0.5  # large, so that a wrong scale shows far above rounding
TRAINED_ALONE = StateDictOptions(ignore_frozen_params=True, strict=False)

pytestmark = [pytest.mark.long, needs_gloo]


def build(base=None, **changes):
    values = {"r": 8, "num_experts": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    base = tiny_llama().double() if base is None else base
    torch.manual_seed(3)
    return get_peft_model(base, GoatConfig(**{**values, "balance_coefficient": COEFFICIENT, **changes})).train()


def shard(model, layers):
    mesh = init_device_mesh("cpu", (2,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded(**changes):
    model = build(**changes)
    return shard(model, model.get_base_model().model.layers)


def train(model, rank: int, steps: range, optimizer) -> list[float]:
    losses = []
    for step in steps:
        loss = model(**batch("llama", seed=10 * step + rank)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def error_of(call) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def worker(rank: int, folder: str) -> None:
    found = {}
    for coefficient in (COEFFICIENT, 0.0):
        model = sharded(balance_coefficient=coefficient)
        model(**batch("llama", seed=10 + rank)).loss.backward()
        found[coefficient] = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}

    model = sharded()
    optimizer = adam(model)
    train(model, rank, range(2), optimizer)
    parts = get_state_dict(model, optimizer, options=TRAINED_ALONE)
    found["keys"] = sorted(parts[0])
    dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=f"{folder}/checkpoint")
    found["losses"] = train(model, rank, range(2, 4), optimizer)

    resumed = sharded(init="random", seed=7)  # other tensors everywhere, the frozen pair included
    optimizer = adam(resumed)
    model_state, optimizer_state = get_state_dict(resumed, optimizer, options=TRAINED_ALONE)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(
        resumed,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINED_ALONE,
    )
    found["resumed"] = train(resumed, rank, range(2, 4), optimizer)

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(f"{folder}/adapter", state_dict=whole)
    with torch.no_grad():
        found["logits"] = model.eval()(tokens()).logits

    found["fold then shard"] = error_of(lambda: sharded(residual="fold")(**batch("llama")))
    base = tiny_llama().double()
    shard(base, base.model.layers)
    found["shard then fold"] = error_of(lambda: build(base, residual="fold"))
    late = build(base)
    found["shard then adapt"] = {n: t for n, t in late.state_dict().items() if "goat_" in n}
    found["fingerprint"] = late.peft_config["default"].base_weights
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What each rank found, and the folder that they wrote to."""
    folder = tmp_path_factory.mktemp("fsdp2")
    run_two(worker, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)], folder


def gradients(model, losses) -> dict[str, torch.Tensor]:
    sum(losses).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found, expected):
    assert len(expected) == 2 * 7 * 3
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < TOLERANCE, f"{name}: relative error {error:.2e}"


def test_gradients_are_the_mean_of_the_ranks_own(ran):
    model = build()
    expected = gradients(model, [model(**batch("llama", seed=10 + rank)).loss / 2 for rank in range(2)])
    for found in ran[0]:
        assert_equal_gradients(found[COEFFICIENT], expected)


def test_without_a_balance_loss_they_are_those_of_one_process_on_the_whole_batch(ran):
    model = build(balance_coefficient=0.0)
    halves = [batch("llama", seed=10 + rank) for rank in range(2)]
    whole = {key: torch.cat([half[key] for half in halves]) for key in halves[0]}
    expected = gradients(model, [model(**whole).loss])
    for found in ran[0]:
        assert_equal_gradients(found[0.0], expected)


def test_a_sharded_checkpoint_resumes_with_the_same_losses(ran):
    for found in ran[0]:
        assert found["resumed"] == found["losses"]
    assert all("goat_" in key for key in found["keys"])
    assert sum(".residual_" in key for key in found["keys"]) == 2 * 7 * 2


def test_the_full_state_dict_saves_as_a_peft_adapter(ran):
    reloaded = PeftModel.from_pretrained(tiny_llama().double(), ran[1] / "adapter")
    with torch.no_grad():
        logits = reloaded.eval()(tokens()).logits
    torch.testing.assert_close(logits, ran[0][0]["logits"], rtol=TOLERANCE, atol=TOLERANCE)


def test_a_base_model_that_is_sharded_already(ran):
    """The singular values are those of the gathered weight; no fingerprint, which would be a collective call."""
    expected = {name: tensor for name, tensor in build().state_dict().items() if "goat_" in name}
    for found in ran[0]:
        assert found["shard then adapt"].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found["shard then adapt"][name], tensor, rtol=TOLERANCE, atol=TOLERANCE)
        assert found["fingerprint"] == {}


def test_fold_is_refused(ran):
    for found in ran[0]:
        assert found["fold then shard"].startswith("RuntimeError: the weight of model.layers.0.self_attn.q_proj was")
        assert "sharded or special: use residual='path'" in found["shard then fold"]
