"""What once went wrong around a ``GoatLinear``: caches, PyTorch's shortcuts, shared weights, foreign state dicts."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from goat_kernels import GoatLinear, goat_linear
from goat_kernels.backends import torch_backend
from goat_kernels.numerics import TOLERANCES, relative_error
from goat_kernels.training import attach_balance_scale


@pytest.fixture
def fresh_caches():
    torch_backend._workspaces.__dict__.clear()
    torch_backend._expansions.clear()


def _foldable_problem():
    """A float32 layer and enough tokens that "path" forms W0 - B0 A0 in the workspace."""
    torch.manual_seed(0)
    return GoatLinear(24, 24, r=8), torch.randn(512, 24)


def test_the_first_forward_may_be_in_inference_mode(fresh_caches):
    layer, x = _foldable_problem()
    with torch.inference_mode():
        expected = layer(x).clone()
    output = layer(x)
    output.sum().backward()
    assert torch.equal(output, expected)


def test_a_forward_on_fake_tensors_leaves_nothing_behind(fresh_caches):
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer, x = _foldable_problem()
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.randn(512, 24))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.isfinite(layer.to(dtype)(x.to(dtype))).all()


def test_a_default_device_does_not_reach_the_caches(fresh_caches):
    layer, x = _foldable_problem()
    expected = layer(x)
    torch_backend._workspaces.__dict__.clear()
    torch_backend._expansions.clear()
    with torch.device("meta"):
        assert torch.equal(layer(x), expected)


def test_the_fused_transformer_encoder_does_not_bypass_the_adapter():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    encoder.linear1 = GoatLinear.from_linear(encoder.linear1, r=8, rho=1e-2).eval()
    x = torch.randn(2, 5, 16)
    with torch.enable_grad():
        ordinary = encoder(x).detach()
    with torch.no_grad():
        assert torch.allclose(encoder(x), ordinary, atol=1e-5)
        with encoder.linear1.disable_adapter():
            assert not torch.allclose(encoder(x), ordinary, atol=1e-3), "the adapter must matter for this test"


def test_fold_leaves_the_linear_it_came_from_alone():
    embedding, head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
    head.weight = embedding.weight
    before = embedding.weight.detach().clone()
    GoatLinear.from_linear(head, r=8, residual="fold")
    assert torch.equal(embedding.weight, before)


def test_a_trainable_weight_is_refused_while_folded():
    layer = GoatLinear(16, 16, r=8, residual="fold")
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weight requires grad.*residual='path'"):
        layer(torch.randn(2, 16))


@pytest.mark.parametrize("other", [{"eta": 0.5}, {"top_k": 3}, {"scaling": "lora"}], ids=["eta", "top_k", "scaling"])
def test_a_state_dict_of_other_settings_is_refused(other):
    layer, different = GoatLinear(16, 16, r=8), GoatLinear(16, 16, r=8, **other)
    with pytest.raises(ValueError, match="state dict is of a layer with"):
        different.load_state_dict(layer.state_dict())


class _Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class _Labelled(nn.Linear):
    """A subclass that computes what nn.Linear does."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.label = "query"

    def extra_repr(self):
        return f"{self.label}, {super().extra_repr()}"


def test_a_linear_that_accelerate_has_hooked_and_unhooked_is_a_linear():
    linear = nn.Linear(16, 16)
    linear.forward = linear.forward  # what accelerate leaves behind
    assert GoatLinear.from_linear(linear, r=8).weight is linear.weight


def _replaced(forward):
    linear = nn.Linear(16, 16)
    linear.forward = forward
    return linear


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (_Shifted(16, 16), r"linear is a _Shifted, whose own forward .* would not call.*get_peft_model"),
        (_replaced(lambda x: x), r"linear has a replaced forward, which .* would not call"),
        (nn.MultiheadAttention(16, 2).out_proj, "linear is a NonDynamicallyQuantizableLinear.*without calling it"),
    ],
    ids=["subclass", "replaced", "attention"],
)
def test_a_linear_that_computes_something_else_or_is_not_called_is_refused(linear, message):
    with pytest.raises(TypeError, match=message):
        GoatLinear.from_linear(linear, r=8)
    assert linear.weight.requires_grad


def test_a_subclass_with_the_forward_of_linear_is_adapted():
    linear, x = _Labelled(16, 16), torch.randn(3, 16)
    layer = GoatLinear.from_linear(linear, r=8)
    assert layer.weight is linear.weight
    with layer.disable_adapter():
        assert torch.equal(layer(x), linear(x))


def test_a_linear_with_hooks_or_a_parametrisation_is_refused():
    hooked = nn.Linear(16, 16)
    hooked.register_forward_hook(lambda module, args, output: output * 0)
    with pytest.raises(ValueError, match="linear has hooks"):
        GoatLinear.from_linear(hooked, r=8)
    normalised = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    with pytest.raises(TypeError, match="linear must have an ordinary weight"):
        GoatLinear.from_linear(normalised, r=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_balance_gradient_of_the_router_survives_half_precision(dtype):
    T, N, M, R, E = 16384, 16, 16, 8, 4
    x, weight, A, B = (torch.randn(*shape) / 4 for shape in ((T, N), (M, N), (R, N), (M, R)))
    router = torch.randn(E, N)

    def gradient(x, weight):
        leaf = router.clone().requires_grad_()
        (1e-3 * goat_linear(x, weight, A, B, leaf, scaling=1.0, top_k=2).balance_loss).backward()
        return leaf.grad

    x = x.to(dtype)  # both routers see the same numbers
    exact = gradient(x.float(), weight)
    assert relative_error(gradient(x, weight.to(dtype)), exact) < TOLERANCES[torch.float32].relative


def test_x_is_let_go_where_only_lora_B_trains():
    layer = GoatLinear(64, 64, r=8)
    layer.lora_A.requires_grad_(False)
    layer.router.requires_grad_(False)
    x = torch.randn(4096, 64, requires_grad=True) * 1
    saved = set()

    def pack(tensor):
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    assert x.untyped_storage().data_ptr() not in saved
    expected = GoatLinear(64, 64, r=8)
    expected.load_state_dict(layer.state_dict())
    both = [torch.autograd.grad(y.square().sum(), (x, m.lora_B)) for y, m in ((output, layer), (expected(x), expected))]
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


class _Output(NamedTuple):
    loss: torch.Tensor
    extra: int


@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: _Output(loss, 3)], ids=["tensor", "namedtuple"])
def test_the_balance_scale_follows_losses_of_any_form(wrap):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = GoatLinear(16, 16, r=8, balance_coefficient=1e-2)

        def forward(self, x):
            return wrap(self.layer(x).square().mean())

    model, x = Model(), torch.randn(32, 16)
    scale = attach_balance_scale(model)
    output = model(x)
    loss = output if isinstance(output, torch.Tensor) else output.loss
    assert isinstance(output, torch.Tensor) or output.extra == 3
    (loss * 0.25).backward()
    assert [float(tensor) for tensor in scale._tensors.values()] == [0.25]
