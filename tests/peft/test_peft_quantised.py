"""GOAT on quantised bases, loaded as users load them: bitsandbytes 4 and 8 bit, torchao int8 and int4 weights."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from goat_kernels import GoatConfig
from goat_kernels.numerics import relative_error
from goat_kernels.peft.layer import GoatLinearLayer

TOKENS = torch.arange(32).reshape(2, 16) % 64
EXPERTS, RANK, RHO = 4, 8, 10.0
BF16 = torch.finfo(torch.bfloat16).eps


def _torchao(name: str, **options) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    return TorchAoConfig(getattr(quantization, name)(**options))


def _int4_weights() -> TorchAoConfig:
    granularity = pytest.importorskip("torchao.quantization.granularity", reason="needs torchao")
    return _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=granularity.PerGroup(32))


QUANTISATIONS = {
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao int4": _int4_weights,
}
#: Relative distance that the quantisation keeps from the float weight: above what SVDs differ by, below a wrong one.
MOVED = {"bitsandbytes nf4": 0.02, "bitsandbytes int8": 0.002, "torchao int8": 0.002, "torchao int4": 0.02}


def float_model(seed: int = 0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two unrelated models on disk."""
    made = [tmp_path_factory.mktemp(f"base{seed}") for seed in range(2)]
    for seed, folder in enumerate(made):
        float_model(seed).save_pretrained(folder)
    return made


def load(folder, name: str):
    if name.startswith("bitsandbytes") and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTISATIONS[name](), dtype="bfloat16")


def logits(model) -> torch.Tensor:
    """In training mode, which changes nothing here: in evaluation bitsandbytes may repack a 4-bit weight."""
    with torch.no_grad():
        return model.train()(TOKENS).logits


@pytest.fixture(params=QUANTISATIONS)
def base(request, folders):
    return load(folders[0], request.param)


def adapt(model, **changes):
    torch.manual_seed(3)
    values = {"r": RANK, "num_experts": EXPERTS, "target_modules": "all-linear", "rho": RHO, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, GoatConfig(**{**values, **changes}))


def layers(model) -> list[GoatLinearLayer]:
    found = [module for module in model.modules() if isinstance(module, GoatLinearLayer)]
    assert len(found) == 7
    return found


def stored(linear) -> list[torch.Tensor]:
    """What a quantised layer holds: codes and scales."""
    weight = linear.weight
    if hasattr(weight, "__tensor_flatten__"):
        return [getattr(weight, name).clone() for name in weight.__tensor_flatten__()[0]]
    if weight.dtype == torch.int8:
        return [weight.data.clone(), (weight.SCB if linear.state.SCB is None else linear.state.SCB).clone()]
    state = weight.quant_state
    return [weight.data.clone(), state.absmax.clone(), state.state2.absmax.clone()]


def dequantised(linear) -> torch.Tensor:
    """W0 [M, N] in float64, by the libraries' own formats."""
    weight = linear.weight
    if hasattr(weight, "__tensor_flatten__"):
        return weight.dequantize().detach().double()
    if weight.dtype == torch.int8:
        codes, scales = stored(linear)
        return codes.double() * scales.double()[:, None] / 127
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()


def test_experts_start_from_the_dequantised_weight(base, request):
    floats = dict(float_model().named_modules())
    name = request.node.callspec.params["base"]
    model = adapt(base)
    for layer in layers(model):
        W0, original = dequantised(layer.get_base_layer()), floats[layer.name].weight.detach().double()
        assert relative_error(W0, original) > MOVED[name]
        U, S, Vt = torch.linalg.svd(W0)
        chunk, D = len(S) // EXPERTS, RANK // EXPERTS
        A, B = (getattr(layer.goat_adapter["default"], name).detach().double() for name in ("lora_A", "lora_B"))
        for expert in range(EXPERTS):
            own, triples = slice(expert * D, expert * D + D), slice(expert * chunk, expert * chunk + D)
            found = layer.scaling["default"] * B[:, own] @ A[own]
            expected = U[:, triples] * S[triples] @ Vt[triples] / RHO
            # A singular vector turns by the weight's rounding over the gap between two singular values.
            assert relative_error(found, expected) < MOVED[name] / 4


def test_the_base_stays_and_the_loss_falls(base, tmp_path):
    expected = logits(base)
    model = adapt(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)).train()
    before = [stored(layer.get_base_layer()) for layer in layers(model)]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 7 * 3 and all("goat_" in name and p.dtype == torch.float32 for name, p in trained.items())
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3)
    losses = []
    for _ in range(6):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1

    for layer, tensors in zip(layers(model), before, strict=True):
        for now, then in zip(stored(layer.get_base_layer()), tensors, strict=True):
            assert torch.equal(now, then), layer.name
    model.save_pretrained(tmp_path)
    trained_logits = logits(model)
    with model.disable_adapter():
        # prepare_model_for_kbit_training makes the norms float32, so nothing more than their rounding changes.
        assert relative_error(logits(model), expected) < 4 * BF16
    assert torch.equal(logits(PeftModel.from_pretrained(model.unload(), tmp_path)), trained_logits)


def test_disabled_is_the_base_bit_for_bit(base):
    logits(base)  # bitsandbytes' 8-bit layers change their state at the first forward
    expected = logits(base)
    model = adapt(base)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_even_gates_give_the_quantised_layer(base):
    """With every gate at 1/E, experts and frozen pair cancel."""
    expected = logits(base)
    model = adapt(base, top_k=EXPERTS)
    for layer in layers(model):
        layer.goat_adapter["default"].router.data.zero_()
    assert relative_error(logits(model), expected) < BF16


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_after_kbit_preparation(base, use_reentrant):
    model = adapt(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)).train()

    def gradients():
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    options = {"use_reentrant": use_reentrant}
    prepare_model_for_kbit_training(model.get_base_model(), gradient_checkpointing_kwargs=options)
    for name, p in model.named_parameters():
        p.requires_grad_(name in expected)  # it freezes everything
    assert model.get_base_model().is_gradient_checkpointing
    for name, gradient in gradients().items():
        assert torch.equal(gradient, expected[name]), name


def test_a_weight_that_inference_has_repacked(folders, tmp_path):
    """bitsandbytes reorders a 4-bit weight for inference on some CPUs; its own dequantisation then reads nonsense, and
    the gradient to its input is lost."""
    functional = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes").functional
    plain, packed = (load(folders[0], "bitsandbytes nf4") for _ in range(2))
    adapt(plain).save_pretrained(tmp_path)
    for layer in packed.modules():
        if type(layer).__name__ == "Linear4bit":
            weight = layer.weight
            weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    adapted = PeftModel.from_pretrained(packed, tmp_path, is_trainable=True)  # its fingerprint is looked at
    gradients = []
    for model in (
        adapted,
        PeftModel.from_pretrained(load(folders[0], "bitsandbytes nf4"), tmp_path, is_trainable=True),
    ):
        weights = [layer.pretrained_weight() for layer in layers(model)]
        model.enable_input_require_grads()
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([*weights, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(gradients[0]) == 7 + 7 * 3
    for found, expected in zip(*gradients, strict=True):
        assert relative_error(found, expected) < MOVED["bitsandbytes nf4"]  # scales are rounded on the way


# --- which base an adapter belongs to -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_fingerprint(name, folders, tmp_path):
    """An adapter of a quantised base fits that base and its float original, and the reverse; not another model's."""
    ours, other = load(folders[0], name), load(folders[1], name)
    made = adapt(ours)
    assert all(text.split(" ")[1] == "quantised" for text in made.peft_config["default"].base_weights.values())
    made.save_pretrained(tmp_path / "quantised")
    adapt(float_model(0)).save_pretrained(tmp_path / "float")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(load(folders[0], name), tmp_path / "quantised")
        PeftModel.from_pretrained(float_model(0), tmp_path / "quantised")
        PeftModel.from_pretrained(load(folders[0], name), tmp_path / "float")
    for kind, wrong in (("quantised", other), ("quantised", float_model(1)), ("float", other)):
        with pytest.raises(ValueError, match="this is another base model"):
            PeftModel.from_pretrained(wrong, tmp_path / kind)


# --- refused ------------------------------------------------------------------------------------------------------


def test_a_layer_that_gives_no_gradient_to_its_input_is_refused_in_training(folders):
    """torchao's quantised activations: the loss would fall on a wrong gradient, without a word."""
    config = _torchao("Int8DynamicActivationInt8WeightConfig")
    model = adapt(AutoModelForCausalLM.from_pretrained(folders[0], quantization_config=config, dtype="bfloat16"))
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()
    with pytest.raises(RuntimeError, match=r"self_attn\.o_proj gives its input no gradient"):
        model(TOKENS, labels=TOKENS)


def test_fold_is_refused(base):
    with pytest.raises(ValueError, match="is quantised, offloaded, sharded or special: use residual='path'"):
        adapt(base, residual="fold")
