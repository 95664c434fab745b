"""Loading: complete adapters come back exactly by every route, without an SVD; incomplete ones are named."""

from __future__ import annotations

import contextlib
import json

import accelerate
import peft.utils.integrations
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft_tiny_models import TARGETS, batch, outputs_of, tiny_llama, tokens
from safetensors.torch import load_file, save_file
from torch import nn

import goat_kernels.peft.base_layer as base_layer_module
from goat_kernels.peft import GoatConfig, GoatLinearLayer

TENSORS = {"lora_A", "lora_B", "router", "residual_A", "residual_B"}


def config(**changes) -> GoatConfig:
    return GoatConfig(**{"r": 8, "num_experts": 4, "target_modules": ["q_proj", "v_proj"], **changes})


def goat_llama(dtype=torch.float32, **changes) -> PeftModel:
    return get_peft_model(tiny_llama().to(dtype), config(**changes)).eval()


def logits(model):
    with torch.no_grad():
        return outputs_of(model(input_ids=tokens()))


def layers_of(model) -> list[GoatLinearLayer]:
    return [module for module in model.modules() if isinstance(module, GoatLinearLayer)]


def without_digest(folder):
    """As a user does who changes the weights on purpose."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "weights_sha256"}))


@pytest.fixture
def no_svd(monkeypatch):
    @contextlib.contextmanager
    def forbidden():
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "svd", lambda *args, **kwargs: pytest.fail("an SVD ran"))
            yield

    return forbidden


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, TENSORS),
        ({"residual": "fold"}, TENSORS),
        ({"scaling": "goat_s"}, TENSORS | {"scaling"}),
        ({"residual_coefficient": 0}, TENSORS - {"residual_A", "residual_B"}),
        ({"init": "lora"}, TENSORS - {"residual_A", "residual_B"}),
        ({"init": "hydralora"}, TENSORS - {"residual_A", "residual_B"}),
        ({"init_weights": False}, TENSORS),
    ],
    ids=["path", "fold", "goat_s", "no-residual", "zero-init", "hydralora", "init_weights=False"],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_is_complete(changes, expected, low_cpu_mem_usage, tmp_path, no_svd):
    model = goat_llama(**changes)
    before = logits(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rsplit(".", 1)[1] for key in saved} == expected
    with no_svd():
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), before)
    again = get_peft_model_state_dict(loaded)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], value) for key, value in saved.items())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_float32_masters_over_a_bfloat16_base_load_unrounded(low_cpu_mem_usage, tmp_path):
    model = goat_llama(torch.bfloat16, scaling="goat_s")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama().to(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    for key, value in load_file(tmp_path / "adapter_model.safetensors").items():
        found = get_peft_model_state_dict(loaded)[key]
        assert found.dtype == torch.float32 and torch.equal(found, value)
    assert torch.equal(logits(loaded), logits(model))
    assert layers_of(loaded)[0].goat_adapter["default"].lora_A.requires_grad


def test_pickled_files_load(tmp_path):
    model = goat_llama()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(
        logits(PeftModel.from_pretrained(tiny_llama(), tmp_path, allow_pickle=True).eval()), logits(model)
    )


def test_loading_draws_nothing(tmp_path):
    goat_llama().save_pretrained(tmp_path)
    base = tiny_llama()
    torch.manual_seed(42)
    before = torch.get_rng_state()
    PeftModel.from_pretrained(base, tmp_path)(**batch("llama"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_routes_of_transformers_and_auto_classes(tmp_path, no_svd):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(task_type="CAUSAL_LM")).eval()
    before = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    with no_svd():
        auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(auto), before)
        folder = type(tiny_llama()).from_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(folder), before)
        direct = tiny_llama()
        direct.load_adapter(str(tmp_path / "adapter"), adapter_name="other", is_trainable=True)
        assert torch.equal(logits(direct.eval()), before)


def test_several_adapters_from_disk(tmp_path):
    model = goat_llama()
    first = logits(model)
    model.add_adapter("second", config(r=16, init="pissa"))
    model.set_adapter("second")
    second = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "other")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), second)


@pytest.mark.parametrize("residual", ["path", "fold"])
def test_a_loaded_state_replaces_the_one_in_use(residual):
    model, other = goat_llama(residual=residual), goat_llama(residual=residual, rho=3.0)
    logits(model)
    expected = logits(other)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama().eval()))


def test_a_config_from_disk_without_tensors_starts_afresh(tmp_path):
    fresh = goat_llama(scaling="goat_s")
    fresh.peft_config["default"].save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), GoatConfig.from_pretrained(tmp_path)).eval()
    assert torch.isfinite(logits(model)).all()
    mine, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(fresh)
    assert mine.keys() == theirs.keys()
    for key in theirs:
        if "router" not in key:
            torch.testing.assert_close(mine[key], theirs[key])
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in mine.items())


def test_an_incomplete_adapter_is_named(tmp_path):
    goat_llama().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "residual_B" not in key}, file)
    without_digest(tmp_path)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with pytest.raises(RuntimeError, match=r"'default' on model\.layers\.0\..*q_proj was loaded in part: residual_B"):
        logits(model)


def test_the_saved_config_says_what_it_is(tmp_path):
    model = goat_llama(eta=0.1, rho=20.0, scaling="goat", balance_coefficient=0.01)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["initialised"] is True
    assert (saved["eta"], saved["rho"], saved["scaling"], saved["balance_coefficient"]) == (0.1, 20.0, "goat", 0.01)
    assert model.peft_config["default"].initialised is False


def test_low_cpu_mem_usage_and_meta_models_run_no_svd(no_svd):
    with no_svd():
        model = get_peft_model(tiny_llama(), config(), low_cpu_mem_usage=True)
        assert layers_of(model)[0].goat_adapter["default"].lora_A.is_meta
        assert not layers_of(model)[0].goat_adapter["default"].residual_A.is_meta
        with torch.device("meta"):
            meta = type(tiny_llama())(tiny_llama().config)
        model = get_peft_model(meta, config())
        assert layers_of(model)[0].goat_adapter["default"].lora_A.is_meta


# --- bases that are not plain -------------------------------------------------------------------------------------


class Int8Linear(nn.Linear):
    """A quantised linear layer in miniature: int8 codes and one step size."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.step = linear.weight.detach().abs().max() / 127
        codes = (linear.weight.detach() / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def dequantised(self):
        return self.weight.float() * self.step

    def forward(self, x):
        return x @ self.dequantised().T


def quantised(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj = Int8Linear(layer.self_attn.q_proj)
    return model


def test_a_quantised_base_is_dequantised_for_the_svd(monkeypatch):
    real = peft.utils.integrations.dequantize_module_weight
    monkeypatch.setattr(
        base_layer_module,
        "dequantize_module_weight",
        lambda module: module.dequantised() if isinstance(module, Int8Linear) else real(module),
    )
    model = get_peft_model(quantised(tiny_llama()), config(init="pissa", r=32, target_modules=["q_proj"])).train()
    layer = layers_of(model)[0]
    assert isinstance(layer.get_base_layer(), Int8Linear)
    s = layer.scaling["default"]
    rebuilt = (
        s * 10 * layer.goat_adapter["default"].lora_B @ layer.goat_adapter["default"].lora_A
    )  # rho = 10, and all 32 triples are there
    torch.testing.assert_close(rebuilt, layer.get_base_layer().dequantised(), rtol=1e-4, atol=1e-5)
    model(**batch("llama")).loss.backward()
    assert (
        layer.goat_adapter["default"].lora_A.grad is not None
        and layer.goat_adapter["default"].lora_A.dtype == torch.float32
    )


def test_a_quantisation_that_cannot_be_undone_is_named():
    with pytest.raises(TypeError, match=r"q_proj \(Int8Linear\) is quantised in a way .* use init='lora'"):
        get_peft_model(quantised(tiny_llama()), config())
    model = get_peft_model(quantised(tiny_llama()), config(init="lora"))
    model.train()(**batch("llama")).loss.backward()
    with pytest.raises(ValueError, match=r"residual='fold' writes the base weight.*Int8Linear.*residual='path'"):
        get_peft_model(quantised(tiny_llama()), config(residual="fold"))


def test_an_offloaded_base():
    expected = goat_llama()
    model = get_peft_model(accelerate.cpu_offload(tiny_llama(), execution_device="cpu"), config()).eval()
    layer = layers_of(model)[0]
    assert layer.get_base_layer().weight.is_meta
    assert layer.goat_adapter["default"].lora_A.device.type == "cpu"
    model.load_state_dict({k: v for k, v in expected.state_dict().items() if "goat_" in k}, strict=False)
    torch.testing.assert_close(logits(model), logits(expected))  # another order of additions


def test_modules_to_save_come_with_the_adapter(tmp_path):
    model = goat_llama(modules_to_save=["lm_head"], **TARGETS["llama"])
    model.train()(**batch("llama")).loss.backward()
    model.save_pretrained(tmp_path)
    assert any("lm_head" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model.eval()))
