"""What users of PEFT take for granted from other libraries and Python: offloading, LoRA+, names, imports, memory."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.optimizers import create_loraplus_optimizer
from peft_tiny_models import tiny_gpt2, tiny_llama, tokens
from torch import nn

import goat_kernels
from goat_kernels import GoatConfig, GoatLinear
from goat_kernels.peft import GoatLinearLayer


def config(**changes) -> GoatConfig:
    return GoatConfig(**{"r": 8, "num_experts": 4, "target_modules": ["k_proj", "down_proj"], **changes})


def perturbed(model, adapter: str = "default"):
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


# --- accelerate's offloading --------------------------------------------------------------------------------------

MAP = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
MAP |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}


def offloaded(model, how: str, folder):
    cpu = torch.device("cpu")
    if how == "cpu_offload":
        return cpu_offload(model, execution_device=cpu)
    if how == "disk_offload":
        return disk_offload(model, str(folder), execution_device=cpu)
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    device_map = {prefix + name: device for name, device in MAP.items()}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize(
    "changes", [{}, {"scaling": "goat_s"}, {"init": "hydralora"}], ids=["path", "goat_s", "hydralora"]
)
def test_offloading_after_adapting_changes_no_bit(changes, how, tmp_path):
    model = perturbed(get_peft_model(tiny_llama(), config(**changes)))
    expected, base = logits(model), logits(tiny_llama().eval())
    model = offloaded(model, how, tmp_path)
    layer = [module for module in model.modules() if isinstance(module, GoatLinearLayer)][-1]
    assert layer.goat_adapter["default"].lora_A.is_meta  # offloaded in truth
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("changes", [{}, {"scaling": "goat_s"}, {"residual": "fold"}], ids=["path", "goat_s", "fold"])
def test_loading_onto_a_dispatched_model_changes_no_bit(changes, tmp_path):
    model = perturbed(get_peft_model(tiny_llama(), config(**changes)))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = offloaded(tiny_llama().eval(), "device_map", tmp_path)
    loaded = PeftModel.from_pretrained(
        base, tmp_path / "adapter", offload_folder=str(tmp_path / "again"), max_memory={"cpu": "1GIB"}
    )
    assert torch.equal(logits(loaded.eval()), expected)


def test_two_adapters_under_offloading_add_up(tmp_path):
    model = get_peft_model(tiny_llama(), config())
    model.add_adapter("second", config(init="lora"))
    perturbed(perturbed(model), "second")
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    torch.testing.assert_close(logits(offloaded(model, "cpu_offload", tmp_path)), expected, rtol=1e-5, atol=1e-6)


# --- LoRA+ --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [tiny_llama, tiny_gpt2])
def test_lora_plus_trains_every_lora_B_faster(adapted):
    targets = {"target_modules": ["c_attn", "c_proj"]} if adapted is tiny_gpt2 else {}
    model = get_peft_model(adapted(), config(**targets))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=3e-4, loraplus_lr_ratio=8.0)
    fast = {id(p) for group in optimizer.param_groups if group["lr"] == pytest.approx(24e-4) for p in group["params"]}
    slow = {id(p) for group in optimizer.param_groups if group["lr"] == pytest.approx(3e-4) for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert id(parameter) in (fast if ".lora_B" in name else slow), name
    assert len(fast) == sum(isinstance(module, GoatLinearLayer) for module in model.modules())


# --- names of adapters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["get", "setdefault", "popitem", "items", "update", "keys", "lora_B", "weight", "T"])
def test_an_adapter_may_have_the_name_of_a_method(name, tmp_path):
    model = get_peft_model(tiny_llama(), config(), adapter_name=name)
    expected = logits(perturbed(model, name))
    model.add_adapter("values", config(init="lora"))
    model.set_adapter("values")
    assert not torch.equal(logits(model), expected)
    model.set_adapter(name)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path, selected_adapters=[name])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / name, adapter_name="clear").eval()
    assert torch.equal(logits(loaded), expected)
    model.delete_adapter("values")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["a.b", ""])
def test_a_name_that_cannot_be_part_of_a_name_is_refused(name):
    with pytest.raises(ValueError, match="adapter_name="):
        inject_adapter_in_model(config(target_modules=["0"]), nn.Sequential(nn.Linear(32, 32)), adapter_name=name)


# --- memory -------------------------------------------------------------------------------------------------------


def adapted_and_saved(folder):
    model = get_peft_model(tiny_llama(), config())
    model.save_pretrained(folder)
    return model


def loaded(folder):
    adapted_and_saved(folder)
    return PeftModel.from_pretrained(tiny_llama(), folder)


def trained(folder):
    model = get_peft_model(tiny_llama(), config(residual="fold")).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    model.add_adapter("second", config(init="lora"))
    return model


def with_lora(folder):
    return get_peft_model(tiny_llama(), LoraConfig(target_modules=["k_proj"]))


@pytest.mark.parametrize("make", [adapted_and_saved, loaded, trained, with_lora])
def test_a_deleted_model_is_gone_at_once(make, tmp_path):
    model = make(tmp_path)
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


def test_a_deleted_layer_is_gone_at_once():
    layer = GoatLinear.from_linear(nn.Linear(32, 48), r=8, residual="fold")
    layer(torch.randn(3, 32)).sum().backward()
    weight = weakref.ref(layer.weight)
    gc.collect()
    gc.disable()
    try:
        del layer
        assert weight() is None
    finally:
        gc.enable()


# --- imports ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(nn.Sequential(nn.Linear(32, 32)), config(target_modules=["0"])).save_pretrained(folder)
    return folder


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


LOAD = """
import torch
model = peft.PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(32, 32)), {folder!r}, other_base="warn")
print(type(model.base_model).__name__)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "imports",
    [
        "import goat_kernels, peft",
        "import peft, goat_kernels",
        "import goat_kernels\nfrom peft.tuners import lora\nimport peft",
        "import goat_kernels, importlib.util\nassert importlib.util.find_spec('peft')\nimport peft",
    ],
)
def test_importing_the_package_is_enough_to_load_an_adapter(imports, saved):
    done = run(imports + LOAD.format(folder=str(saved)))
    assert done.stdout.split() == ["GoatModel"], done.stderr


def test_importing_the_package_does_not_import_peft():
    done = run("import sys, goat_kernels\nprint('peft' in sys.modules, 'transformers' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.long
def test_peft_can_be_imported_where_our_half_cannot():
    code = "import sys\nsys.modules['goat_kernels.peft'] = None\nimport goat_kernels, peft\nprint(peft.LoraConfig().r)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["8"], done.stderr
    assert "GOAT could not be registered with PEFT" in done.stderr


@pytest.mark.long
def test_the_model_card_tells_a_process_without_the_package(saved):
    done = run("import peft" + LOAD.format(folder=str(saved)))
    assert "KeyError: 'GOAT'" in done.stderr
    card = (saved / "README.md").read_text()
    assert "KeyError: 'GOAT'" in card and "import goat_kernels" in card and "pip install goat-kernels" in card


def test_the_model_card_keeps_what_the_user_wrote(tmp_path):
    model = get_peft_model(tiny_llama(), config())
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nMy notes.\n")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "My notes." in card and card.count("## How to load this adapter") == 1


def test_the_version_of_the_saved_adapter_is_the_packages(saved):
    assert f'"goat_kernels_version": "{goat_kernels.__version__}"' in (saved / "adapter_config.json").read_text()
