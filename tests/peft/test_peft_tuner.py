"""The tuner as users of LoraConfig know it: targeting, switching, saving, refusing, and the exact base model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_tiny_models import MODELS, TARGETS, batch, outputs_of, tiny_gpt2, tiny_llama, tiny_vit
from torch import nn

from goat_kernels.peft import GoatConfig, GoatLinearLayer
from goat_kernels.reference import goat_reference


def config(**changes) -> GoatConfig:
    return GoatConfig(**{"r": 8, "num_experts": 4, "target_modules": ["q_proj", "v_proj"], **changes})


def goat_llama(**changes) -> PeftModel:
    return get_peft_model(tiny_llama(), config(**changes)).eval()


def goat_layers(model: nn.Module) -> dict[str, GoatLinearLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GoatLinearLayer)}


def logits(model: nn.Module, name: str = "llama") -> torch.Tensor:
    inputs = {key: value for key, value in batch(name).items() if key != "labels"}
    with torch.no_grad():
        return outputs_of(model(**inputs))


def perturb(model: nn.Module, adapter: str = "default") -> None:
    """Move an adapter away from its initialisation."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".goat_adapter.{adapter}." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(("names", "shown"), [(["q_proj", "k_proj", "v_proj"], True), (["q_proj"], False)])
def test_more_than_a_few_weights_show_a_progress_bar(names, shown, capsys):
    get_peft_model(tiny_llama(), config(target_modules=names))
    assert ("GOAT initialisation" in capsys.readouterr().err) == shown


# --- the forward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"scaling": "goat_s"}, {"init": "hydralora"}, {"residual": "fold"}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "hooked"])
def test_a_layer_computes_what_the_oracle_computes(kind, changes):
    if kind == "conv1d":
        model = get_peft_model(tiny_gpt2().double(), config(**{**changes, "target_modules": ["c_fc"]})).eval()
    else:
        model = get_peft_model(tiny_llama().double(), config(**changes)).eval()
    layer = next(iter(goat_layers(model).values()))
    base = layer.get_base_layer()
    with model.disable_adapter():  # while folded, the weight is another
        W0 = (base.weight.T if kind == "conv1d" else base.weight).detach().clone()
    if kind == "hooked":
        base.register_forward_hook(lambda module, args, output: 2 * output)
    perturb(model)
    settings = layer.settings["default"]
    A = layer.goat_adapter["default"].lora_A
    pair = None
    if layer.goat_adapter["default"].residual_A is not None:
        pair = (layer.goat_adapter["default"].residual_A, layer.goat_adapter["default"].residual_B)
    x = torch.randn(3, 5, layer.in_features, dtype=torch.float64)
    expected = goat_reference(
        x,
        W0,
        A.repeat(settings.num_experts, 1) if settings.init == "hydralora" else A,
        layer.goat_adapter["default"].lora_B,
        layer.goat_adapter["default"].router,
        bias=base.bias,
        scaling=layer.goat_adapter["default"].scaling.double()
        if "goat_s" in changes.values()
        else layer.scaling["default"],
        top_k=settings.top_k,
        residual=pair,
    )
    found = layer(x)
    extra = x @ W0.T if kind == "hooked" else 0
    if kind == "hooked" and changes.get("residual") == "fold":
        extra = extra - x @ pair[0].T @ pair[1].T  # the hook doubles the folded weight's product
    torch.testing.assert_close(found, expected.output + extra, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.balance_loss, expected.balance_loss.detach(), rtol=1e-10, atol=0)
    assert layer.expert_load.sum().item() == pytest.approx(settings.top_k)


def test_half_precision_base_keeps_float32_masters():
    base = tiny_llama().to(torch.bfloat16)
    model = get_peft_model(base, config(scaling="goat_s"))
    layer = next(iter(goat_layers(model).values()))
    exact = layer.goat_adapter["default"].scaling.clone()
    adapter = layer.goat_adapter["default"]
    for tensor in (adapter.lora_A, adapter.lora_B, adapter.router, adapter.residual_A, adapter.residual_B):
        assert tensor.dtype == torch.float32
    loss = model(**batch("llama")).loss
    loss.backward()
    assert layer.goat_adapter["default"].lora_A.grad.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    model.to(torch.bfloat16)
    assert layer.goat_adapter["default"].lora_A.dtype == torch.bfloat16
    assert layer.goat_adapter["default"].scaling.dtype == torch.float32
    assert torch.equal(layer.goat_adapter["default"].scaling, exact)


@pytest.mark.parametrize("scaling", ["goat", 100.0])
def test_a_random_start_has_the_size_of_a_loras(scaling):
    """Whatever s is: s B is uniform in +-1/sqrt(R), as ``init_lora_weights=False`` has it in PEFT."""
    layer = next(iter(goat_layers(goat_llama(scaling=scaling, init_weights=False)).values()))
    bound = layer.r["default"] ** -0.5
    assert 0.8 * bound < layer.scaling["default"] * layer.goat_adapter["default"].lora_B.abs().max().item() <= bound


def test_autocast_adapter_dtype_false_gives_the_bases_dtype():
    model = get_peft_model(tiny_llama().to(torch.bfloat16), config(), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if "goat_" in n} == {torch.bfloat16}
    assert torch.isfinite(logits(model)).all()


def test_autocast_runs_in_the_autocast_dtype():
    model = goat_llama()
    layer = next(iter(goat_layers(model).values()))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 32)).dtype == torch.bfloat16
        model(**batch("llama")).loss.backward()
    assert layer.goat_adapter["default"].router.grad.dtype == torch.float32


def test_dropout_is_off_in_eval_and_on_in_training():
    model = goat_llama(lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


# --- targeting ----------------------------------------------------------------------------------------------------

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("changes", "expected", "count"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}, 4),
        ({"target_modules": None}, {"q_proj", "v_proj"}, 4),
        ({"target_modules": "all-linear"}, ATTENTION | MLP, 14),
        ({"target_modules": r".*\.1\.self_attn\.(q|k)_proj"}, {"q_proj", "k_proj"}, 2),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, ATTENTION | MLP - {"down_proj"}, 12),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"q_proj"}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, {"q_proj"}, 1),
    ],
    ids=["names", "default", "all-linear", "regex", "excluded", "layers", "one layer"],
)
def test_targets(changes, expected, count):
    layers = goat_layers(goat_llama(**changes))
    assert {name.rsplit(".", 1)[1] for name in layers} == expected
    assert len(layers) == count


def test_patterns_reach_the_layers():
    model = goat_llama(
        target_modules=["q_proj", "k_proj"], rank_pattern={"q_proj": 16}, alpha_pattern={"k_proj": 64}, scaling="lora"
    )
    for name, layer in goat_layers(model).items():
        is_q = name.endswith("q_proj")
        assert layer.goat_adapter["default"].lora_A.shape == (16 if is_q else 8, 32)
        assert layer.scaling["default"] == (16 / 4 if is_q else 64 / 2)


def test_modules_to_save_and_biases():
    model = get_peft_model(
        tiny_vit(), config(target_modules=["q_proj"], modules_to_save=["classifier"], bias="goat_only")
    )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(any(part in name for name in trainable) for part in (".goat_adapter.default.", ".base_layer."))
    assert any("classifier.modules_to_save" in name for name in trainable)
    assert all(name.endswith(".bias") for name in trainable if "base_layer" in name)
    model(**batch("vit")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_module_that_is_too_small_is_named_before_anything_happens(monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: pytest.fail("an SVD ran"))
    base = tiny_vit()
    with pytest.raises(ValueError, match=r"classifier of shape \(3, 32\) has 3 singular values.*exclude_modules"):
        get_peft_model(base, config(target_modules=["q_proj", "classifier"]))
    assert not goat_layers(base)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj .* 32 singular values.*rank_pattern"):
        get_peft_model(tiny_llama(), config(rank_pattern={"layers.0.self_attn.q_proj": 64}))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("embed_tokens", "model.embed_tokens is a torch.nn.modules.sparse.Embedding, but GOAT adapts linear layers"),
        ("self_attn", "self_attn is a .*LlamaAttention, but GOAT adapts linear layers alone"),
    ],
)
def test_a_module_of_another_kind_is_named(target, message):
    base = tiny_llama()
    with pytest.raises(TypeError, match=message):
        get_peft_model(base, config(target_modules=["q_proj", target]))
    assert not goat_layers(base)


class Small(nn.Module):
    """Layers that GOAT refuses, beside one that it takes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.conv = nn.Conv2d(3, 8, 3)
        self.bilinear = nn.Bilinear(16, 16, 16)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("attention", "attention is a torch.nn.modules.activation.MultiheadAttention, but GOAT adapts linear"),
        ("out_proj", "out_proj is the output projection inside an nn.MultiheadAttention.* no effect.*exclude_modules"),
        ("conv", "conv is a torch.nn.modules.conv.Conv2d"),
        ("bilinear", "bilinear is a torch.nn.modules.linear.Bilinear"),
    ],
)
def test_layers_that_are_no_plain_linear(target, message):
    with pytest.raises(TypeError, match=message):
        get_peft_model(Small(), config(target_modules=["linear", target]))


def test_a_failing_initialisation_leaves_the_model_as_it_was():
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        get_peft_model(base, config())
    assert not goat_layers(base)
    assert not hasattr(base, "peft_config")


# --- several adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["path", "fold"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_base_model_comes_back_exactly(name, residual):
    base = MODELS[name]().eval()
    before = logits(base, name)
    weights = copy.deepcopy(base.state_dict())
    model = get_peft_model(
        base, config(target_modules="all-linear", residual=residual, task_type=TARGETS[name]["task_type"])
    )
    perturb(model)
    adapted = logits(model, name)
    assert not torch.equal(adapted, before)
    with model.disable_adapter():
        assert torch.equal(logits(model, name), before)
    assert torch.equal(logits(model, name), adapted)
    inside = {k.replace("base_layer.", ""): v for k, v in base.state_dict().items() if "goat_" not in k}
    assert all(torch.equal(inside[key], value) for key, value in weights.items())
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model, name), before)  # PEFT's own wrapper wants an adapter to be left
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, name), before)
    assert unloaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in unloaded.state_dict().items())
    assert not unloaded._forward_hooks and not unloaded._forward_pre_hooks


def test_unload_while_folded_restores_the_weights():
    base = tiny_llama().eval()
    before = logits(base)
    model = get_peft_model(base, config(residual="fold"))
    logits(model)
    assert torch.equal(logits(model.unload()), before)


def test_folded_and_path_agree():
    path, fold = goat_llama(), goat_llama(residual="fold")
    fold.load_state_dict(path.state_dict())
    torch.testing.assert_close(logits(fold), logits(path), rtol=1e-4, atol=1e-5)
    layer = next(iter(goat_layers(fold).values()))
    assert layer._folded.folded


def test_folded_weights_survive_moving_and_casting():
    model = goat_llama(residual="fold")
    adapted = logits(model)
    model.to(torch.float64).to(torch.float32)
    assert torch.equal(logits(model), adapted)
    W0 = tiny_llama().model.layers[0].self_attn.q_proj.weight
    layer = next(iter(goat_layers(model).values()))
    assert not torch.equal(layer.get_base_layer().weight, W0)
    assert torch.equal(layer.pretrained_weight(), W0)


def test_three_adapters_switch_add_up_and_leave():
    model = goat_llama()
    first = logits(model)
    model.add_adapter("second", config(r=16, init="pissa"))
    model.add_adapter("third", config(init="lora", target_modules=["q_proj", "up_proj"]))
    perturb(model, "second")
    perturb(model, "third")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    model.base_model.set_adapter(["second", "third"])
    both = logits(model)
    assert not torch.equal(both, second)
    layer = goat_layers(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 32)
    parts = []
    for names in (["second"], ["third"], ["second", "third"]):
        layer.set_adapter(names)
        parts.append(layer(x))
    torch.testing.assert_close(parts[0] + parts[1] - layer.base_layer(x), parts[2], rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["second", "third"])
    model.delete_adapter("third")
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_a_second_adapter_starts_from_the_pretrained_weight_under_fold():
    model = goat_llama(residual="fold")
    logits(model)  # folds
    model.add_adapter("second", config(residual="fold"))
    for layer in goat_layers(model).values():
        assert torch.equal(layer.goat_adapter["second"].lora_A, layer.goat_adapter["default"].lora_A)
    first = logits(model)
    model.set_adapter("second")
    logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@pytest.fixture
def any_peft(monkeypatch):
    """transformers 5.24 refuses PEFT below 0.22, which is not out yet, in its own add_adapter and set_adapter."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")


def test_fold_refuses_company(any_peft):
    model = goat_llama(residual="fold")
    model.add_adapter("second", config())
    message = r"adapters \['default', 'second'\] cannot be active together: residual='fold' of \['default'\]"
    with pytest.raises(ValueError, match=message):
        model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default"]
    assert torch.isfinite(logits(model)).all()
    base = tiny_llama()
    base.add_adapter(config(), "first")
    base.add_adapter(config(residual="fold"), "second")
    with pytest.raises(ValueError, match=r"residual='fold' of \['second'\]"):
        base.set_adapter(["first", "second"])  # transformers asks the layers


def test_fold_refuses_tied_and_special_weights():
    tied = tiny_gpt2()
    with pytest.raises(ValueError, match=r"shared by .*wte.weight.*residual='path'"):
        get_peft_model(tied, config(target_modules=["lm_head"], residual="fold"))

    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(16, 16))
    with pytest.raises(
        ValueError, match=r"0 is a .*Special that is quantised, offloaded, sharded or special: use residual='path'"
    ):
        get_peft_model(model, config(target_modules=["0"], residual="fold"))
    assert goat_layers(get_peft_model(model, config(target_modules=["0"])))


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(safe_merge=True),
        lambda model: model.merge_adapter(),
        lambda model: next(iter(goat_layers(model).values())).merge(),
    ],
)
def test_merging_is_refused_with_the_reason(merge):
    model = goat_llama()
    before = logits(model)
    with pytest.raises(ValueError, match=r"cannot be merged: each token is routed.*unload\(\)"):
        merge(model)
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match=r"\['default'\] cannot be blended into one: each has a router of its own"):
        model.add_weighted_adapter(["default"], [1.0], "blend")


def test_mixed_batches_are_refused():
    model = goat_llama()
    with pytest.raises(ValueError, match=r"adapter_names asks for a different adapter per sample.*set_adapter"):
        model(**batch("llama"), adapter_names=["default"] * 4)


def test_top_1_warns_once_that_the_router_learns_little():
    with pytest.warns(UserWarning, match="top_k=1 .* router learns from the balance loss alone; use top_k=2"):
        goat_llama(top_k=1)
    with pytest.warns(UserWarning, match="learns nothing, as balance_coefficient is 0"):
        goat_llama(top_k=1, balance_coefficient=0.0)


def test_one_expert_is_a_plain_lora_and_warns_of_nothing(recwarn):
    goat_llama(num_experts=1, top_k=1)
    assert not [w for w in recwarn if "top_k" in str(w.message)]


# --- copies, compilation, other tuners ----------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["path", "fold"])
@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_copies(duplicate, residual):
    model = goat_llama(residual=residual)
    perturb(model)
    expected = logits(model)
    if duplicate == "deepcopy":
        other = copy.deepcopy(model)
    elif duplicate == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(logits(other), expected)
    perturb(other)
    other.train()(**batch("llama")).loss.backward()
    assert torch.equal(logits(model), expected)
    assert all(p.grad is None for p in model.parameters())
    with other.disable_adapter():
        assert torch.equal(logits(other.eval()), logits(tiny_llama().eval()))


def test_every_trainable_tensor_gets_a_gradient_even_for_idle_experts():
    model = goat_llama(num_experts=8, top_k=1, init="lora").train()
    inputs = batch("llama", rows=1)
    inputs = {key: value[:, :3] for key, value in inputs.items()}
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_with_lora_beside_goat_in_transformers(any_peft):
    base = tiny_llama()
    base.add_adapter(config(target_modules=["q_proj"]), "goat")
    base.add_adapter(LoraConfig(target_modules=["up_proj"]), "lora")
    base.set_adapter(["goat", "lora"])
    assert torch.isfinite(logits(base)).all()
    base.delete_adapter("goat")
    assert torch.isfinite(logits(base)).all()


def test_a_second_adapter_takes_all_linear_too():
    model = get_peft_model(tiny_llama(), GoatConfig(r=8, num_experts=4, target_modules="all-linear"))
    model.add_adapter("second", GoatConfig(r=4, num_experts=2, target_modules="all-linear"))
    layers = [module for module in model.modules() if isinstance(module, GoatLinearLayer)]
    assert len(layers) > 1
    assert all(set(layer.goat_adapter) == {"default", "second"} for layer in layers)


def test_the_fused_transformer_encoder_does_not_bypass_the_adapter():
    encoder = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    model = get_peft_model(encoder, GoatConfig(r=8, rho=1e-2, target_modules=["linear1", "linear2"])).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fast = model(x)
        with model.disable_adapter():
            base = model(x)
    assert torch.allclose(fast, model(x).detach(), atol=1e-5)
    assert not torch.allclose(fast, base, atol=1e-3)
