"""GoatConfig: bad values are refused by name, good ones survive a trip to disk, and every field explains itself."""

from __future__ import annotations

import dataclasses
import json
import warnings

import peft
import pytest
from peft import PeftConfig
from peft_tiny_models import tiny_llama

from goat_kernels.peft import GoatConfig
from goat_kernels.settings import AdapterSettings

BAD = [
    ({"r": 12}, ValueError, "r=12 must be divisible by num_experts=8"),
    ({"r": 0}, ValueError, "r=0 must be at least 1"),
    ({"r": 8.0}, TypeError, "r must be an int, got 8.0"),
    ({"num_experts": -1}, ValueError, "num_experts=-1 must be at least 1"),
    ({"top_k": 9}, ValueError, "top_k=9 must lie in 1..num_experts=8"),
    ({"top_k": True}, TypeError, "top_k must be an int, got True"),
    ({"scaling": "big"}, ValueError, "scaling='big' is unknown; it must be one of goat, goat_s, lora, rslora"),
    ({"scaling": -1.0}, ValueError, "scaling=-1.0 must be a finite number above 0"),
    ({"eta": 0}, ValueError, "eta=0 must be a finite number above 0"),
    ({"rho": "10"}, TypeError, "rho must be a number, got '10'"),
    ({"lora_alpha": -16}, ValueError, "lora_alpha=-16 must be a finite number above 0"),
    ({"init": "svd"}, ValueError, "init='svd' is unknown; it must be one of goat, goat_mini"),
    ({"residual": "merge"}, ValueError, "residual='merge' is unknown; it must be one of path, fold"),
    ({"residual_coefficient": -0.1}, ValueError, "residual_coefficient=-0.1 must be a finite number at least 0"),
    ({"lora_dropout": 1.0}, ValueError, r"lora_dropout=1.0 must lie in \[0, 1\)"),
    ({"lora_dropout": "none"}, TypeError, "lora_dropout must be a number, got 'none'"),
    ({"balance_coefficient": -1e-3}, ValueError, "balance_coefficient=-0.001 must be a finite number at least 0"),
    ({"svd": "fast"}, ValueError, "svd='fast' is unknown; it must be one of full, randomized"),
    ({"seed": 1.5}, TypeError, "seed must be an int, got 1.5"),
    ({"bias": "some"}, ValueError, "bias='some' is unknown; it must be one of none, all, goat_only"),
    ({"init_weights": "pissa"}, TypeError, "init_weights must be True or False, got 'pissa'.* init"),
    ({"rank_pattern": {"q_proj": 12}}, ValueError, r"rank_pattern\['q_proj'\]: r=12 must be divisible by num_exp"),
    ({"rank_pattern": ["q_proj"]}, TypeError, "rank_pattern must be a dict from module name to number"),
    ({"alpha_pattern": {"q_proj": 0}}, ValueError, r"alpha_pattern\['q_proj'\]=0 must be a finite number above 0"),
    (
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        ValueError,
        r"layers_to_transform=\[0\] needs target_modules as a list of names, got the string 'all-linear'",
    ),
    ({"layers_pattern": "layers"}, ValueError, "layers_pattern='layers' .* layers_to_transform.* is None; set it"),
    ({"task_type": "WRONG"}, ValueError, "Invalid task type: 'WRONG'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_values_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        GoatConfig(**arguments)


def test_defaults_are_those_of_the_settings():
    config = GoatConfig()
    assert config.settings() == AdapterSettings(balance_coefficient=1e-3)


def test_every_field_has_help():
    own = set(GoatConfig.__annotations__)
    for field in dataclasses.fields(GoatConfig):
        if field.name in own:
            assert field.metadata["help"].endswith("."), field.name


def test_settings_of_a_module_follow_the_patterns():
    config = GoatConfig(rank_pattern={"q_proj": 64, r"layers\.1\..*": 16}, alpha_pattern={"k_proj": 3})
    assert config.settings("model.layers.0.self_attn.q_proj").r == 64
    assert config.settings("model.layers.1.self_attn.k_proj").r == 16
    assert config.settings("model.layers.1.self_attn.k_proj").lora_alpha == 3
    assert config.settings("model.layers.0.self_attn.v_proj").r == 32


def test_survives_a_trip_to_disk(tmp_path):
    config = GoatConfig(
        r=16,
        num_experts=4,
        top_k=3,
        target_modules=["q_proj", "v_proj"],
        scaling=12.5,
        init="pissa",
        residual_coefficient=0.1,
        rank_pattern={"q_proj": 8},
        seed=5,
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, GoatConfig)
    assert loaded == config
    assert loaded.to_dict() == config.to_dict()  # __eq__ leaves the version out
    assert not loaded.initialised
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "GOAT"


def test_a_saved_config_is_initialised_where_there_is_an_adapter(tmp_path):
    model = peft.get_peft_model(tiny_llama(), GoatConfig(r=8, num_experts=4, target_modules=["q_proj"]))
    config = model.peft_config["default"]
    config.save_pretrained(tmp_path / "model")  # transformers' save_pretrained writes the weights after it
    assert PeftConfig.from_pretrained(tmp_path / "model").initialised
    assert not config.initialised
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "adapter_model.safetensors").touch()
    GoatConfig().save_pretrained(tmp_path / "weights")
    assert json.loads((tmp_path / "weights" / "adapter_config.json").read_text())["initialised"] is True


def test_the_method_is_registered():
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["GOAT"] is GoatConfig
    config = peft.get_peft_config({"peft_type": "GOAT", "r": 8, "target_modules": ["q_proj"]})
    assert isinstance(config, GoatConfig)
    model = peft.get_peft_model(tiny_llama(), config)
    assert model.peft_type == "GOAT"
    assert model.peft_type.value.lower() + "_" == model.base_model.prefix


def test_lora_names_are_understood_or_warned_about():
    assert GoatConfig(bias="lora_only").bias == "goat_only"
    with pytest.warns(UserWarning, match=r"lora_alpha=32 .* scaling='goat' ignores it"):
        GoatConfig(lora_alpha=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GoatConfig(lora_alpha=32, scaling="lora")
