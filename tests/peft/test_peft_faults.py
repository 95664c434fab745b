"""What can be wrong with an adapter on disk: named, before the model is touched; and a failed save costs nothing."""

from __future__ import annotations

import copy
import json
import pickle

import peft.peft_model
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft_tiny_models import outputs_of, tiny_llama, tokens
from safetensors.torch import load_file, save_file

from goat_kernels.peft import GoatConfig, GoatLinearLayer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def goat_llama(base=None, **changes) -> PeftModel:
    config = GoatConfig(**{"r": 8, "num_experts": 4, "target_modules": ["q_proj", "v_proj"], **changes})
    return get_peft_model(tiny_llama() if base is None else base, config).eval()


def logits(model):
    with torch.no_grad():
        return outputs_of(model(input_ids=tokens()))


def other_weights():
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(folder, match: str, base=None, **options) -> None:
    """Loading raises, and the model is as it was."""
    base = tiny_llama() if base is None else base
    before = logits(base)
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(base, folder, **options)
    assert not any(isinstance(module, GoatLinearLayer) for module in base.modules())
    assert torch.equal(logits(base), before)


def edit(folder, **changes) -> None:
    fields = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


@pytest.fixture
def saved(tmp_path):
    goat_llama().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# --- the base model -----------------------------------------------------------------------------------------------


def test_another_bases_weights_are_refused_or_warned_about(saved):
    refused(saved, r"made on LlamaForCausalLM.*another base model, LlamaForCausalLM", other_weights())
    with pytest.warns(UserWarning, match=r"made on .* another base model, .*other_base='warn'"):
        PeftModel.from_pretrained(other_weights(), saved, other_base="warn")
    assert "other_base" not in json.loads((saved / CONFIG).read_text())


def test_a_second_adapter_is_checked_and_may_be_insisted_on(saved):
    model = goat_llama(other_weights())
    with pytest.raises(ValueError, match="another base model"):
        model.load_adapter(saved, "second")
    model = goat_llama(other_weights())
    config = GoatConfig.from_pretrained(saved, other_base="warn")
    with pytest.warns(UserWarning, match="another base model"):
        model.add_adapter("second", config)
    assert not model.load_adapter(saved, "second").missing_keys


def test_other_shapes_are_refused_whatever_the_user_says(saved):
    base = tiny_llama()
    config = copy.deepcopy(base.config)
    config.hidden_size, config.num_attention_heads = 48, 4
    wider = type(base)(config)
    match = r"made on LlamaForCausalLM.*\[\d+, 32\].*in LlamaForCausalLM .*\[\d+, 48\]"
    refused(saved, match, wider, other_base="warn")
    edit(saved, base_weights=None)  # as from a version without fingerprints: the file's shapes count
    refused(saved, r"\[\d+, 32\].*\[\d+, 48\]", wider)


def test_a_model_without_the_adapters_modules(saved):
    config = copy.deepcopy(tiny_llama().config)
    config.num_hidden_layers = 1
    shallow = type(tiny_llama())(config)
    shallow.load_state_dict(tiny_llama().state_dict(), strict=False)
    refused(saved, r"has no model\.layers\.1\.", shallow)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_the_same_base(first, second, tmp_path):
    goat_llama(tiny_llama().to(first)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_llama().to(second), tmp_path)
    refused(tmp_path, "another base model", other_weights())


def test_a_folded_weight_does_not_change_the_fingerprint(tmp_path):
    model = goat_llama(residual="fold")
    logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


# --- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_file(keep, saved):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:keep])
    refused(saved, r"adapter_model\.safetensors is no complete safetensors file")


def test_a_flipped_bit(saved):
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (saved / WEIGHTS).write_bytes(data)
    refused(saved, "SHA-256 differs")


def test_weights_of_another_rank(saved):
    edit(saved, r=16)
    refused(saved, r"shape \[8, 32\], but r=16 and num_experts=4 .* need \[16, 32\]")


def test_a_state_dict_that_does_not_fit_loads_nothing():
    model = goat_llama()
    before = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    state = {key: torch.zeros_like(value) for key, value in before.items()}
    last = [key for key in state if key.endswith(".router")][-1]
    state[last] = torch.zeros(3, 32)
    with pytest.raises(ValueError, match=r"router of adapter 'default' has shape \[4, 32\].*\[3, 32\]"):
        set_peft_model_state_dict(model, state)
    assert all(torch.equal(value, before[key]) for key, value in get_peft_model_state_dict(model).items())


def test_a_pickle_is_opened_only_when_asked(tmp_path, monkeypatch):
    model = goat_llama()
    model.save_pretrained(tmp_path, safe_serialization=False)
    calls = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: calls.append(kwargs) or real(*args, **kwargs))
    refused(tmp_path, r"is a pickle.*allow_pickle=True")
    assert not calls
    PeftModel.from_pretrained(tiny_llama(), tmp_path, allow_pickle=True)
    monkeypatch.setenv("GOAT_KERNELS_ALLOW_PICKLE", "1")
    PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert [kwargs["weights_only"] for kwargs in calls] == [True, True]


def test_fields_of_a_newer_version(saved):
    edit(saved, routing="top_p", goat_kernels_version="99.1")
    refused(saved, r"saved by goat_kernels 99\.1.*routing")
    edit(saved, goat_kernels_version="0.0.1")
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .'routing'"):
        PeftModel.from_pretrained(tiny_llama(), saved)


def test_an_adapter_of_the_official_code_is_pointed_to_convert(saved):
    edit(saved, init_type="goat", init_cof=0.125)
    refused(saved, "goat-kernels convert")


# --- saving -------------------------------------------------------------------------------------------------------


def _disk_full(tensors, filename, metadata=None):
    with open(filename, "wb") as file:
        file.write(b"half")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("route", ["fresh", "loaded", "copied", "pickled"])
def test_a_full_disk_leaves_the_old_adapter(route, saved, monkeypatch):
    model = goat_llama(rho=3.0) if route == "fresh" else PeftModel.from_pretrained(tiny_llama(), saved)
    if route == "copied":
        model = copy.deepcopy(model)
    if route == "pickled":
        model = pickle.loads(pickle.dumps(model))
    before = contents(saved)
    monkeypatch.setattr(peft.peft_model, "safe_save_file", _disk_full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(saved)
    assert contents(saved) == before
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(saved.parent / "new")
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def _full(*args, **kwargs):
    raise OSError(28, "full")


def test_an_error_between_weights_and_configuration(saved, monkeypatch):
    before = contents(saved)
    monkeypatch.setattr(PeftConfig, "save_pretrained", _full)
    with pytest.raises(OSError, match="full"):
        goat_llama(rho=3.0).save_pretrained(saved)
    assert contents(saved) == before


def test_a_good_save_replaces_the_adapter_and_leaves_other_files(saved):
    (saved / "optimizer.pt").write_bytes(b"trainer's")
    (saved / "README.md").write_text("---\nlibrary_name: peft\n---\nmine\n")
    model = goat_llama(rho=3.0)
    model.add_adapter("second", GoatConfig(r=4, num_experts=2, target_modules=["q_proj"]))
    model.save_pretrained(saved)
    assert (saved / "optimizer.pt").read_bytes() == b"trainer's"
    assert "mine" in (saved / "README.md").read_text()
    assert not [path for path in saved.iterdir() if path.name.startswith(".")]
    loaded = PeftModel.from_pretrained(tiny_llama(), saved)
    loaded.load_adapter(saved / "second", "second")
    assert torch.equal(logits(loaded), logits(model))


def test_a_copys_save_is_its_own(tmp_path):
    model = goat_llama()
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(m for m in other.modules() if isinstance(m, GoatLinearLayer)).goat_adapter["default"].lora_A.zero_()
    other.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(saved[key], value) for key, value in get_peft_model_state_dict(other).items())


def test_peft_itself_is_not_changed(tmp_path):
    before = PeftModel.save_pretrained
    model = goat_llama()
    assert PeftModel.save_pretrained is before and peft.PeftModelForCausalLM.save_pretrained is before
    assert isinstance(model, PeftModel) and type(model).__name__ == "PeftModel"
    lora = get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert type(lora) is PeftModel
    assert not torch.nn.modules.module._global_module_registration_hooks


def test_a_changed_file_without_its_digest_loads(saved):
    tensors = {key: 2 * value for key, value in load_file(saved / WEIGHTS).items()}
    save_file(tensors, saved / WEIGHTS)
    edit(saved, weights_sha256=None)
    PeftModel.from_pretrained(tiny_llama(), saved)
