"""Base weights that DeepSpeed's ZeRO-3 has partitioned are gathered for the SVD, and only for it.

DeepSpeed itself is not run: a stand-in marks parameters as it does (``ds_id``, ``ds_numel``, ``ds_shape``, no data),
and its GatheredParameters brings the data back.
"""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch
from peft import get_peft_model
from peft_tiny_models import MODELS, TARGETS

from goat_kernels.peft import GoatConfig


@pytest.fixture
def gathered(monkeypatch):
    """A stand-in for DeepSpeed; the parameters that were gathered, in order."""
    seen = []

    @contextlib.contextmanager
    def gather(parameters, modifier_rank=None, fwd_module=None):
        assert modifier_rank is None, "nothing is written, so nothing needs to be broadcast"
        for parameter in parameters:
            assert parameter.numel() == 0, "gathered twice"
            parameter.data = parameter.whole
            seen.append(parameter.ds_id)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.data = torch.empty(0, dtype=parameter.dtype)

    module = types.ModuleType("deepspeed")
    module.zero = types.SimpleNamespace(GatheredParameters=gather)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    return seen


def partitioned(model):
    for index, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_numel, parameter.ds_shape = index, parameter.numel(), parameter.shape
        parameter.whole = parameter.data
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return model


def adapted(model, name: str, **changes):
    torch.manual_seed(3)
    config = {"r": 8, "num_experts": 4, "target_modules": "all-linear", **TARGETS[name], "modules_to_save": None}
    return get_peft_model(model, GoatConfig(**{**config, **changes}))


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # nn.Linear; Conv1D with biases
def test_the_start_is_that_of_the_whole_weights(name, gathered):
    model = adapted(partitioned(MODELS[name]()), name)
    layers = [module for module in model.modules() if hasattr(module, "goat_adapter")]
    parameters = [p for layer in layers for p in layer.get_base_layer().parameters()]
    assert sorted(gathered) == sorted(p.ds_id for p in parameters)
    assert all(p.numel() == 0 for p in parameters)
    found = {key: tensor for key, tensor in model.state_dict().items() if "goat_" in key}
    expected = adapted(MODELS[name](), name).state_dict()
    assert len(found) == 5 * len(layers)
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key
    assert model.peft_config["default"].base_weights == {}  # would cost a gathering of every weight at loading


def test_what_the_caller_has_gathered_is_left_alone(gathered):
    base = partitioned(MODELS["llama"]())
    with sys.modules["deepspeed"].zero.GatheredParameters(list(base.parameters())):
        before = len(gathered)
        model = adapted(base, "llama")
        assert len(gathered) == before
        assert torch.equal(
            model.state_dict()["base_model.model.model.layers.0.mlp.up_proj.goat_adapter.default.lora_A"],
            adapted(MODELS["llama"](), "llama").state_dict()[
                "base_model.model.model.layers.0.mlp.up_proj.goat_adapter.default.lora_A"
            ],
        )


def test_rules_without_singular_values_gather_nothing(gathered):
    adapted(partitioned(MODELS["llama"]()), "llama", init="lora")
    assert gathered == []


def test_fold_is_refused(gathered):
    with pytest.raises(ValueError, match="sharded or special: use residual='path'"):
        adapted(partitioned(MODELS["llama"]()), "llama", residual="fold")
    assert gathered == []
