"""torch.compile takes goat_linear and GoatLinear as one graph, forward and backward, and computes what eager does.

Most cases stop before code generation (``aot_eager``), where our operators are traced, given fake tensors and
differentiated; one goes through inductor.
"""

from __future__ import annotations

import copy

import pytest
import torch
from goat_problems import (
    BALANCE_SHARE,
    TRAINABLE,
    assert_close,
    assert_outcomes_agree,
    evaluate,
    make_problem,
    output_weights,
    run_goat,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from goat_kernels import GoatLinear, goat_linear
from goat_kernels.forward_backward import Layer
from goat_kernels.functional import routed_linear
from goat_kernels.operators import flattened
from goat_kernels.passes import Adapter
from goat_kernels.training import attach_balance_scale

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize(
    "case",
    [{}, {"R0": 3, "per_expert": True}, {"bias": False, "K": 4}, {"leading": (2, 3, 2)}, {"T": 1}],
    ids=["plain", "residual", "every-expert", "batch", "one-token"],
)
def test_goat_linear_compiles_to_what_eager_computes(case):
    problem = make_problem(**case)
    assert_outcomes_agree(evaluate(compiled(goat_linear), problem), run_goat(problem), torch.float64)


@pytest.mark.parametrize("needs", [("x",), ("lora_B",), ("lora_A", "lora_B", "router"), ()], ids=lambda s: "+".join(s))
def test_compiled_code_respects_the_gradients_asked_for(needs):
    problem = make_problem(R0=3)
    result = evaluate(compiled(goat_linear), problem, needs=needs)
    assert_outcomes_agree(result, run_goat(problem, needs=needs), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_and_mixed_dtypes_compile(dtype):
    problem = make_problem(dtype=dtype, adapter_dtype=torch.float32, R0=3)
    torch.manual_seed(3)
    expected = run_goat(problem, dropout_p=0.3, training=True)
    torch.manual_seed(3)
    result = evaluate(compiled(goat_linear), problem, dropout_p=0.3, training=True)
    assert_outcomes_agree(result, expected, dtype)


def test_the_number_of_tokens_is_dynamic_without_recompiling():
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(goat_linear, fullgraph=True, backend=counter)
    compiled_graphs = []
    for T in (5, 7, 9, 30, 64):
        problem = make_problem(T, R0=3)
        assert_outcomes_agree(evaluate(function, problem), run_goat(problem), torch.float64)
        compiled_graphs.append(counter.frame_count)
    assert compiled_graphs == [1, 2, 2, 2, 2], "one graph for the first size, one for all others"


def test_compiled_as_dynamic_the_first_graph_serves_every_size(monkeypatch):
    monkeypatch.setattr("goat_kernels.backends._RESOLVED", {})  # as in a process that compiles before anything else
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(goat_linear, fullgraph=True, backend=counter, dynamic=True)
    compiled_graphs = set()
    for T in (5, 8, 33):
        problem = make_problem(T)
        assert_outcomes_agree(evaluate(function, problem), run_goat(problem), torch.float64)
        compiled_graphs.add(counter.frame_count)
    assert len(compiled_graphs) == 1


class Model(nn.Module):
    """Two adapted layers with something in between, one of them used twice."""

    def __init__(self, **options) -> None:
        super().__init__()
        settings = {"r": 8, "num_experts": 4, **options}
        self.first = GoatLinear(16, 12, residual="path", **settings)
        self.second = GoatLinear(12, 12, residual="fold", **settings)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.second(x + self.second(x))


def gradients_of(model, run, x):
    model.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    output = run(leaf)
    (output.float() * output_weights(output).float()).sum().backward()
    return {"output": output.detach(), "x": leaf.grad} | {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def assert_runs_agree(found, expected, dtype):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert_close(name, found[name], tensor, dtype)


@pytest.mark.parametrize(
    "options", [{}, {"balance_coefficient": 0.1}, {"init": "hydralora"}, {"scaling": "goat_s"}], ids=str
)
def test_a_model_compiles_whole(options):
    model = Model(**options)
    x = torch.randn(6, 16)
    fresh = copy.deepcopy(model)
    expected = gradients_of(model, model, x)
    assert fresh.first.expert_load is None and fresh.first.balance_loss is None
    found = gradients_of(fresh, compiled(fresh), x)
    assert_runs_agree(found, expected, torch.float32)
    for name in ("expert_load", "balance_loss"):
        statistic = getattr(fresh.first, name)
        assert torch.equal(statistic, getattr(model.first, name)), f"{name} is kept in compiled code too"
        assert not statistic.requires_grad


def test_a_layer_compiles_with_inductor():
    model = nn.Sequential(GoatLinear(16, 12, r=8, num_experts=4), nn.ReLU())
    x = torch.randn(6, 16)
    expected = gradients_of(model, model, x)
    with torch._inductor.config.patch(compile_threads=1):  # a pool of processes would take longer than the work
        assert_runs_agree(gradients_of(model, compiled(model, "inductor"), x), expected, torch.float32)


def test_a_model_compiles_under_autocast():
    model = Model()
    x = torch.randn(6, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients_of(model, model, x)
        found = gradients_of(model, compiled(model), x)
    assert found["output"].dtype == torch.bfloat16
    assert_runs_agree(found, expected, torch.bfloat16)


def test_a_compiled_layer_follows_train_eval_and_the_balance_scale():
    model = Model(dropout=0.3, balance_coefficient=0.1)
    for layer in (model.first, model.second):
        layer.balance_scale = torch.tensor(0.5)
    function = compiled(model)
    x = torch.randn(6, 16)
    for training in (True, False, True):
        model.train(training)
        runs = []
        for run in (model, function):
            torch.manual_seed(4)
            runs.append(gradients_of(model, run, x))
        assert_runs_agree(runs[1], runs[0], torch.float32)


# --- checkpoints, statistics and the balance scale ----------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"scaling": "goat_s"}, {"init": "hydralora"}], ids=str)
@pytest.mark.parametrize("use_twice", [False, True])
def test_a_checkpointed_model_compiles_whole(options, use_twice):
    model = Model(balance_coefficient=0.1, **options)
    fresh = copy.deepcopy(model)

    def checkpointed(x):
        y = checkpoint(fresh, x, use_reentrant=False)
        return checkpoint(lambda y: fresh.second(torch.tanh(y)), y, use_reentrant=False) if use_twice else y

    def plain(x):
        y = model(x)
        return model.second(torch.tanh(y)) if use_twice else y

    x = torch.randn(6, 16)
    runs = []
    for module, run in ((model, plain), (fresh, compiled(checkpointed))):
        torch.manual_seed(5)
        runs.append(gradients_of(module, run, x))
    assert_runs_agree(runs[1], runs[0], torch.float32)
    for name in ("first", "second"):
        mine, theirs = getattr(fresh, name), getattr(model, name)
        assert torch.equal(mine.expert_load, theirs.expert_load)
        assert torch.equal(mine.balance_loss, theirs.balance_loss)


def test_a_checkpointed_layer_compiles_with_inductor_and_repeats_its_dropout():
    layer = GoatLinear(16, 12, r=8, num_experts=4, dropout=0.4, init="lora", bias=False)
    with torch.no_grad():
        layer.lora_B.normal_()
    x, weights = torch.randn(30, 16), torch.randn(30, 12)
    with torch._inductor.config.patch(compile_threads=1):
        function = compiled(lambda x: checkpoint(layer, torch.relu(x), use_reentrant=False), "inductor")
        output = function(x.requires_grad_())
        (output * weights).sum().backward()
    # The adapter's share is linear in lora_B and in lora_A, so its gradient gives it back, if the masks are the same.
    share = ((output - torch.relu(x) @ layer.weight.T) * weights).sum().detach()
    for parameter in (layer.lora_A, layer.lora_B):
        torch.testing.assert_close((parameter.grad * parameter).sum().detach(), share, rtol=1e-4, atol=1e-3)


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model(balance_coefficient=0.4)

    def forward(self, x):
        return self.model(x).square().mean()


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.125])
def test_compiled_code_injects_with_the_scale_of_the_trainer_exactly_once(factor, is_checkpointed):
    eager = Loss()
    attach_balance_scale(eager)
    fresh = copy.deepcopy(eager)
    attach_balance_scale(fresh)
    # A compiled module runs its own hooks in graphs of their own: the scale is written outside of the layers' graph.
    function = compiled(fresh)
    if is_checkpointed:
        function = compiled(lambda x: checkpoint(fresh, x, use_reentrant=False))
    x = torch.randn(6, 16)
    for other in (3.0, factor):  # what the step before left behind counts for nothing
        for loss in (eager, fresh):
            loss.zero_grad()
        (other * eager(x)).backward()
        (other * function(x)).backward()
    for (name, expected), found in zip(eager.named_parameters(), fresh.parameters(), strict=True):
        if expected.requires_grad:
            assert_close(name, found.grad, expected.grad, torch.float32)
    assert float(fresh.model.first.balance_scale) == factor


def test_statistics_are_those_of_the_last_forward_compiled_or_not():
    layer = GoatLinear(16, 12, r=8, num_experts=4)
    function = compiled(lambda x: checkpoint(layer, x, use_reentrant=False))
    kept = []
    for T, run in ((5, function), (7, layer), (3, function), (4, layer), (9, function)):
        x = torch.randn(T, 16)
        run(x).sum().backward()
        load = layer.expert_load
        kept.append((load, load.clone()))
        assert torch.equal(load * T, (load * T).round()), "shares of T tokens"
        twin = copy.deepcopy(layer)
        twin(x)
        assert torch.equal(twin.expert_load, load) and torch.equal(twin.balance_loss, layer.balance_loss)
    assert all(torch.equal(load, then) for load, then in kept), "what was read does not change with the next forward"


@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_training_compiles_after_an_evaluation_in_inference_mode(first):
    layer = GoatLinear(16, 12, r=8, num_experts=4)
    function = compiled(lambda x: checkpoint(layer, x, use_reentrant=False))
    with torch.inference_mode():
        (layer if first == "eager" else compiled(layer))(torch.randn(5, 16))
    assert not layer.expert_load.is_inference() and float(layer.expert_load.sum()) == pytest.approx(2.0)
    function(torch.randn(3, 16)).sum().backward()
    assert float((layer.expert_load * 3).sum()) == pytest.approx(6.0)


def test_injection_in_compiled_code_reads_the_scale_at_backward():
    problem = make_problem()
    gradients = []
    for function in (routed_linear, compiled(routed_linear)):
        leaves = problem.leaves(TRAINABLE)
        scale = torch.tensor(1.0)
        routed = function(
            *(leaves.x, leaves.lora_A, leaves.lora_B, leaves.router),
            weight=leaves.weight,
            scaling=1.7,
            top_k=2,
            balance_coefficient=0.5,
            balance_scale=scale,
        )
        scale.data.fill_(0.25)
        (routed.output * output_weights(routed.output)).sum().backward()
        gradients.append(leaves.router.grad)
    assert_close("router", gradients[1], gradients[0], torch.float64)


# --- the operators themselves -------------------------------------------------------------------------------------


def forward_arguments(requires_grad: bool, *, R0=3, form="weight", dropout_p=0.0, dtype=torch.float32):
    problem = make_problem(T=6, R0=R0, dtype=dtype, adapter_dtype=torch.promote_types(dtype, torch.float32))
    leaves = problem.leaves(TRAINABLE if requires_grad else ())
    base = torch.randn(6, 11, dtype=dtype, requires_grad=requires_grad) if form == "base_output" else None
    residual = leaves.residual if R0 is not None else (None, None)
    seed = torch.tensor([1, 2], dtype=torch.int32) if dropout_p else None
    scaling_E = torch.rand(4) + 0.5
    adapter = Adapter(leaves.lora_A, leaves.lora_B, leaves.router, *residual, 1.0, scaling_E, 2, dropout_p, seed)
    own = (leaves.weight, None, leaves.bias) if base is None else (None, base, None)
    return leaves.x, Layer(*own, adapter, torch.tensor(0.5), 0.1)


OPERATOR_CASES = {
    "path": {},
    "fold": {"R0": None},
    "base-output": {"form": "base_output"},
    "dropout": {"dropout_p": 0.3},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("case", OPERATOR_CASES.values(), ids=OPERATOR_CASES.keys())
def test_opcheck_of_the_forward_operator(case, requires_grad):
    x, layer = forward_arguments(requires_grad, **case)
    torch.library.opcheck(torch.ops.goat_kernels.forward.default, (x, *flattened(layer), "torch"))


@pytest.mark.long
@pytest.mark.parametrize("needs", [[True] * 6, [False, False, False, True, True, True], [True] + [False] * 5], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("case", OPERATOR_CASES.values(), ids=OPERATOR_CASES.keys())
def test_opcheck_of_the_backward_operator(case, requires_grad, needs):
    x, layer = forward_arguments(requires_grad, **case)
    if layer.weight is None:
        needs = [*needs[:1], False, False, *needs[3:]]
    with torch.no_grad():
        y, balance_loss, *routing = torch.ops.goat_kernels.forward.default(x, *flattened(layer), "torch")
        grad_y = torch.randn_like(y)
    layer = layer._replace(base_output=None, bias=None)
    arguments = (grad_y, torch.full_like(balance_loss, 0.7), x, routing, *flattened(layer), needs, "torch")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not requires_grad:  # this test differentiates, and a second derivative raises
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.goat_kernels.backward.default, arguments, test_utils=tests)
    if requires_grad:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.ops.goat_kernels.backward.default(*arguments)[0].sum().backward()


def test_opcheck_knows_the_operators_without_bias_or_balance_gradient():
    x, layer = forward_arguments(False)
    flat = flattened(layer._replace(bias=None))
    torch.library.opcheck(torch.ops.goat_kernels.forward.default, (x, *flat, "torch"))


def test_meta_shapes_and_layouts_equal_the_real_ones():
    for case in OPERATOR_CASES.values():
        x, layer = forward_arguments(False, **case)
        tensors, *options = flattened(layer)
        real = torch.ops.goat_kernels.forward.default(x, tensors, *options, "torch")
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            x, *fakes = (mode.from_tensor(t) for t in (x, *tensors))
            fake = torch.ops.goat_kernels.forward.default(x, fakes, *options, "torch")
        described = [[(t.shape, t.stride(), t.dtype) for t in result] for result in (real, fake)]
        assert described[0] == described[1]


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_statistics_of_a_compiled_forward(compiler, dtype):
    torch.manual_seed(1)
    layer = GoatLinear.from_linear(torch.nn.Linear(24, 20).to(dtype), r=6, num_experts=3, top_k=2)
    x = torch.randn(9, 24).to(dtype)
    compiled = torch.compile(copy.deepcopy(layer), backend=compiler, fullgraph=True)
    layer(x)
    for _ in range(2):  # before and after an eager forward has bound tensors of its own
        compiled(x)
        torch.testing.assert_close(compiled.balance_loss, layer.balance_loss)
        torch.testing.assert_close(compiled.expert_load, layer.expert_load)
        compiled._orig_mod(torch.zeros_like(x))


def test_statistics_can_be_read_in_compiled_code():
    layer = GoatLinear(24, 20, r=6, num_experts=3)
    x = torch.randn(9, 24)
    read = torch.compile(
        lambda x: (layer(x), layer.balance_loss, layer.expert_load), backend="aot_eager", fullgraph=True
    )
    _, balance_loss, load = read(x)
    layer(x)
    torch.testing.assert_close(balance_loss, layer.balance_loss)
    torch.testing.assert_close(load, layer.expert_load)


def test_the_balance_loss_differentiates_in_compiled_code():
    problem = make_problem()
    options = {"use_output": False, "balance_share": BALANCE_SHARE}
    result = evaluate(compiled(goat_linear), problem, **options).gradients["router"]
    assert_close("router", result, run_goat(problem, **options).gradients["router"], torch.float64)
