"""The reference of TRL's preference and policy-gradient trainers equals the policy, bit for bit, when training begins.

For a PeftModel these trainers add an adapter "ref" with the policy's configuration and copy every parameter whose name
contains ``.default.`` onto it. So names matter, and so does what is not a parameter: the frozen pair and the scaling.
"""

from __future__ import annotations

import copy
import math

import datasets
import pytest
import torch
import transformers
import trl
from peft import PeftModel, get_peft_model
from peft_tiny_models import tiny_llama, tokens
from tokenizers import Tokenizer, models, pre_tokenizers

from goat_kernels import GoatConfig
from goat_kernels.peft import GoatLinearLayer

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(60))]


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def text(start: int, count: int) -> str:
    return " ".join(f"w{(start * 7 + 3 * i) % 60}" for i in range(count))


def preferences():
    rows = [{"prompt": text(i, 3), "chosen": text(i + 5, 4), "rejected": text(i + 9, 4)} for i in range(8)]
    return datasets.Dataset.from_list(rows)


def judged():
    rows = [{"prompt": text(i, 3), "completion": text(i + 5, 4), "label": i % 2 == 0} for i in range(8)]
    return datasets.Dataset.from_list(rows)


def prompts():
    return datasets.Dataset.from_list([{"prompt": text(i, 3)} for i in range(8)])


def reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


COMMON = {
    "max_steps": 1,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": 1e-4,
    "gradient_checkpointing": False,
}
SAMPLED = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "per_device_train_batch_size": 4}

#: Trainer, its arguments, its data, and the first entry of the log that tells a reference that is not the policy.
TRAINERS = {
    "dpo": (
        lambda model, folder: trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(output_dir=folder, per_device_train_batch_size=4, max_length=None, **COMMON),
            train_dataset=preferences(),
            processing_class=tokenizer(),
        ),
        ("loss", math.log(2)),
    ),
    "kto": (
        lambda model, folder: trl.KTOTrainer(
            model=model,
            args=trl.KTOConfig(output_dir=folder, per_device_train_batch_size=4, max_length=None, **COMMON),
            train_dataset=judged(),
            processing_class=tokenizer(),
        ),
        ("loss", 0.5),
    ),
    "grpo": (
        lambda model, folder: trl.GRPOTrainer(
            model=model,
            args=trl.GRPOConfig(output_dir=folder, **SAMPLED, **COMMON),
            reward_funcs=reward,
            train_dataset=prompts(),
            processing_class=tokenizer(),
        ),
        ("kl", 0.0),
    ),
    "rloo": (
        lambda model, folder: trl.RLOOTrainer(
            model=model,
            args=trl.RLOOConfig(output_dir=folder, **SAMPLED, **COMMON),
            reward_funcs=reward,
            train_dataset=prompts(),
            processing_class=tokenizer(),
        ),
        ("kl", 0.0),
    ),
}


def fresh(**changes):
    values = {"r": 8, "num_experts": 4, "target_modules": ["k_proj", "o_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(tiny_llama(), GoatConfig(**{**values, **changes}))


def trained(model):
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def continued(folder, **changes):
    trained(fresh(**changes)).save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)


@torch.no_grad()
def logits(model, adapter: str) -> torch.Tensor:
    was = model.active_adapter
    model.eval().set_adapter(adapter)
    output = model(tokens(2, 9)).logits
    model.set_adapter(was)
    model.train()
    return output


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("start", ["continued", "fresh"])
def test_the_reference_is_the_policy(trainer, start, tmp_path):
    model = continued(tmp_path / "saved") if start == "continued" else fresh()
    expected = logits(model, "default")
    build, (entry, value) = TRAINERS[trainer]
    built = build(model, str(tmp_path))
    model = built.model
    assert set(model.peft_config) == {"default", "ref"}
    assert torch.equal(logits(model, "ref"), expected) and torch.equal(logits(model, "default"), expected)
    built.train()
    assert built.state.log_history[0][entry] == pytest.approx(value, abs=1e-6)
    assert torch.equal(logits(model, "ref"), expected)
    assert not torch.equal(logits(model, "default"), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"residual": "fold"},
        {"scaling": "goat_s"},
        {"init": "hydralora"},
        {"init": "random", "seed": 3},
        {"init": "pissa", "svd": "randomized"},
        {"residual_coefficient": 0.0},
        {"rank_pattern": {"up_proj": 16}},
    ],
    ids=lambda changes: next(iter(changes.values())) if isinstance(changes, dict) else None,
)
@pytest.mark.parametrize("start", ["continued", "fresh"])
def test_a_copy_of_the_parameters_is_the_whole_adapter(changes, start, tmp_path, monkeypatch):
    model = continued(tmp_path, **changes) if start == "continued" else trained(fresh(**changes))
    expected = logits(model, "default")
    if changes.get("residual_coefficient") is None:  # without a frozen pair there is nothing to rebuild a start from
        monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: pytest.fail("a second SVD"))
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    assert torch.equal(logits(model, "ref"), expected)


def test_an_adapter_with_the_configuration_of_another_starts_afresh(tmp_path):
    """As with LoRA: a configuration says how to start, whatever became of the adapter that it was used for."""
    for model in (trained(fresh()), continued(tmp_path)):
        start = fresh()
        model.add_adapter("second", model.peft_config["default"])
        torch.testing.assert_close(_without_router(model, "second"), _without_router(start, "default"))
        routers = [layer.goat_adapter["second"].router for layer in _layers(model)]
        assert all(torch.isfinite(router).all() and router.std() > 0.05 for router in routers)
        assert not torch.equal(routers[0], _layers(start)[0].goat_adapter["default"].router)


@pytest.mark.parametrize("change", [{"eta": 0.1}, {"init": "pissa"}, {"rho": 5.0}, {"r": 16}], ids=str)
def test_a_configuration_that_was_changed_since_starts_by_its_new_values(change):
    shared = GoatConfig(r=8, num_experts=4, target_modules=["k_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), shared)
    for name, value in change.items():
        setattr(shared, name, value)
    model.add_adapter("second", shared)
    start = fresh(target_modules=["k_proj"], **change)
    torch.testing.assert_close(_without_router(model, "second"), _without_router(start, "default"))
    assert [layer.scaling["second"] for layer in _layers(model)] == [
        layer.scaling["default"] for layer in _layers(start)
    ]


def test_a_configuration_that_is_only_equal_runs_its_own_svd():
    model = trained(fresh())
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    for layer in _layers(model):
        first, second = layer.goat_adapter["default"], layer.goat_adapter["second"]
        assert torch.equal(first.residual_A, second.residual_A) and first.residual_A is not second.residual_A


def _layers(model) -> list[GoatLinearLayer]:
    return [module for module in model.modules() if isinstance(module, GoatLinearLayer)]


def _without_router(model, adapter: str) -> list[torch.Tensor]:
    """lora_B lora_A and the frozen pair's product of every layer: signs of singular vectors may differ."""
    found = []
    for layer in _layers(model):
        tensors = layer.goat_adapter[adapter]
        found += [tensors.lora_B.detach() @ tensors.lora_A.detach(), tensors.residual_B @ tensors.residual_A]
    return found
