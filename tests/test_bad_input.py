"""Bad input raises before anything is computed, and the message has the argument, what it got and what it needs.

One test per public entry, one case per line.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from goat_kernels import AdapterSettings, GoatLinear, goat_linear
from goat_kernels.rules import INIT_RULES, SCALING_RULES

#: What the message must contain besides: names of every rule, so that a typo can be corrected at once.
INITS = ["goat", "goat_mini", "pissa", "milora", "pissa_milora", "random", "lora", "hydralora"]
SCALINGS = ["goat", "goat_s", "lora", "rslora", "number"]

# The hyper-parameters that AdapterSettings, GoatLinear and GoatLinear.from_linear share.
BAD_SETTINGS = {
    "r-not-divisible": ({"r": 36}, ValueError, ["r=36", "num_experts=8", "divisible"]),
    "r-zero": ({"r": 0}, ValueError, ["r=0", "at least 1"]),
    "r-negative": ({"r": -8}, ValueError, ["r=-8", "at least 1"]),
    "r-float": ({"r": 8.0}, TypeError, ["r ", "int", "8.0"]),
    "r-bool": ({"r": True}, TypeError, ["r ", "int", "True"]),
    "r-string": ({"r": "8"}, TypeError, ["r ", "int", "'8'"]),
    "experts-zero": ({"num_experts": 0}, ValueError, ["num_experts=0", "at least 1"]),
    "experts-float": ({"num_experts": 4.0}, TypeError, ["num_experts", "int", "4.0"]),
    "experts-none": ({"num_experts": None}, TypeError, ["num_experts", "int", "None"]),
    "top-k-zero": ({"top_k": 0}, ValueError, ["top_k=0", "at least 1"]),
    "top-k-above-experts": ({"top_k": 9}, ValueError, ["top_k=9", "1..num_experts=8"]),
    "top-k-float": ({"top_k": 2.0}, TypeError, ["top_k", "int", "2.0"]),
    "scaling-zero": ({"scaling": 0}, ValueError, ["scaling=0", "above 0"]),
    "scaling-negative": ({"scaling": -1.5}, ValueError, ["scaling=-1.5", "above 0"]),
    "scaling-nan": ({"scaling": math.nan}, ValueError, ["scaling=nan", "finite"]),
    "scaling-infinite": ({"scaling": math.inf}, ValueError, ["scaling=inf", "finite"]),
    "scaling-unknown": ({"scaling": "rs_lora"}, ValueError, ["scaling='rs_lora'", *SCALINGS]),
    "scaling-none": ({"scaling": None}, TypeError, ["scaling", "number", "None"]),
    "scaling-bool": ({"scaling": True}, TypeError, ["scaling", "number", "True"]),
    "goat-s-without-segments": ({"scaling": "goat_s", "init": "lora"}, ValueError, ["scaling='goat_s'", "lora"]),
    "goat-s-hydralora": ({"scaling": "goat_s", "init": "hydralora"}, ValueError, ["scaling='goat_s'", "hydralora"]),
    "eta-zero": ({"eta": 0.0}, ValueError, ["eta=0.0", "above 0"]),
    "eta-negative": ({"eta": -1}, ValueError, ["eta=-1", "above 0"]),
    "eta-string": ({"eta": "1"}, TypeError, ["eta", "number", "'1'"]),
    "rho-zero": ({"rho": 0}, ValueError, ["rho=0", "above 0"]),
    "rho-nan": ({"rho": math.nan}, ValueError, ["rho=nan", "finite"]),
    "lora-alpha-zero": ({"lora_alpha": 0}, ValueError, ["lora_alpha=0", "above 0"]),
    "lora-alpha-none": ({"lora_alpha": None}, TypeError, ["lora_alpha", "number", "None"]),
    "init-unknown": ({"init": "piss"}, ValueError, ["init='piss'", *INITS]),
    "init-case": ({"init": "GOAT"}, ValueError, ["init='GOAT'", *INITS]),
    "init-bool": ({"init": True}, TypeError, ["init", "True", *INITS]),
    "residual-unknown": ({"residual": "merge"}, ValueError, ["residual='merge'", "path", "fold"]),
    "residual-none": ({"residual": None}, TypeError, ["residual", "None", "path", "fold"]),
    "residual-coefficient-negative": (
        {"residual_coefficient": -0.1},
        ValueError,
        ["residual_coefficient=-0.1", "at least 0"],
    ),
    "residual-coefficient-string": ({"residual_coefficient": "1/E"}, TypeError, ["residual_coefficient", "'1/E'"]),
    "dropout-one": ({"dropout": 1.0}, ValueError, ["dropout=1.0", "[0, 1)"]),
    "dropout-negative": ({"dropout": -0.1}, ValueError, ["dropout=-0.1", "[0, 1)"]),
    "dropout-nan": ({"dropout": math.nan}, ValueError, ["dropout=nan", "[0, 1)"]),
    "dropout-none": ({"dropout": None}, TypeError, ["dropout", "number", "None"]),
    "balance-negative": ({"balance_coefficient": -1e-3}, ValueError, ["balance_coefficient=-0.001", "at least 0"]),
    "balance-infinite": ({"balance_coefficient": math.inf}, ValueError, ["balance_coefficient=inf", "finite"]),
    "svd-unknown": ({"svd": "partial"}, ValueError, ["svd='partial'", "full", "randomized"]),
    "seed-float": ({"seed": 1.5}, TypeError, ["seed", "int", "1.5"]),
}

# Those that depend on the layer, which both ways to build a GoatLinear check.
BAD_FOR_THE_LAYER = {
    "too-few-singular-values": (
        {"r": 24, "num_experts": 4},
        ValueError,
        ["weight", "(24, 20)", "20 singular values", "r=24", "rank_pattern", "exclude_modules"],
    ),
    "randomised-svd-of-other-triples": (
        {"r": 8, "num_experts": 4, "svd": "randomized"},
        ValueError,
        ["svd='randomized'", "init='goat'", "pissa"],
    ),
    "unknown-backend": ({"r": 8, "backend": "cuda"}, ValueError, ["backend='cuda'", "auto", "torch", "triton"]),
    "backend-of-a-wrong-type": ({"r": 8, "backend": 3}, TypeError, ["backend", "3", "auto", "torch", "triton"]),
}


def assert_raises(error, words, call) -> None:
    """``call`` raises exactly ``error`` with every word in its message, and draws no random number before."""
    state = torch.get_rng_state()
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert torch.equal(torch.get_rng_state(), state), "a random number was drawn before the argument was refused"


def parametrised(cases: dict):
    return pytest.mark.parametrize(("options", "error", "words"), cases.values(), ids=cases.keys())


def test_the_lists_of_names_in_this_file_are_complete():
    assert set(INITS) == set(INIT_RULES)
    assert set(SCALINGS) - {"number"} == set(SCALING_RULES)


@parametrised(BAD_SETTINGS)
def test_adapter_settings(options, error, words):
    assert_raises(error, words, lambda: AdapterSettings(**options))


def test_adapter_settings_refuses_unknown_and_positional_arguments():
    with pytest.raises(TypeError, match="alpha"):
        AdapterSettings(alpha=16)
    with pytest.raises(TypeError):
        AdapterSettings(8)


@parametrised(
    {
        **BAD_SETTINGS,
        **BAD_FOR_THE_LAYER,
        "in-features-zero": ({"in_features": 0}, ValueError, ["in_features=0", "at least 1"]),
        "in-features-float": ({"in_features": 20.0}, TypeError, ["in_features", "int", "20.0"]),
        "out-features-negative": ({"out_features": -1}, ValueError, ["out_features=-1", "at least 1"]),
        "out-features-none": ({"out_features": None}, TypeError, ["out_features", "int", "None"]),
        "dtype-integer": ({"r": 8, "dtype": torch.int64}, TypeError, ["dtype", "floating-point", "torch.int64"]),
    }
)
def test_goat_linear_module(options, error, words):
    arguments = {"in_features": 20, "out_features": 24, **options}
    assert_raises(error, words, lambda: GoatLinear(**arguments))


@parametrised(BAD_SETTINGS)
def test_goat_linear_module_on_the_meta_device(options, error, words):
    assert_raises(error, words, lambda: GoatLinear(20, 24, device="meta", **options))


def bad_linear(change) -> nn.Linear:
    linear = nn.Linear(20, 24)
    change(linear)
    return linear


@parametrised(
    {
        **BAD_SETTINGS,
        **BAD_FOR_THE_LAYER,
        "not-a-linear": ({"linear": nn.Conv1d(20, 24, 1)}, TypeError, ["linear", "Linear", "Conv1d"]),
        "a-tensor": ({"linear": torch.ones(24, 20)}, TypeError, ["linear", "Linear", "Tensor"]),
        "unknown-keyword": ({"rank": 8}, TypeError, ["rank"]),
        "integer-weight": (
            {
                "r": 8,
                "linear": bad_linear(
                    lambda m: setattr(m, "weight", nn.Parameter(torch.ones(24, 20, dtype=torch.int8), False))
                ),
            },
            TypeError,
            ["weight", "floating-point", "torch.int8"],
        ),
        "weight-not-finite": (
            {"r": 8, "linear": bad_linear(lambda m: nn.init.constant_(m.weight, math.nan))},
            ValueError,
            ["weight", "not finite"],
        ),
    }
)
def test_from_linear(options, error, words):
    options = dict(options)
    linear = options.pop("linear") if "linear" in options else nn.Linear(20, 24)
    requires_grad = linear.weight.requires_grad if isinstance(linear, nn.Module) else False
    kept = linear.weight.detach().clone() if isinstance(linear, nn.Module) else None
    assert_raises(error, words, lambda: GoatLinear.from_linear(linear, **options))
    if isinstance(linear, nn.Module):
        assert linear.weight.requires_grad == requires_grad, "the layer that was refused was frozen"
        torch.testing.assert_close(linear.weight.detach(), kept, rtol=0, atol=0, equal_nan=True)


# --- goat_linear --------------------------------------------------------------------------------------------------

T, N, M, R, E = 5, 20, 24, 8, 4


def good_arguments() -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "x": normal(T, N),
        "weight": normal(M, N),
        "lora_A": normal(R, N),
        "lora_B": normal(M, R),
        "router": normal(E, N),
        "bias": normal(M),
        "scaling": 1.0,
        "top_k": 2,
        "residual": (normal(3, N), normal(M, 3)),
        "dropout_p": 0.5,
        "training": True,
    }


def integer(*shape):
    return torch.ones(shape, dtype=torch.int64)


def meta(*shape):
    return torch.ones(shape, device="meta")


ones = torch.ones

BAD_ARGUMENTS = {
    # types
    "x-list": ({"x": [[1.0] * N]}, TypeError, ["x ", "tensor", "list"]),
    "weight-none": ({"weight": None}, TypeError, ["weight", "tensor", "NoneType"]),
    "lora-a-number": ({"lora_A": 1.0}, TypeError, ["lora_A", "tensor", "float"]),
    "lora-b-none": ({"lora_B": None}, TypeError, ["lora_B", "tensor", "NoneType"]),
    "router-module": ({"router": nn.Linear(N, E)}, TypeError, ["router", "tensor", "Linear"]),
    "bias-bool": ({"bias": True}, TypeError, ["bias", "tensor", "bool"]),
    "residual-tensor": ({"residual": ones(M, N)}, TypeError, ["residual", "pair", "Tensor"]),
    "residual-of-one": ({"residual": (ones(3, N),)}, TypeError, ["residual", "pair"]),
    "residual-half": ({"residual": (ones(3, N), None)}, TypeError, ["residual[1]", "tensor", "NoneType"]),
    "residual-other-half": ({"residual": (None, ones(M, 3))}, TypeError, ["residual[0]", "tensor", "NoneType"]),
    # dtypes
    "x-integer": ({"x": integer(T, N)}, TypeError, ["x ", "floating-point", "torch.int64"]),
    "weight-integer": ({"weight": integer(M, N)}, TypeError, ["weight", "floating-point", "torch.int64"]),
    "lora-a-integer": ({"lora_A": integer(R, N)}, TypeError, ["lora_A", "floating-point", "torch.int64"]),
    "lora-b-bool": ({"lora_B": ones(M, R).bool()}, TypeError, ["lora_B", "floating-point", "torch.bool"]),
    "router-complex": (
        {"router": ones(E, N).to(torch.complex64)},
        TypeError,
        ["router", "floating-point", "torch.complex64"],
    ),
    "bias-integer": ({"bias": integer(M)}, TypeError, ["bias", "floating-point", "torch.int64"]),
    "residual-integer": (
        {"residual": (integer(3, N), ones(M, 3))},
        TypeError,
        ["residual[0]", "floating-point", "torch.int64"],
    ),
    "weight-of-another-dtype": ({"weight": ones(M, N).half()}, TypeError, ["weight", "torch.float16", "torch.float32"]),
    "bias-of-another-dtype": ({"bias": ones(M).double()}, TypeError, ["bias", "torch.float64", "torch.float32"]),
    # devices
    "weight-elsewhere": ({"weight": meta(M, N)}, ValueError, ["weight", "meta", "cpu"]),
    "lora-a-elsewhere": ({"lora_A": meta(R, N)}, ValueError, ["lora_A", "meta", "cpu"]),
    "lora-b-elsewhere": ({"lora_B": meta(M, R)}, ValueError, ["lora_B", "meta", "cpu"]),
    "router-elsewhere": ({"router": meta(E, N)}, ValueError, ["router", "meta", "cpu"]),
    "bias-elsewhere": ({"bias": meta(M)}, ValueError, ["bias", "meta", "cpu"]),
    "residual-elsewhere": ({"residual": (ones(3, N), meta(M, 3))}, ValueError, ["residual[1]", "meta", "cpu"]),
    "scaling-elsewhere": ({"scaling": meta(E)}, ValueError, ["scaling", "meta", "cpu"]),
    # shapes
    "x-0d": ({"x": torch.tensor(1.0)}, ValueError, ["x ", "[..., N]", "0-d"]),
    "x-too-narrow": ({"x": ones(T, N - 1)}, ValueError, ["x ", f"{N}", f"[{T}, {N - 1}]"]),
    "weight-vector": ({"weight": ones(N)}, ValueError, ["weight", "[M, N]", f"({N},)"]),
    "weight-3d": ({"weight": ones(1, M, N)}, ValueError, ["weight", "[M, N]", f"(1, {M}, {N})"]),
    "lora-a-too-wide": ({"lora_A": ones(R, N + 1)}, ValueError, ["lora_A", f"[{R}, {N}]", f"[{R}, {N + 1}]"]),
    "lora-a-vector": ({"lora_A": ones(N)}, ValueError, ["lora_A", "[R, N]", f"({N},)"]),
    "lora-a-empty": ({"lora_A": ones(0, N)}, ValueError, ["lora_A", "at least one row", f"(0, {N})"]),
    "lora-b-transposed": ({"lora_B": ones(R, M)}, ValueError, ["lora_B", f"[{M}, {R}]", f"[{R}, {M}]"]),
    "lora-b-of-other-rank": ({"lora_B": ones(M, R + 1)}, ValueError, ["lora_B", f"[{M}, {R}]", f"[{M}, {R + 1}]"]),
    "router-transposed": ({"router": ones(N, E)}, ValueError, ["router", "[E, N]", f"[{N}, {E}]"]),
    "router-empty": ({"router": ones(0, N)}, ValueError, ["router", "at least one row", f"(0, {N})"]),
    "rank-not-divisible": ({"router": ones(3, N)}, ValueError, ["lora_A", "R=8", "divisible", "E=3"]),
    "bias-too-long": ({"bias": ones(M + 1)}, ValueError, ["bias", f"[{M}]", f"[{M + 1}]"]),
    "bias-2d": ({"bias": ones(1, M)}, ValueError, ["bias", f"[{M}]", f"[1, {M}]"]),
    "residual-too-wide": ({"residual": (ones(3, N + 1), ones(M, 3))}, ValueError, ["residual[0]", f"[3, {N + 1}]"]),
    "residual-ranks-differ": (
        {"residual": (ones(3, N), ones(M, 4))},
        ValueError,
        ["residual[1]", f"[{M}, 3]", f"[{M}, 4]"],
    ),
    "residual-vector": ({"residual": (ones(N), ones(M, 3))}, ValueError, ["residual[0]", f"[{N}]"]),
    "scaling-of-other-length": ({"scaling": ones(E + 1)}, ValueError, ["scaling", f"[{E}]", f"[{E + 1}]"]),
    "scaling-0d": ({"scaling": torch.tensor(1.0)}, ValueError, ["scaling", f"[{E}]", "[]"]),
    # numbers
    "top-k-zero": ({"top_k": 0}, ValueError, ["top_k=0", "1..4"]),
    "top-k-above-experts": ({"top_k": 5}, ValueError, ["top_k=5", "1..4"]),
    "top-k-float": ({"top_k": 2.0}, TypeError, ["top_k", "int", "2.0"]),
    "top-k-bool": ({"top_k": True}, TypeError, ["top_k", "int", "True"]),
    "scaling-zero": ({"scaling": 0.0}, ValueError, ["scaling=0.0", "above 0"]),
    "scaling-negative": ({"scaling": -2}, ValueError, ["scaling=-2", "above 0"]),
    "scaling-nan": ({"scaling": math.nan}, ValueError, ["scaling=nan", "finite"]),
    "scaling-string": ({"scaling": "goat"}, TypeError, ["scaling", "number", "'goat'"]),
    "scaling-none": ({"scaling": None}, TypeError, ["scaling", "number", "None"]),
    "scaling-integers": ({"scaling": integer(E)}, TypeError, ["scaling", "floating-point", "torch.int64"]),
    "scaling-trained": ({"scaling": ones(E, requires_grad=True)}, ValueError, ["scaling", "requires grad", "detach"]),
    "dropout-one": ({"dropout_p": 1.0}, ValueError, ["dropout_p=1.0", "[0, 1)"]),
    "dropout-negative": ({"dropout_p": -0.1}, ValueError, ["dropout_p=-0.1", "[0, 1)"]),
    "dropout-nan": ({"dropout_p": math.nan}, ValueError, ["dropout_p=nan", "[0, 1)"]),
    "dropout-none": ({"dropout_p": None}, TypeError, ["dropout_p", "number", "None"]),
    "dropout-in-eval": ({"dropout_p": 1.5, "training": False}, ValueError, ["dropout_p=1.5", "[0, 1)"]),
    # the backend
    "backend-unknown": ({"backend": "cuda"}, ValueError, ["backend='cuda'", "auto", "torch", "triton"]),
}


@parametrised(BAD_ARGUMENTS)
def test_goat_linear_function(options, error, words):
    arguments = {**good_arguments(), **options}
    assert_raises(error, words, lambda: goat_linear(**arguments))


def test_the_arguments_that_the_bad_ones_replace_are_good():
    assert goat_linear(**good_arguments()).output.shape == (T, M)


def test_a_backend_that_cannot_run_says_why():
    from goat_kernels import available_backends

    for name, reason in available_backends().items():
        if reason is not None:
            arguments = {**good_arguments(), "backend": name}
            assert_raises(RuntimeError, [f"backend='{name}'", reason], lambda a=arguments: goat_linear(**a))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_dtypes_that_autocast_cannot_reconcile_are_named(name):
    """Autocast leaves float64 alone, so a float64 x needs a float64 weight there too."""
    arguments = {**good_arguments(), "residual": None}
    arguments["x"] = arguments["x"].double()
    other = "bias" if name == "weight" else "weight"
    arguments[other] = arguments[other].double()

    def call():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            goat_linear(**arguments)

    assert_raises(TypeError, [name, "torch.float32", "torch.float64"], call)


# --- GoatLinear.forward -------------------------------------------------------------------------------------------

BAD_X = {
    "too-narrow": ({"x": ones(T, N - 1)}, ValueError, ["x ", f"{N}", f"[{T}, {N - 1}]"]),
    "0d": ({"x": torch.tensor(1.0)}, ValueError, ["x ", "[..., N]", "[]"]),
    "half": ({"x": ones(T, N).half()}, TypeError, ["x ", "torch.float16", "torch.float32"]),
    "double": ({"x": ones(T, N).double()}, TypeError, ["x ", "torch.float64", "torch.float32"]),
    "integer": ({"x": integer(T, N)}, TypeError, ["x ", "torch.int64", "torch.float32"]),
    "integer-under-autocast": ({"x": integer(T, N), "autocast": True}, TypeError, ["x ", "torch.int64"]),
    "double-under-autocast": ({"x": ones(T, N).double(), "autocast": True}, TypeError, ["x ", "torch.float64"]),
    "elsewhere": ({"x": meta(T, N)}, ValueError, ["x ", "meta", "cpu"]),
}


@parametrised(BAD_X)
def test_goat_linear_module_forward(options, error, words):
    layer = GoatLinear(N, M, r=R, num_experts=E, dropout=0.5, generator=torch.Generator().manual_seed(0))

    def call():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.get("autocast", False)):
            layer(options["x"])

    assert_raises(error, words, call)
    assert layer.balance_loss is None and layer.expert_load is None
