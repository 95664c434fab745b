"""What holds in one mode and not in another, for GoatLinear and for the PEFT layer alike: training and evaluation, with
and without gradients, a frozen router, a second adapter.

The injected balance loss has no effect on any output, so only gradients tell whether it was injected.
"""

from __future__ import annotations

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from goat_kernels import GoatConfig, GoatLinear
from goat_kernels.peft import GoatLinearLayer
from goat_kernels.training import router_statistics

N, M, E, K = 24, 20, 4, 2
COEFFICIENT = 0.7
SETTINGS = {"r": 8, "num_experts": E, "top_k": K}


def base() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(N, M)


def inputs() -> torch.Tensor:
    return torch.randn(40, N, generator=torch.Generator().manual_seed(2)).requires_grad_()


class Drop:
    """GoatLinear under the names that the tests use."""

    name = "GoatLinear"

    def __init__(self, coefficient: float = COEFFICIENT, dropout: float = 0.0) -> None:
        options = {**SETTINGS, "dropout": dropout, "balance_coefficient": coefficient}
        self.module = GoatLinear.from_linear(base(), generator=torch.Generator().manual_seed(3), **options)
        self.layer = self.module

    def tensors(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self.layer, name) for name in ("lora_A", "lora_B", "router")}


class Tuner:
    """The PEFT layer under the same names."""

    name = "GoatLinearLayer"

    def __init__(self, coefficient: float = COEFFICIENT, dropout: float = 0.0) -> None:
        config = GoatConfig(**SETTINGS, target_modules=["0"], lora_dropout=dropout, balance_coefficient=coefficient)
        self.module = inject_adapter_in_model(config, nn.Sequential(base()))
        self.layer = self.module[0]
        assert isinstance(self.layer, GoatLinearLayer)

    def tensors(self, adapter: str = "default") -> dict[str, nn.Parameter]:
        return {name: getattr(self.layer.goat_adapter[adapter], name) for name in ("lora_A", "lora_B", "router")}


@pytest.fixture(params=[Drop, Tuner], ids=lambda kind: kind.name)
def kind(request):
    return request.param


def gradients(made, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(4)  # of a dropout
    made.module(x).square().mean().backward()
    return {"x": x.grad, **{name: tensor.grad for name, tensor in made.tensors().items()}}


def alike(one, other) -> None:
    """``other`` starts with the same router: each draws its own."""
    with torch.no_grad():
        for name, tensor in other.tensors().items():
            tensor.copy_(one.tensors()[name])


def pair(kind, coefficients=(COEFFICIENT, 0.0), **options):
    one, other = (kind(coefficient, **options) for coefficient in coefficients)
    alike(one, other)
    return one, other


def assert_same(one: dict, other: dict) -> None:
    for name in one:
        assert (one[name] is None) == (other[name] is None), name
        if one[name] is not None:
            assert torch.equal(one[name], other[name]), name


# --- the balance loss ---------------------------------------------------------------------------------------------


def test_training_injects_the_balance_loss(kind):
    one, other = pair(kind)
    injected, plain = gradients(one, inputs()), gradients(other, inputs())
    assert not torch.allclose(injected["router"], plain["router"], rtol=1e-2)
    assert not torch.allclose(injected["x"], plain["x"], rtol=1e-3, atol=0)
    assert torch.equal(injected["lora_A"], plain["lora_A"]) and torch.equal(injected["lora_B"], plain["lora_B"])


def test_evaluation_injects_nothing(kind):
    one, other = pair(kind)
    one.module.eval(), other.module.eval()
    assert_same(gradients(one, inputs()), gradients(other, inputs()))


def test_evaluation_after_training_injects_nothing_and_training_after_evaluation_does(kind):
    one, other = pair(kind)
    for made in (one, other):
        made.module.eval()
        gradients(made, inputs())
        made.module.train()
        made.module.zero_grad()
    assert not torch.allclose(gradients(one, inputs())["router"], gradients(other, inputs())["router"], rtol=1e-2)


def test_a_frozen_router_gets_no_balance_loss(kind):
    """There is nothing to balance, and the gradient of x would be wrong."""
    one, other = pair(kind)
    for made in (one, other):
        made.tensors()["router"].requires_grad_(False)
    found = gradients(one, inputs())
    assert found["router"] is None
    assert_same(found, gradients(other, inputs()))


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_leaves_the_other_gradients_as_they_are(kind, frozen):
    one, other = pair(kind, (COEFFICIENT, COEFFICIENT))
    one.tensors()[frozen].requires_grad_(False)
    found, whole = gradients(one, inputs()), gradients(other, inputs())
    assert found.pop(frozen) is None and whole.pop(frozen) is not None
    assert_same(found, whole)


def test_a_frozen_adapter_in_training_mode_gets_no_balance_loss(kind):
    one, other = pair(kind)
    for made in (one, other):
        for tensor in made.tensors().values():
            tensor.requires_grad_(False)
    assert_same(gradients(one, inputs()), gradients(other, inputs()))


def test_without_gradients_nothing_is_injected_and_nothing_is_kept(kind):
    made = kind()
    with torch.no_grad():
        output = made.module(inputs())
    assert not output.requires_grad
    assert all(tensor.grad is None for tensor in made.tensors().values())


# --- outputs and statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train", "no_grad", "inference_mode"])
def test_the_output_without_dropout_is_the_same_in_every_mode(kind, mode):
    made = kind()
    expected = made.module(inputs()).detach()
    made.module.train(mode != "eval")
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        assert torch.equal(made.module(inputs().detach()), expected)


@pytest.mark.parametrize("mode", ["eval", "train", "no_grad"])
def test_statistics_are_of_the_last_forward_in_every_mode(kind, mode):
    made = kind()
    made.module(torch.zeros(3, N))
    before = made.layer.expert_load.clone()
    assert before.tolist() == [1.0, 1.0, 0.0, 0.0]  # equal logits: the first two experts
    made.module.train(mode != "eval")
    with torch.no_grad() if mode == "no_grad" else torch.enable_grad():
        made.module(inputs())
    assert not torch.equal(made.layer.expert_load, before)
    assert made.layer.expert_load.sum() == pytest.approx(K)
    assert not made.layer.expert_load.requires_grad and not made.layer.balance_loss.requires_grad
    assert len(router_statistics(made.module)) == 1


def test_dropout_acts_in_training_even_without_gradients(kind):
    made = kind(dropout=0.5)
    x = inputs().detach()
    made.module.eval()
    expected = made.module(x).detach()
    assert torch.equal(made.module(x), expected)
    made.module.train()
    with torch.no_grad():
        assert not torch.equal(made.module(x), expected)
        torch.manual_seed(5)
        once = made.module(x)
        torch.manual_seed(5)
        assert torch.equal(made.module(x), once)


def test_a_switched_off_adapter_keeps_its_statistics_and_gets_no_gradient(kind):
    made = kind()
    x = inputs()
    made.module(x)
    load = made.layer.expert_load
    if kind is Drop:
        with made.layer.disable_adapter():
            output = made.module(x)
    else:
        made.layer.enable_adapters(False)
        output = made.module(x)
        made.layer.enable_adapters(True)
    assert torch.equal(output, base()(x))
    output.sum().backward()
    assert all(tensor.grad is None for tensor in made.tensors().values())
    assert torch.equal(made.layer.expert_load, load)


# --- a second adapter ---------------------------------------------------------------------------------------------


def two(coefficients: tuple[float, float], dropouts=(0.0, 0.0)) -> Tuner:
    """A layer with the adapters "default" and "second", of other sizes, each with its coefficient and dropout."""
    made = Tuner(coefficients[0], dropouts[0])
    second = GoatConfig(
        **{**SETTINGS, "r": 12, "num_experts": 3, "top_k": 1, "init": "pissa"},
        target_modules=["0"],
        balance_coefficient=coefficients[1],
        lora_dropout=dropouts[1],
    )
    inject_adapter_in_model(second, made.module, adapter_name="second")
    made.layer.set_adapter(["default", "second"])
    made.layer.requires_grad_(True)
    torch.manual_seed(6)
    with torch.no_grad():
        for name in ("default", "second"):
            for tensor in made.tensors(name).values():
                tensor.copy_(0.2 * torch.randn(tensor.shape))
    return made


def router_gradients(made: Tuner) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    made.module(inputs()).square().mean().backward()
    return made.tensors("default")["router"].grad, made.tensors("second")["router"].grad


@pytest.mark.filterwarnings("ignore:top_k=1")
@pytest.mark.parametrize("coefficients", [(0.9, 0.0), (0.0, 0.9), (0.3, 0.9)])
def test_each_adapter_gets_its_own_balance_loss(coefficients):
    plain, unit = router_gradients(two((0.0, 0.0))), router_gradients(two((1.0, 1.0)))
    for found, without, one, coefficient in zip(
        router_gradients(two(coefficients)), plain, unit, coefficients, strict=True
    ):
        torch.testing.assert_close(found, without + coefficient * (one - without), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:top_k=1")
def test_the_balance_loss_of_two_adapters_is_their_sum():
    made = two((1.0, 1.0))
    made.module(inputs())
    both = made.layer.balance_loss.clone()
    alone = []
    for name in ("default", "second"):
        made.layer.set_adapter(name)
        made.module(inputs())
        alone.append(made.layer.balance_loss.item())
    assert both.item() == pytest.approx(sum(alone), rel=1e-6)


@pytest.mark.filterwarnings("ignore:top_k=1")
def test_an_adapter_that_is_not_active_gets_no_gradient():
    made = two((1.0, 1.0))
    made.layer.set_adapter("second")
    found = router_gradients(made)
    assert found[0] is None and found[1] is not None


@pytest.mark.filterwarnings("ignore:top_k=1")
def test_one_frozen_adapter_beside_one_that_trains():
    made = two((1.0, 1.0))
    for tensor in made.tensors("default").values():
        tensor.requires_grad_(False)
    frozen, trains = router_gradients(made)
    assert frozen is None
    reference = router_gradients(two((0.0, 1.0)))[1]
    assert torch.equal(trains, reference)


@pytest.mark.filterwarnings("ignore:top_k=1")
def test_each_adapter_has_its_own_dropout():
    x = inputs().detach()

    def spread(dropouts) -> bool:
        made = two((0.0, 0.0), dropouts)
        made.module.train()
        outputs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            outputs.append(made.module(x).detach())
        return not torch.equal(*outputs)

    assert spread((0.4, 0.0)) and spread((0.0, 0.4)) and not spread((0.0, 0.0))
