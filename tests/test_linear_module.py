"""``GoatLinear`` is a drop-in nn.Linear: construction, state, disabling, folding, casting, copying, training.

What it computes is ``goat_linear`` on its own tensors; these tests hold the module to the oracle with them, and to the
promise that the pretrained weight is never lost.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from goat_problems import assert_close, output_weights
from torch import nn

from goat_kernels import AdapterSettings, GoatLinear, goat_reference
from goat_kernels.adapter import FoldedWeight

N, M = 20, 24
SMALL = {"r": 8, "num_experts": 4}
FORMS = ("path", "fold")
INITS = ("goat", "goat_mini", "pissa", "milora", "pissa_milora", "random", "lora", "hydralora")


def linear(dtype=torch.float32, bias=True) -> nn.Linear:
    return nn.Linear(N, M, bias=bias, dtype=dtype)


def trained(layer: GoatLinear) -> GoatLinear:
    """The layer with an adapter away from its start, so that nothing cancels."""
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B, layer.router):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return layer


def expected_output(layer: GoatLinear, x: torch.Tensor, W0: torch.Tensor):
    """The oracle on the layer's own tensors in float64, from the pretrained weight."""
    E = layer.settings.num_experts
    A = layer.lora_A.detach().double()
    scaling = layer.scaling
    residual = None
    if layer.residual_A is not None:
        residual = (layer.residual_A.double(), layer.residual_B.double())
    return goat_reference(
        x.double(),
        W0.double(),
        A.repeat(E, 1) if layer.settings.init == "hydralora" else A,
        layer.lora_B.detach().double(),
        layer.router.detach().double(),
        bias=None if layer.bias is None else layer.bias.detach().double(),
        scaling=scaling.double() if isinstance(scaling, torch.Tensor) else scaling,
        top_k=layer.settings.top_k,
        residual=residual,
    )


# --- construction -------------------------------------------------------------------------------------------------


def test_the_signature_is_the_documented_one():
    parameters = inspect.signature(GoatLinear.__init__).parameters
    positional = [name for name, p in parameters.items() if p.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["self", "in_features", "out_features", "bias"]
    documented = {
        "bias": True,
        "r": 32,
        "num_experts": 8,
        "top_k": 2,
        "scaling": "goat",
        "eta": 1.0,
        "rho": 10.0,
        "lora_alpha": 16,
        "init": "goat",
        "residual": "path",
        "residual_coefficient": None,
        "dropout": 0.0,
        "balance_coefficient": 0.0,
        "device": None,
        "dtype": None,
    }
    assert {name: parameters[name].default for name in documented} == documented
    fields = AdapterSettings.__dataclass_fields__
    assert {n: f.default for n, f in fields.items()} == {n: parameters[n].default for n in fields}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("residual", FORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_the_layer_is_the_oracle_on_its_own_tensors(init, residual, bias):
    base = linear(torch.float64, bias)
    W0 = base.weight.detach().clone()
    layer = trained(GoatLinear.from_linear(base, init=init, residual=residual, **SMALL))
    x = torch.randn(3, 5, N, dtype=torch.float64)
    expected = expected_output(layer, x, W0)
    assert_close("output", layer(x), expected.output, torch.float64)
    assert_close("balance loss", layer.balance_loss, expected.balance_loss, torch.float64)
    assert_close("load", layer.expert_load, expected.selection.double().mean(dim=0), torch.float64)
    assert not layer.balance_loss.requires_grad and not layer.expert_load.requires_grad


def test_statistics_live_outside_the_state_and_follow_the_layer():
    layer = GoatLinear(N, M, device="meta", **SMALL)
    assert layer.balance_loss is None and layer.expert_load is None
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.balance_loss is None and layer.expert_load is None
    assert not [
        name for name in [*layer.state_dict(), *dict(layer.named_buffers())] if "load" in name or "loss" in name
    ]
    layer(torch.randn(6, N))
    balance_loss, load = layer.balance_loss, layer.expert_load
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
        copy.deepcopy(layer).double(),
        copy.deepcopy(layer).bfloat16(),
    )
    for twin in copies:
        assert torch.equal(twin.expert_load.float(), load) and torch.equal(twin.balance_loss.float(), balance_loss)
        assert twin.expert_load.dtype == (torch.float64 if twin.weight.dtype == torch.float64 else torch.float32)
    assert twin is not layer and torch.equal(layer.expert_load, load), "a copy's statistics are its own"


@pytest.mark.parametrize("init", INITS)
def test_attributes_shapes_and_what_trains(init):
    layer = GoatLinear(N, M, init=init, **SMALL)
    rows = 2 if init == "hydralora" else 8
    assert layer.lora_A.shape == (rows, N) and layer.lora_B.shape == (M, 8) and layer.router.shape == (4, N)
    assert layer.weight.shape == (M, N) and layer.bias.shape == (M,)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B", "router"}
    assert layer.balance_loss is None and layer.expert_load is None
    assert layer.scaling == math.sqrt(3 * N / 2)
    assert (layer.in_features, layer.out_features) == (N, M)
    assert "r=8" in repr(layer) and "num_experts=4" in repr(layer)


def test_from_linear_shares_the_weight_and_freezes_it():
    base = linear().eval()
    layer = GoatLinear.from_linear(base, **SMALL)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert not base.weight.requires_grad and not base.bias.requires_grad
    assert not layer.training
    assert GoatLinear.from_linear(linear(), **SMALL).training


def test_a_new_layer_draws_its_weight_as_nn_linear_does():
    torch.manual_seed(9)
    plain = linear()
    torch.manual_seed(9)
    layer = GoatLinear(N, M, **SMALL)
    assert torch.equal(layer.weight, plain.weight) and torch.equal(layer.bias, plain.bias)


@pytest.mark.parametrize("init", INITS)
def test_a_generator_makes_a_layer_reproducible(init):
    def build(seed):
        before = torch.get_rng_state()
        layer = GoatLinear(N, M, init=init, generator=torch.Generator().manual_seed(seed), **SMALL)
        assert torch.equal(torch.get_rng_state(), before)
        return layer.state_dict()

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["weight"], other["weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_adapter_has_float32_or_better(dtype):
    layer = GoatLinear(N, M, dtype=dtype, **SMALL)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    adapter = (layer.lora_A, layer.lora_B, layer.router, layer.residual_A, layer.residual_B)
    assert {tensor.dtype for tensor in adapter} == {wide}
    output = layer(torch.randn(5, N, dtype=dtype))
    assert output.dtype == dtype
    output.sum().backward()
    assert {p.grad.dtype for p in (layer.lora_A, layer.lora_B, layer.router)} == {wide}


def test_the_default_dtype_is_respected():
    torch.set_default_dtype(torch.float64)
    try:
        assert GoatLinear(N, M, **SMALL).weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# --- plain LoRA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", FORMS)
def test_one_expert_is_a_plain_lora(residual):
    base = linear(torch.float64)
    W0, b = base.weight.detach().clone(), base.bias.detach()
    options = {"r": 3, "num_experts": 1, "top_k": 1, "scaling": "lora", "lora_alpha": 6, "init": "lora"}
    layer = trained(GoatLinear.from_linear(base, residual=residual, **options))
    x = torch.randn(7, N, dtype=torch.float64)
    A, B = layer.lora_A.detach().clone().requires_grad_(), layer.lora_B.detach().clone().requires_grad_()
    by_hand = F.linear(x, W0, b) + (6 / 3) * (x @ A.T) @ B.T
    output = layer(x)
    assert_close("output", output, by_hand, torch.float64)
    (output * output_weights(output)).sum().backward()
    (by_hand * output_weights(output)).sum().backward()
    assert_close("lora_A", layer.lora_A.grad, A.grad, torch.float64)
    assert_close("lora_B", layer.lora_B.grad, B.grad, torch.float64)
    assert not bool(layer.router.grad.any())


@pytest.mark.parametrize("residual", FORMS)
def test_one_expert_from_the_svd_starts_at_the_pretrained_layer(residual):
    base = linear(torch.float64)
    x = torch.randn(7, N, dtype=torch.float64)
    expected = base(x)
    layer = GoatLinear.from_linear(base, r=3, num_experts=1, top_k=1, init="pissa", residual=residual)
    assert_close("output", layer(x), expected, torch.float64)


# --- the pretrained weight is never lost --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("residual", FORMS)
def test_disabling_gives_the_pretrained_layer_bit_for_bit(residual, dtype):
    base = linear(dtype)
    W0 = base.weight.detach().clone()
    x = torch.randn(6, N, dtype=dtype)
    expected = base(x)
    layer = trained(GoatLinear.from_linear(base, residual=residual, **SMALL))
    before = layer(x)
    weight = layer.weight.detach().clone()
    assert torch.equal(weight, W0) == (residual == "path")
    assert not torch.equal(before, expected)
    with layer.disable_adapter():
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer.weight, W0)
        with layer.disable_adapter():
            assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected), "the inner context must not switch the adapter on"
    assert torch.equal(layer.weight, weight) and torch.equal(layer(x), before)
    assert (layer.weight is base.weight) == (residual == "path"), "fold overwrites, so it must not share"
    assert torch.equal(base.weight, W0)


@pytest.mark.parametrize("residual", FORMS)
def test_disabling_ends_with_an_exception_too(residual):
    layer = trained(GoatLinear(N, M, residual=residual, **SMALL))
    x = torch.randn(6, N)
    before = layer(x)
    with pytest.raises(KeyError), layer.disable_adapter():
        raise KeyError
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_many_switches_do_not_drift(dtype):
    layer = trained(GoatLinear(N, M, residual="fold", dtype=dtype, **SMALL))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    folded = layer.weight.detach().clone()
    for _ in range(20):
        with layer.disable_adapter():
            assert torch.equal(layer.weight, state["weight"])
        assert torch.equal(layer.weight, folded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_fold_is_w0_minus_w_res_rounded_once(dtype):
    base = linear(dtype)
    W0 = base.weight.detach().clone()
    layer = GoatLinear.from_linear(base, residual="fold", **SMALL)
    wide = layer.residual_B.dtype
    assert torch.equal(layer.weight, (W0.to(wide) - layer.residual_B @ layer.residual_A).to(dtype))


@pytest.mark.parametrize("residual", FORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_to_linear_is_the_pretrained_layer_and_shares_nothing(residual, bias, dtype):
    base = linear(dtype, bias)
    W0 = base.weight.detach().clone()
    layer = trained(GoatLinear.from_linear(base, residual=residual, **SMALL))
    plain = layer.to_linear()
    assert type(plain) is nn.Linear and torch.equal(plain.weight, W0)
    assert (plain.bias is None) == (not bias)
    assert plain.weight.data_ptr() != layer.weight.data_ptr()
    x = torch.randn(4, N, dtype=dtype)
    with layer.disable_adapter():
        assert torch.equal(plain(x), layer(x))


# --- state --------------------------------------------------------------------------------------------------------

STATE_CASES = [
    pytest.param(residual, {"init": init, "scaling": scaling}, id=f"{residual}-{init}-{scaling}")
    for residual in FORMS
    for init, scaling in [("goat", "goat"), ("goat", "goat_s"), ("lora", "goat"), ("hydralora", "rslora")]
]


@pytest.mark.parametrize(("residual", "options"), STATE_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_state_dict_round_trip_gives_bit_equal_outputs(residual, options, dtype):
    base = linear(dtype)
    W0 = base.weight.detach().clone()
    layer = trained(GoatLinear.from_linear(base, residual=residual, **options, **SMALL))
    state = layer.state_dict()
    assert torch.equal(state["weight"], W0), "a state dict holds the pretrained weight"
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    x = torch.randn(6, N, dtype=dtype)
    expected = layer(x)
    fresh = GoatLinear(N, M, residual=residual, dtype=dtype, **options, **SMALL)
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(x), expected)
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    with fresh.disable_adapter():
        assert torch.equal(fresh.weight, W0)


@pytest.mark.parametrize("residual", FORMS)
@pytest.mark.parametrize("assign", [True, False])
def test_loading_inside_a_model_and_by_assignment(residual, assign):
    def model():
        return nn.Sequential(GoatLinear(N, M, residual=residual, **SMALL), nn.ReLU(), nn.Linear(M, 3))

    first, second = model(), model()
    trained(first[0])
    second.load_state_dict(first.state_dict(), assign=assign)
    x = torch.randn(6, N)
    assert torch.equal(first(x), second(x))
    with first[0].disable_adapter(), second[0].disable_adapter():
        assert torch.equal(first(x), second(x))
    assert torch.equal(first(x), second(x))


def test_fold_and_path_load_each_others_state():
    x = torch.randn(6, N, dtype=torch.float64)
    path = trained(GoatLinear(N, M, residual="path", dtype=torch.float64, **SMALL))
    fold = GoatLinear(N, M, residual="fold", dtype=torch.float64, **SMALL)
    fold.load_state_dict(path.state_dict())
    assert_close("fold", fold(x), path(x), torch.float64)
    path.load_state_dict(fold.state_dict())
    assert_close("path", path(x), fold(x), torch.float64)


@pytest.mark.parametrize("residual", FORMS)
def test_loading_while_disabled_takes_effect_when_enabled(residual):
    source, target = (trained(GoatLinear(N, M, residual=residual, **SMALL)) for _ in range(2))
    x = torch.randn(6, N)
    with target.disable_adapter():
        target.load_state_dict(source.state_dict())
        assert torch.equal(target(x), source.to_linear()(x))
        assert torch.equal(target.state_dict()["weight"], source.state_dict()["weight"])
    assert torch.equal(target(x), source(x))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("residual", FORMS)
def test_a_copy_is_equal_and_independent(residual, duplicate):
    layer = trained(GoatLinear(N, M, residual=residual, scaling="goat_s", **SMALL))
    W0 = layer.state_dict()["weight"].clone()
    x = torch.randn(6, N)
    expected = layer(x)
    twin = duplicate(layer)
    assert torch.equal(twin(x), expected)
    with twin.disable_adapter():
        assert torch.equal(twin.weight, W0)
        assert torch.equal(layer(x), expected), "disabling the copy must not touch the original"
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), expected)
    with layer.disable_adapter():
        assert torch.equal(layer.weight, W0)


@pytest.mark.parametrize("residual", FORMS)
def test_a_copy_survives_a_forward_with_gradients(residual):
    layer = GoatLinear(N, M, residual=residual, **SMALL)
    layer(torch.randn(4, N)).sum().backward()
    copy.deepcopy(layer)
    pickle.dumps(layer)


@pytest.mark.parametrize("residual", FORMS)
@pytest.mark.parametrize("scaling", ["goat", "goat_s"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_casting_keeps_the_layer_and_the_pretrained_weight(residual, scaling, dtype):
    layer = trained(GoatLinear(N, M, residual=residual, scaling=scaling, **SMALL))
    W0 = layer.state_dict()["weight"].clone()
    s = torch.as_tensor(layer.scaling).clone()
    x = torch.randn(6, N)
    expected = layer(x)
    assert layer.to(dtype) is layer
    assert torch.equal(torch.as_tensor(layer.scaling), s) and torch.as_tensor(layer.scaling).dtype == s.dtype
    assert_close("output", layer(x.to(dtype)), expected, torch.float32 if dtype == torch.float64 else dtype)
    with layer.disable_adapter():
        assert torch.equal(layer.weight, W0.to(dtype))
    assert torch.equal(layer.state_dict()["weight"], W0.to(dtype))
    assert layer.state_dict()["weight"].dtype == dtype


@pytest.mark.parametrize("residual", FORMS)
@pytest.mark.parametrize("scaling", ["goat", "goat_s"])
def test_a_meta_layer_can_be_filled_in(residual, scaling):
    layer = GoatLinear(N, M, residual=residual, scaling=scaling, device="meta", **SMALL)
    assert all(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()])
    layer.to_empty(device="cpu")
    layer.reset_parameters(torch.Generator().manual_seed(4))
    options = {"residual": residual, "scaling": scaling, **SMALL}
    direct = GoatLinear(N, M, generator=torch.Generator().manual_seed(4), **options)
    x = torch.randn(5, N)
    assert torch.equal(layer(x), direct(x))
    state = {name: value.clone() for name, value in trained(direct).state_dict().items()}

    loaded = GoatLinear(N, M, device="meta", **options)
    loaded.load_state_dict(state, assign=True)
    assert torch.equal(loaded(x), direct(x))
    emptied = GoatLinear(N, M, device="meta", **options).to_empty(device="cpu")
    emptied.load_state_dict(state)
    assert torch.equal(emptied(x), direct(x))
    with emptied.disable_adapter(), loaded.disable_adapter(), direct.disable_adapter():
        assert torch.equal(emptied(x), direct(x)) and torch.equal(loaded(x), direct(x))


def test_from_linear_on_the_meta_device_computes_nothing():
    layer = GoatLinear.from_linear(nn.Linear(N, M, device="meta"), **SMALL)
    assert layer.lora_A.is_meta and layer.weight.is_meta


@pytest.mark.parametrize("residual", FORMS)
def test_reset_adapter_starts_over_from_the_pretrained_weight(residual):
    layer = GoatLinear(N, M, residual=residual, generator=torch.Generator().manual_seed(2), **SMALL)
    W0 = layer.state_dict()["weight"].clone()
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    trained(layer).reset_adapter()
    after = layer.state_dict()
    assert torch.equal(after["weight"], W0)
    for name in ("lora_A", "lora_B", "residual_A", "residual_B"):
        assert torch.equal(after[name], start[name]), name


# --- training -----------------------------------------------------------------------------------------------------


def test_an_unfrozen_weight_and_bias_get_their_gradients():
    layer = trained(GoatLinear(N, M, dtype=torch.float64, **SMALL))
    layer.weight.requires_grad_(True)
    layer.bias.requires_grad_(True)
    x = torch.randn(7, N, dtype=torch.float64)
    output = layer(x)
    grad_y = output_weights(output)
    output.backward(grad_y)
    assert_close("weight", layer.weight.grad, grad_y.T @ x, torch.float64)
    assert_close("bias", layer.bias.grad, grad_y.sum(dim=0), torch.float64)


@pytest.mark.parametrize("residual", FORMS)
def test_gradients_equal_the_oracles(residual):
    layer = trained(GoatLinear(N, M, residual=residual, dtype=torch.float64, **SMALL))
    x = torch.randn(9, N, dtype=torch.float64, requires_grad=True)
    leaves = [x.detach().clone().requires_grad_()]
    leaves += [p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.router)]
    output = layer(x)
    (output * output_weights(output)).sum().backward()
    expected = goat_reference(
        leaves[0],
        layer.state_dict()["weight"],
        *leaves[1:],
        bias=layer.bias,
        scaling=layer.scaling,
        top_k=2,
        residual=(layer.residual_A, layer.residual_B),
    ).output
    (expected * output_weights(output)).sum().backward()
    found = (x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.router.grad)
    for name, gradient, leaf in zip(("x", "lora_A", "lora_B", "router"), found, leaves, strict=True):
        assert_close(name, gradient, leaf.grad, torch.float64)


def test_hydralora_adds_the_gradients_of_its_experts_in_the_shared_a():
    layer = trained(GoatLinear(N, M, init="hydralora", dtype=torch.float64, **SMALL))
    x = torch.randn(9, N, dtype=torch.float64)
    A = layer.lora_A.detach().clone().requires_grad_()
    others = (layer.lora_B.detach(), layer.router.detach())
    expected = goat_reference(x, layer.weight, A.repeat(4, 1), *others, bias=layer.bias, scaling=layer.scaling, top_k=2)
    weights = output_weights(expected.output)
    (expected.output * weights).sum().backward()
    (layer(x) * weights).sum().backward()
    assert layer.lora_A.grad.shape == (2, N)
    assert_close("lora_A", layer.lora_A.grad, A.grad, torch.float64)


def test_dropout_is_on_in_training_alone():
    layer = trained(GoatLinear(N, M, dropout=0.5, **SMALL))
    x = torch.randn(6, N)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    before = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), before)
    plain = copy.deepcopy(layer)
    plain.settings = AdapterSettings(**SMALL)
    assert torch.equal(layer(x), plain.train()(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_the_balance_loss_is_injected_in_training_alone(training, scale):
    layer = trained(GoatLinear(N, M, dtype=torch.float64, balance_coefficient=0.3, **SMALL)).train(training)
    x = torch.randn(9, N, dtype=torch.float64)
    if scale is not None:
        layer.balance_scale = torch.tensor(1.0)
    output = layer(x)
    if scale is not None:
        layer.balance_scale.data.fill_(scale)
    weights = output_weights(output)
    (output * weights).sum().backward()
    router = layer.router.detach().clone().requires_grad_()
    expected = goat_reference(
        x,
        layer.weight,
        layer.lora_A.detach(),
        layer.lora_B.detach(),
        router,
        bias=layer.bias,
        scaling=layer.scaling,
        top_k=2,
        residual=(layer.residual_A, layer.residual_B),
    )
    share = 0.3 * (1.0 if scale is None else scale) if training else 0.0
    ((expected.output * weights).sum() + share * expected.balance_loss).backward()
    assert_close("router", layer.router.grad, router.grad, torch.float64)


def test_an_optimiser_step_lowers_the_loss_and_leaves_the_base_alone():
    layer = GoatLinear(N, M, **SMALL)
    frozen = {name: layer.state_dict()[name].clone() for name in ("weight", "bias", "residual_A", "residual_B")}
    optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    x, target = torch.randn(64, N), torch.randn(64, M)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(layer(x), target)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("residual", FORMS)
def test_a_layer_runs_under_autocast(residual):
    layer = trained(GoatLinear(N, M, residual=residual, **SMALL))
    x = torch.randn(6, N, requires_grad=True)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        with layer.disable_adapter():
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert_close("output", output.detach(), expected.detach(), torch.bfloat16)
    assert x.grad.dtype == layer.lora_A.grad.dtype == layer.router.grad.dtype == torch.float32


@pytest.mark.parametrize("residual", FORMS)
def test_no_token_and_one_vector(residual):
    layer = GoatLinear(N, M, residual=residual, **SMALL)
    assert layer(torch.randn(0, N)).shape == (0, M)
    assert float(layer.balance_loss) == 0.0 and not bool(layer.expert_load.any())
    x = torch.randn(N)
    assert layer(x).shape == (M,)
    assert_close("vector", layer(x).detach(), layer(x[None])[0].detach(), torch.float32)


@pytest.mark.parametrize("residual", FORMS)
def test_a_reference_pass_between_forward_and_backward(residual):
    """What preference optimisation does: policy, then the reference by disable_adapter, then backward.

    ``fold`` rewrites the weight that the backward needs: it must refuse rather than use what it finds.
    """
    layer = trained(GoatLinear(N, M, residual=residual, dtype=torch.float64, **SMALL))
    x = torch.randn(6, N, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    output = layer(x)
    with torch.no_grad(), layer.disable_adapter():
        layer(x)
    if residual == "fold":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
    else:
        output.sum().backward()
        assert torch.equal(x.grad, expected)


def test_a_folded_weight_is_not_folded_again():
    weight = nn.Parameter(torch.randn(4, 3))
    before, folded = weight.detach().clone(), FoldedWeight(weight)
    folded.fold(torch.randn(2, 3), torch.randn(4, 2))
    with pytest.raises(RuntimeError, match="folded already"):
        folded.fold(torch.randn(2, 3), torch.randn(4, 2))
    folded.restore()
    assert torch.equal(weight, before)
