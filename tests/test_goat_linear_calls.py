"""The ways of calling ``goat_linear`` and ``routed_linear``: each gives what the plain call gives.

Strides and leading dimensions, several uses in one graph, no_grad and inference mode, second derivatives, autocast,
a base layer that ran elsewhere, the balance loss injected, the choice of the backend.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from goat_problems import (
    BALANCE_SHARE,
    TRAINABLE,
    Problem,
    assert_close,
    assert_outcomes_agree,
    assert_outcomes_identical,
    evaluate,
    evaluate_oracle,
    make_problem,
    output_weights,
    run_goat,
)

from goat_kernels import GoatOutput, goat_linear, goat_reference
from goat_kernels.functional import routed_linear

HALVES = (torch.float16, torch.bfloat16)


def on(backend: str, device: torch.device, **sizes) -> Problem:
    """A problem on ``device``, in the most precise dtype that ``backend`` has."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    return make_problem(dtype=dtype, **sizes).map(lambda tensor: tensor.to(device))


def called(backend: str, problem: Problem) -> GoatOutput:
    return goat_linear(
        *(problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.router),
        bias=problem.bias,
        scaling=problem.scaling,
        top_k=problem.top_k,
        residual=problem.residual,
        backend=backend,
    )


# --- strides and shapes -------------------------------------------------------------------------------------------


def strided_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "transposed": normal(13, 17).t(),
        "every-second-column": normal(17, 26)[:, ::2],
        "every-second-row": normal(34, 13)[::2],
        "rows-expanded": normal(1, 13).expand(17, 13),
        "column-expanded": normal(17, 1).expand(17, 13),
        "batch-of-transposed": normal(2, 13, 5).transpose(1, 2),
        "sequence-first": normal(5, 2, 13).transpose(0, 1),
        "4d-permuted": normal(13, 2, 3, 2).permute(1, 3, 2, 0),
        "storage-offset": normal(18, 14)[1:, 1:],
        "every-second-number": normal(26)[::2],
    }


@pytest.mark.parametrize("name", strided_inputs())
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_any_strides_of_x_give_the_contiguous_result(name, dropout_p):
    x = strided_inputs()[name]
    problem = replace(make_problem(R0=3), x=x)
    assert not x.is_contiguous()
    options = {"dropout_p": dropout_p, "training": True}
    torch.manual_seed(5)
    strided = run_goat(problem, **options)
    torch.manual_seed(5)
    contiguous = run_goat(replace(problem, x=x.contiguous()), **options)
    assert strided.output.shape == (*x.shape[:-1], 11)
    assert_outcomes_agree(strided, contiguous, torch.float64)


def test_parameters_may_have_any_strides():
    problem = make_problem(R0=3)
    strided = problem.map(lambda t: t.t().contiguous().t() if t.ndim == 2 else torch.stack([t, t], 1)[:, 0])
    assert not strided.lora_A.is_contiguous() and not strided.weight.is_contiguous()
    assert_outcomes_agree(run_goat(strided), evaluate_oracle(problem), torch.float64)


def test_a_gradient_of_any_strides_is_taken():
    problem = make_problem(T=12, R0=3)
    leaves = problem.leaves(TRAINABLE)
    tensors = (leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.router)
    output = goat_linear(*tensors, scaling=1.7, top_k=2, residual=leaves.residual).output
    weights = output_weights(output)
    (expected,) = torch.autograd.grad(output, leaves.x, weights, retain_graph=True)
    for grad_y in (weights.t().contiguous().t(), torch.stack([weights, weights], -1)[..., 0]):
        (gradient,) = torch.autograd.grad(output, leaves.x, grad_y, retain_graph=True)
        assert_close("x", gradient, expected, torch.float64)
    (summed,) = torch.autograd.grad(output.sum(), leaves.x, retain_graph=True)
    (ones,) = torch.autograd.grad(output, leaves.x, torch.ones_like(output))
    assert_close("x of a sum", summed, ones, torch.float64)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 3, 2), (0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("R0", [None, 3], ids=["fold", "path"])
def test_leading_dimensions_are_kept(leading, R0):
    problem = make_problem(leading=leading, R0=R0, seed=12)
    result = run_goat(problem)
    assert result.output.shape == (*leading, 11)
    assert_outcomes_agree(result, evaluate_oracle(problem), torch.float64)
    if 0 in leading:
        assert float(result.balance_loss) == 0
        assert all(not bool(gradient.any()) for gradient in result.gradients.values())


# --- graphs -------------------------------------------------------------------------------------------------------


def test_two_uses_of_one_layer_in_a_graph_add_up(backend, device):
    problem = on(backend, device, T=9, N=11, M=11, R0=3, seed=13)

    def twice(function):
        def run(x, *parameters, **options):
            first = function(x, *parameters, **options)
            second = function(torch.tanh(first.output), *parameters, **options)
            return type(first)(*((a + b if a.is_floating_point() else a) for a, b in zip(first, second, strict=True)))

        return run

    oracle = evaluate(twice(goat_reference), problem.double())
    found = evaluate(twice(functools.partial(goat_linear, backend=backend)), problem)
    assert_outcomes_agree(found, oracle, problem.x.dtype)


def test_shared_tensors_get_the_sum_of_their_gradients():
    x = make_problem().x
    shared = make_problem(N=13, M=13, R=4, E=4)

    def loss(function, matrix_NN, router):
        # One matrix is both the weight and (its rows) the router.
        result = function(x, matrix_NN, shared.lora_A, shared.lora_B, router, scaling=1.0, top_k=2)
        return (result.output * output_weights(result.output)).sum() + result.balance_loss

    gradients = []
    for function in (goat_linear, goat_reference):
        matrix = shared.weight.clone().requires_grad_()
        loss(function, matrix, matrix[:4]).backward()
        gradients.append(matrix.grad)
    assert_close("shared matrix", *gradients, torch.float64)


@pytest.mark.parametrize(
    "edit", [lambda y: F.relu_(y), lambda y: y.add_(1.0), lambda y: y.mul_(2.0)], ids=["relu_", "add_", "mul_"]
)
@pytest.mark.parametrize("base", [False, True], ids=["weight", "base_output"])
def test_the_output_may_be_modified_in_place(edit, base):
    problem = make_problem()
    gradients = []
    for clone in (False, True):
        leaves = problem.leaves(TRAINABLE)
        tensors = (leaves.x, leaves.lora_A, leaves.lora_B, leaves.router)
        source = {"base_output": F.linear(leaves.x, leaves.weight)} if base else {"weight": leaves.weight}
        output = routed_linear(*tensors, **source, scaling=1.0, top_k=2).output
        output = edit(output.clone() if clone else output)
        (output * output_weights(output)).sum().backward()
        gradients.append([getattr(leaves, name).grad for name in TRAINABLE if name != "bias"])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_input_is_modified(dropout_p):
    problem = make_problem(R0=3, per_expert=True)
    leaves = problem.leaves(TRAINABLE)
    result = goat_linear(
        *(leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.router),
        bias=leaves.bias,
        scaling=leaves.scaling,
        top_k=2,
        residual=leaves.residual,
        dropout_p=dropout_p,
        training=True,
    )
    grad_y = output_weights(result.output)
    kept = grad_y.clone()
    result.output.backward(grad_y)
    assert torch.equal(grad_y, kept)
    for name in TRAINABLE:
        assert torch.equal(getattr(leaves, name), getattr(problem, name)), name
        assert getattr(leaves, name)._version == 0, name
    assert torch.equal(leaves.scaling, problem.scaling)


def test_the_graph_can_be_differentiated_twice_with_retain_graph(backend, device):
    leaves = on(backend, device, R0=3).leaves(TRAINABLE)
    result = called(backend, leaves)
    loss = (result.output * output_weights(result.output)).sum() + result.balance_loss
    loss.backward(retain_graph=True)
    first = {name: getattr(leaves, name).grad.clone() for name in TRAINABLE}
    loss.backward()
    for name in TRAINABLE:
        assert torch.equal(getattr(leaves, name).grad, 2 * first[name]), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_result_is_the_same_and_carries_no_graph(mode, backend, device):
    leaves = on(backend, device, R0=3).leaves(TRAINABLE)
    expected = called(backend, leaves)
    with mode():
        result = called(backend, leaves)
    assert not result.output.requires_grad and not result.balance_loss.requires_grad
    assert torch.equal(result.output, expected.output)
    assert torch.equal(result.balance_loss, expected.balance_loss)


def test_training_works_after_a_first_use_in_inference_mode():
    problem = make_problem(R=21, E=7, K=3, R0=2)  # sizes that no other test uses: anything cached is made here
    with torch.inference_mode():
        run_goat(problem, needs=(), balance_share=0.0)
    assert_outcomes_agree(run_goat(problem), evaluate_oracle(problem), torch.float64)


@pytest.mark.parametrize("case", [{}, {"T": 0}, {"R0": 5}, {"K": 4, "R0": 1}], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_uninitialised_memory_is_never_read_and_every_operation_is_deterministic(case, dropout_p):
    problem = make_problem(**case)
    outcomes = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)  # fills every torch.empty with NaN, refuses random orders
        try:
            torch.manual_seed(1)
            outcomes.append(run_goat(problem, dropout_p=dropout_p, training=True))
        finally:
            torch.use_deterministic_algorithms(False)
    assert_outcomes_identical(*outcomes)


def test_two_runs_are_bitwise_equal():
    problem = make_problem(T=129, N=33, M=29, R=16, E=8, dtype=torch.float32, R0=5)
    assert_outcomes_identical(run_goat(problem), run_goat(problem))


SECOND_ORDER_TARGETS = ("x", "weight", "lora_A", "lora_B", "router")


@pytest.mark.long
@pytest.mark.parametrize("target", SECOND_ORDER_TARGETS)
@pytest.mark.parametrize("of", ["x", "lora_A", "lora_B", "router"])
def test_a_second_derivative_raises_rather_than_being_wrong(of, target, backend, device):
    leaves = on(backend, device).leaves(TRAINABLE)
    result = called(backend, leaves)
    loss = result.output.sum() + result.balance_loss
    (gradient,) = torch.autograd.grad(loss, getattr(leaves, of), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), getattr(leaves, target), allow_unused=True)


def test_create_graph_alone_gives_the_first_derivative():
    problem = make_problem(R0=3)
    expected = run_goat(problem).gradients
    leaves = problem.leaves(TRAINABLE)
    result = goat_linear(
        *(leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.router),
        bias=leaves.bias,
        scaling=1.7,
        top_k=2,
        residual=leaves.residual,
    )
    loss = (result.output * output_weights(result.output)).sum() + BALANCE_SHARE * result.balance_loss
    gradients = torch.autograd.grad(loss, [getattr(leaves, name) for name in TRAINABLE], create_graph=True)
    for name, gradient in zip(TRAINABLE, gradients, strict=True):
        assert_close(name, gradient.detach(), expected[name], torch.float64)


# --- autocast -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward_inside", [True, False], ids=["backward-inside", "backward-outside"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_equals_an_explicit_cast(backward_inside, x_dtype):
    problem = make_problem(T=33, R0=3, dtype=torch.float32)
    problem = replace(problem, x=problem.x.to(x_dtype))
    leaves, cast = problem.leaves(TRAINABLE), problem.leaves(TRAINABLE)

    def run(p, x, weight, bias):
        options = {"bias": bias, "scaling": 1.7, "top_k": 2, "residual": p.residual}
        result = goat_linear(x, weight, p.lora_A, p.lora_B, p.router, **options)
        return result, (result.output.float() * output_weights(result.output).float()).sum() + result.balance_loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, loss = run(leaves, leaves.x, leaves.weight, leaves.bias)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    half = (t.to(torch.bfloat16) for t in (cast.x, cast.weight, cast.bias))
    expected, expected_loss = run(cast, *half)
    expected_loss.backward()

    assert result.output.dtype == torch.bfloat16 and result.balance_loss.dtype == torch.float32
    assert torch.equal(result.output, expected.output) and torch.equal(result.balance_loss, expected.balance_loss)
    for name in TRAINABLE:
        gradient = getattr(leaves, name).grad
        assert gradient.dtype == getattr(problem, name).dtype, name
        assert torch.equal(gradient, getattr(cast, name).grad), name


def test_autocast_leaves_float64_alone():
    problem = make_problem(R0=3)
    expected = run_goat(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run_goat(problem)
    assert_outcomes_identical(result, expected)


# --- a base layer that ran elsewhere ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("R0", [None, 3], ids=["fold", "path"])
def test_a_base_output_gives_the_weight_form(dtype, R0):
    problem = make_problem(leading=(3, 5), dtype=dtype, R0=R0)

    def with_base_output(x, weight, *adapter, bias, **options):
        base = F.linear(x, weight, bias)
        kept = base.detach().clone()
        routed = routed_linear(x, *adapter, base_output=base, **options)
        assert torch.equal(base, kept) and base._version == 0, "the base layer's output was modified"
        return routed

    assert_outcomes_agree(evaluate(with_base_output, problem), run_goat(problem), dtype)


def test_a_base_output_gets_the_gradient_of_the_output():
    problem = make_problem()
    base = F.linear(problem.x, problem.weight).requires_grad_()
    routed = routed_linear(
        *(problem.x, problem.lora_A, problem.lora_B, problem.router), base_output=base, scaling=1.0, top_k=2
    )
    grad_y = output_weights(routed.output)
    routed.output.backward(grad_y)
    assert torch.equal(base.grad, grad_y)


# --- the balance loss injected in backward ------------------------------------------------------------------------


def injected_gradients(problem, coefficient, *, scale=None, written=None, use_output=True, balance_share=0.0):
    """Gradients with injection; ``scale`` is its tensor's value at forward, ``written`` what it is set to after."""
    leaves = problem.leaves(TRAINABLE)
    scale = None if scale is None else torch.tensor(scale)
    routed = routed_linear(
        *(leaves.x, leaves.lora_A, leaves.lora_B, leaves.router),
        weight=leaves.weight,
        bias=leaves.bias,
        scaling=problem.scaling,
        top_k=problem.top_k,
        residual=problem.residual,
        balance_coefficient=coefficient,
        balance_scale=scale,
    )
    if written is not None:
        scale.data.fill_(written)
    loss = torch.zeros((), dtype=torch.float64)
    if use_output:
        loss = loss + (routed.output * output_weights(routed.output)).sum()
    if balance_share:
        loss = loss + balance_share * routed.balance_loss
    loss.backward()
    return {name: getattr(leaves, name).grad for name in TRAINABLE}


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 0.5),
        ({"scale": 1.0}, 0.5),
        ({"scale": 3.0}, 1.5),
        ({"scale": 1.0, "written": 0.25}, 0.125),
        ({"scale": 1.0, "written": 0.0}, 0.0),
        ({"scale": 1.0, "written": 0.25, "balance_share": 2.0}, 2.125),
    ],
    ids=["no-scale", "unit-scale", "scale", "written-later", "written-zero", "on-top-of-an-explicit-loss"],
)
@pytest.mark.parametrize("R0", [None, 3], ids=["fold", "path"])
def test_injection_equals_adding_coefficient_times_scale_times_the_balance_loss(options, share, R0):
    problem = make_problem(R0=R0)
    gradients = injected_gradients(problem, 0.5, **options)
    expected = run_goat(problem, balance_share=share).gradients
    for name, gradient in gradients.items():
        assert_close(name, gradient, expected[name], torch.float64)
    without = run_goat(problem, balance_share=0.0).gradients
    assert share == 0.0 or not torch.equal(gradients["router"], without["router"])


def test_injection_does_not_apply_where_only_the_balance_loss_is_differentiated():
    problem = make_problem()
    gradients = injected_gradients(problem, 0.5, use_output=False, balance_share=1.0)
    expected = run_goat(problem, use_output=False, balance_share=1.0).gradients
    assert_close("router", gradients["router"], expected["router"], torch.float64)


def test_injection_leaves_the_values_alone():
    problem = make_problem()
    tensors = (problem.x, problem.lora_A, problem.lora_B, problem.router)
    plain = routed_linear(*tensors, weight=problem.weight, scaling=1.0, top_k=2)
    injected = routed_linear(*tensors, weight=problem.weight, scaling=1.0, top_k=2, balance_coefficient=5.0)
    assert torch.equal(plain.output, injected.output) and torch.equal(plain.balance_loss, injected.balance_loss)


# --- the backend --------------------------------------------------------------------------------------------------


def test_the_environment_variable_stands_in_for_auto(monkeypatch):
    problem = make_problem()
    expected = run_goat(problem)
    monkeypatch.setenv("GOAT_KERNELS_BACKEND", "torch")
    assert_outcomes_identical(evaluate(goat_linear, problem), expected)
    monkeypatch.setenv("GOAT_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"GOAT_KERNELS_BACKEND='nonsense'.*auto.*torch"):
        evaluate(goat_linear, problem)
    assert_outcomes_identical(run_goat(problem), expected)  # a call that names its backend does not ask
