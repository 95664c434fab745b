"""What was saved is what is loaded, whatever the values are, and whichever version saved them."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft_tiny_models import tiny_bert, tiny_llama, tokens
from safetensors.torch import load_file, save_file

from goat_kernels.peft import GoatConfig, GoatLinearLayer, hotswap_adapter

#: Present name of a tensor -> the one that versions before 0.2 saved it under.
FORMER = {
    "goat_adapter.lora_A": "goat_A",
    "goat_adapter.lora_B": "goat_B",
    "goat_adapter.router": "goat_router",
    "goat_adapter.residual_A": "goat_residual_A",
    "goat_adapter.residual_B": "goat_residual_B",
    "goat_adapter.scaling": "goat_scaling",
}


def config(**changes) -> GoatConfig:
    return GoatConfig(**{"r": 8, "num_experts": 4, "target_modules": ["v_proj", "gate_proj"], **changes})


def goat_llama(**changes) -> PeftModel:
    return get_peft_model(tiny_llama(), config(**changes)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


def adapter_tensors(model, name: str = "default") -> dict[str, torch.Tensor]:
    found = {}
    for layer in (module for module in model.modules() if isinstance(module, GoatLinearLayer)):
        found |= {f"{layer.name}.{key}": value for key, value in layer.goat_adapter[name].tensors().items()}
    return found


def fill(model, value: float, only: str = "") -> PeftModel:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and only in name:
            parameter.data.fill_(value)
    return model


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


# --- diverged adapters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0], ids=str)
@pytest.mark.parametrize("only", ["", "lora_B", "router"], ids=["all", "lora_B", "router"])
@pytest.mark.parametrize(
    "changes",
    [{"init": "hydralora"}, {"init": "lora"}, {"init": "milora"}, {"residual_coefficient": 0.0}, {"scaling": "goat_s"}],
    ids=["hydralora", "lora", "milora", "no-residual", "goat_s"],
)
def test_an_adapter_comes_back_as_it_was_saved(changes, only, value, tmp_path):
    model = fill(goat_llama(**changes), value, only)
    expected = adapter_tensors(model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        logits(loaded)
        assert_same(adapter_tensors(loaded), expected)
        loaded.save_pretrained(tmp_path / "again")  # saving starts nothing afresh either
        assert_same(load_file(tmp_path / "again/adapter_model.safetensors"), load_file_of(tmp_path))
    by_transformers = tiny_llama()
    by_transformers.load_adapter(str(tmp_path))
    logits(by_transformers)
    assert_same(adapter_tensors(by_transformers), expected)


def load_file_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_diverged_adapter_among_others(tmp_path):
    fill(goat_llama(init="lora"), math.nan).save_pretrained(tmp_path)
    model = goat_llama()
    expected = logits(model)
    model.load_adapter(tmp_path, "diverged")
    assert torch.equal(logits(model), expected)
    model.set_adapter("diverged")
    assert logits(model).isnan().all()
    assert all(value.isnan().all() for value in adapter_tensors(model, "diverged").values())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_made_before_the_tensors_came_waits_for_them_too(copied, tmp_path):
    model = goat_llama(init="lora")
    fill(model, math.nan).save_pretrained(tmp_path)
    unloaded = config(init="lora")
    unloaded.initialised = True
    waiting = copied(get_peft_model(tiny_llama(), unloaded))
    set_peft_model_state_dict(waiting, load_file_of(tmp_path))
    assert_same(adapter_tensors(waiting), adapter_tensors(model))
    assert logits(waiting).isnan().all()
    never_loaded = copied(get_peft_model(tiny_llama(), unloaded))
    with pytest.raises(RuntimeError, match="was not loaded"):
        logits(never_loaded)


@pytest.mark.parametrize(
    "moved",
    [lambda model: model.double(), lambda model: model.to("cpu"), lambda model: model.bfloat16().float()],
    ids=["double", "cpu", "bfloat16"],
)
def test_a_model_that_is_moved_before_the_tensors_came_waits_for_them_too(moved, tmp_path):
    fill(goat_llama(init="lora"), 0.5).save_pretrained(tmp_path)
    unloaded = config(init="lora")
    unloaded.initialised = True
    waiting = moved(get_peft_model(tiny_llama(), unloaded))
    with pytest.raises(RuntimeError, match="was not loaded"):
        logits(waiting)
    set_peft_model_state_dict(waiting, load_file_of(tmp_path))
    assert all(bool((value == 0.5).all()) for value in adapter_tensors(waiting).values())
    assert torch.isfinite(logits(waiting)).all()


def test_memory_that_to_empty_left_is_no_loaded_adapter():
    with torch.device("meta"):
        model = get_peft_model(type(tiny_llama())(tiny_llama().config), config())
    model.to_empty(device="cpu")
    model.base_model.model.load_state_dict(tiny_llama().state_dict(), strict=False)
    for layer in (module for module in model.modules() if isinstance(module, GoatLinearLayer)):
        layer.base_layer.weight.data.copy_(tiny_llama().get_submodule(layer.name).weight)
        assert len(layer.goat_adapter["default"].missing()) == 5
    logits(model)
    started = goat_llama()
    for name, value in adapter_tensors(started).items():
        if "residual" in name:
            torch.testing.assert_close(adapter_tensors(model)[name].abs(), value.abs(), rtol=1e-3, atol=1e-4)


def test_values_written_straight_into_the_parameters_stay(tmp_path):
    unloaded = config(init="lora")
    unloaded.initialised = True
    model = fill(get_peft_model(tiny_llama(), unloaded), 0.25)
    logits(model)
    assert all(bool((value == 0.25).all()) for value in adapter_tensors(model).values())


def test_a_saved_adapter_that_nobody_loaded_is_not_replaced_by_a_new_one(tmp_path):
    goat_llama().save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), GoatConfig.from_pretrained(tmp_path))
    for use in (logits, lambda model: model.save_pretrained(tmp_path / "other")):
        with pytest.raises(
            RuntimeError, match=r"'default' on model.layers.0.*was not loaded.*PeftModel.from_pretrained"
        ):
            use(model)
    assert not (tmp_path / "other").exists()
    new = GoatConfig.from_pretrained(tmp_path)
    new.initialised = False
    assert torch.isfinite(logits(get_peft_model(tiny_llama(), new))).all()


# --- names of versions before 0.2 ---------------------------------------------------------------------------------


def rename_as_before(folder) -> None:
    """Turn a saved adapter into what versions before 0.2 wrote."""
    renamed = {}
    for key, value in load_file_of(folder).items():
        present = next((name for name in FORMER if key.endswith("." + name)), None)
        renamed[key.removesuffix(present) + FORMER[present] if present else key] = value
    assert not any("goat_adapter" in key for key in renamed)
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "weights_sha256": None, "goat_kernels_version": "0.1.0"}))


@pytest.mark.parametrize("changes", [{}, {"scaling": "goat_s"}, {"init": "hydralora"}, {"residual": "fold"}], ids=str)
def test_an_adapter_of_an_older_version_loads(changes, tmp_path):
    model = goat_llama(**changes)
    fill(model, 0.02, "lora_B")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    rename_as_before(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded), expected)
    second = goat_llama(**changes)
    second.load_adapter(tmp_path, "older")
    second.set_adapter("older")
    assert torch.equal(logits(second), expected)
    injected = inject_adapter_in_model(config(**changes), tiny_llama()).eval()
    set_peft_model_state_dict(injected, load_file_of(tmp_path))
    assert torch.equal(logits(injected), expected)
    swapped = goat_llama(**changes)
    hotswap_adapter(swapped, str(tmp_path))
    assert torch.equal(logits(swapped), expected)
    loaded.save_pretrained(tmp_path / "new")
    assert all("goat_adapter" in key for key in load_file_of(tmp_path / "new"))


def test_a_folder_that_transformers_saved_with_an_older_version(tmp_path):
    """It has no digest, which transformers' own save_pretrained does not write."""
    fill(goat_llama(), 0.02, "lora_B").save_pretrained(tmp_path)
    expected = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval())
    rename_as_before(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), expected)
    model = tiny_llama()
    model.load_adapter(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"before version 0\.2"):
        logits(model)


def test_an_older_adapter_with_a_trained_head(tmp_path):
    def bert():
        return tiny_bert().eval()

    kinds = {"r": 8, "num_experts": 2, "target_modules": ["query", "dense"], "exclude_modules": ["classifier"]}
    model = get_peft_model(bert(), GoatConfig(task_type="SEQ_CLS", bias="goat_only", **kinds)).eval()
    fill(model, 0.03, "lora_B")
    fill(model, 0.1, "classifier")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    rename_as_before(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path).eval()), expected)


def test_an_older_file_with_a_wrong_shape_is_named(tmp_path):
    goat_llama().save_pretrained(tmp_path)
    rename_as_before(tmp_path)
    tensors = load_file_of(tmp_path)
    key = next(key for key in tensors if key.endswith("goat_router"))
    save_file({**tensors, key: tensors[key][:3].clone()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"gate_proj\.router has shape \[3, 32\].*need \[4, 32\]"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_transformers_says_that_it_cannot_load_an_older_adapter(tmp_path):
    goat_llama().save_pretrained(tmp_path)
    digest = json.loads((tmp_path / "adapter_config.json").read_text())["weights_sha256"]
    rename_as_before(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "weights_sha256": digest}))
    model = tiny_llama()
    model.load_adapter(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"before version 0\.2"):
        logits(model)
