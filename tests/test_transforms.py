"""Function transforms (torch.func) and exporters (torch.export, torch.jit.trace) see plain torch calls and get right
values and gradients, whatever the backend.
"""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from goat_problems import BALANCE_SHARE, TRAINABLE, assert_close, make_problem, output_weights, run_goat
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from goat_kernels import GoatLinear, goat_linear
from goat_kernels.training import attach_balance_scale

F64 = torch.float64
CASES = {
    "path": {},
    "fold": {"residual": "fold"},
    "every-expert": {"top_k": 3},
    "per-expert": {"scaling": "goat_s"},
    "hydralora": {"init": "hydralora"},
    "triton": {"backend": "triton"},
}


class Model(nn.Module):
    """Two adapted layers and a plain one, in float64 (float32 where the Triton kernels are asked for)."""

    def __init__(self, **options):
        super().__init__()
        settings = {"num_experts": 3, "dtype": F64, "balance_coefficient": 0.3, **options}
        self.first = GoatLinear(10, 18, r=6, **settings)
        self.second = GoatLinear(18, 9, r=9, bias=False, **settings)

    def forward(self, x):
        return self.second(torch.sin(self.first(x)))


def build(case, training=True):
    options = CASES[case]
    dtype = torch.float32 if "backend" in options else F64
    model = Model(**options, dtype=dtype).train(training)
    return model, dtype


def trainable(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def objective(model):
    def loss(parameters, x, weights):
        return (functional_call(model, parameters, (x,)) * weights).sum()

    return loss


def eager_gradients(model, x, weights):
    model.zero_grad()
    (model(x) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_all_close(found, expected, dtype):
    assert found.keys() == expected.keys() and len(found) >= 6
    for name, tensor in expected.items():
        assert_close(name, found[name], tensor, dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_torch_func_are_those_of_backward_for_a_batch_and_for_each_sample(case, training):
    model, dtype = build(case, training)
    x, weights = torch.randn(4, 5, 10, dtype=dtype), torch.randn(4, 5, 9, dtype=dtype)
    parameters, loss = trainable(model), objective(model)
    expected = eager_gradients(model, x, weights)
    load, kept = model.first.expert_load, model.first._expert_load
    assert_all_close(grad(loss)(parameters, x, weights), expected, dtype)
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, weights)
    assert model.first._expert_load is kept and torch.equal(model.first.expert_load, load), "no statistics are kept"
    for sample in range(4):
        expected = eager_gradients(model, x[sample], weights[sample])
        assert_all_close({name: gradient[sample] for name, gradient in per_sample.items()}, expected, dtype)


def test_outside_of_training_nothing_is_injected_and_in_training_only_with_a_coefficient():
    gradients = []
    for coefficient, training in ((0.3, True), (0.3, False), (0.0, True)):
        torch.manual_seed(1)
        model = Model(balance_coefficient=coefficient).train(training)
        x = torch.randn(6, 10, dtype=F64)
        gradients.append(grad(objective(model))(trainable(model), x, torch.ones(6, 9, dtype=F64))["first.router"])
    assert torch.equal(gradients[1], gradients[2]) and not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("case", ["path", "every-expert", "hydralora"])
def test_a_batch_of_models_and_a_batch_of_inputs_map(case):
    models = [build(case)[0] for _ in range(3)]
    x = torch.randn(7, 10, dtype=F64)
    expected = torch.stack([model(x) for model in models])
    stacked, buffers = stack_module_state(models)
    found = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(stacked, buffers)
    assert_close("models", found, expected, F64)
    for part in ("lora_A", "lora_B", "router", "residual_A"):  # the others are the same for all
        mine = {name: t for name, t in {**stacked, **buffers}.items() if part in name}
        if not mine:  # hydralora has no residual
            continue
        found = vmap(lambda p: functional_call(models[0], p, (x,)))(mine)
        one = functional_call(models[0], {name: t[2] for name, t in mine.items()}, (x,))
        assert_close(part, found[2], one, F64)
    x = torch.randn(2, 3, 4, 10, dtype=F64)
    expected = torch.stack([torch.stack([models[0](part) for part in row]) for row in x])
    assert_close("nested", vmap(vmap(models[0]))(x), expected, F64)


def test_every_call_has_a_batching_rule():
    model = Model(dropout=0.2)
    x, weights = torch.randn(3, 5, 10, dtype=F64), torch.randn(3, 5, 9, dtype=F64)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*performance drop.*")
            vmap(grad(objective(model)), in_dims=(None, 0, 0), randomness="different")(trainable(model), x, weights)
    finally:
        torch.set_warn_always(False)


def test_mapping_selects_the_same_experts_also_where_logits_tie():
    problem = make_problem(T=6, K=2)
    problem.router[2] = problem.router[0]
    problem.router[3] = problem.router[1]
    tensors = (problem.weight, problem.lora_A, problem.lora_B, problem.router)

    def run(x):
        return goat_linear(x, *tensors, scaling=1.7, top_k=2).output

    assert_close("output", vmap(run)(problem.x[:, None]).squeeze(1), run(problem.x), F64)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_mode_jacobians_and_second_derivatives_are_right(training):
    model, _ = build("path", training)
    x, weights = torch.randn(5, 10, dtype=F64), torch.randn(5, 9, dtype=F64)
    parameters, loss = trainable(model), objective(model)

    def of_x(x):
        return functional_call(model, parameters, (x,))

    model.eval()  # its jacobian has no balance loss in it
    forward, backward = jacfwd(of_x)(x), jacrev(of_x)(x)
    assert_close("jacobians", forward, backward, F64)
    tangent = torch.randn_like(x)
    assert_close("jvp", jvp(of_x, (x,), (tangent,))[1], (backward * tangent).sum((-1, -2)), F64)
    model.train(training)

    def of_router(router):
        return loss({**parameters, "first.router": router}, x, weights)

    router = parameters["first.router"]
    direction, step = torch.randn_like(router), 1e-6
    curvature = (hessian(of_router)(router) * direction).sum((-1, -2))
    ahead, behind = (grad(of_router)(router + sign * step * direction) for sign in (1, -1))
    torch.testing.assert_close(curvature, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-6)


def test_dropout_in_transforms_drops_what_an_eager_call_drops():
    model = Model(dropout=0.35)
    x, weights = torch.randn(3, 4, 10, dtype=F64), torch.randn(3, 4, 9, dtype=F64)
    parameters, loss = trainable(model), objective(model)
    torch.manual_seed(8)
    expected = eager_gradients(model, x[0], weights[0])
    torch.manual_seed(8)
    assert_all_close(grad(loss)(parameters, x[0], weights[0]), expected, F64)
    for randomness, differs in (("same", False), ("different", True)):
        outputs = vmap(lambda x: functional_call(model, parameters, (x,)), randomness=randomness)(
            x[:1].expand(2, 4, 10)
        )
        assert torch.equal(outputs[0], outputs[1]) is not differs


@pytest.mark.parametrize("R0", [None, 3])
def test_the_function_and_its_balance_loss_differentiate(R0):
    problem = make_problem(T=7, R0=R0)

    def loss(tensors):
        result = goat_linear(
            *(tensors[name] for name in ("x", "weight", "lora_A", "lora_B", "router")),
            **{"bias": tensors["bias"], "scaling": 1.7, "top_k": 2, "residual": problem.residual},
        )
        return (result.output * output_weights(result.output)).sum() + BALANCE_SHARE * result.balance_loss

    found = grad(loss)({name: getattr(problem, name) for name in TRAINABLE})
    expected = run_goat(problem, balance_share=BALANCE_SHARE).gradients
    for name, gradient in expected.items():
        assert_close(name, found[name], gradient, F64)


def test_the_scale_is_its_default_whatever_the_last_step_of_a_trainer_left():
    model = nn.Sequential(Model(), nn.Flatten(0), nn.Linear(18, 1, dtype=F64))

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).square().sum()

    module = Loss()
    scale = attach_balance_scale(module)
    x = torch.randn(2, 10, dtype=F64)
    module(x).backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
    (64.0 * module(x)).backward()
    assert float(model[0].first.balance_scale) == 64.0
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    found = grad(lambda p: functional_call(module, p, (x,)))(parameters)
    assert_all_close(found, expected, F64)
    scale.default = 0.5
    halved = grad(lambda p: functional_call(module, p, (x,)))(parameters)
    assert not torch.allclose(halved["model.0.first.router"], found["model.0.first.router"])
    assert float(model[0].first.balance_scale) == 0.5 and type(model[0].first.balance_scale) is torch.Tensor


def test_what_the_fused_backward_cannot_do_says_what_can():
    layer = GoatLinear(10, 18, r=6, num_experts=3)
    x = torch.randn(4, 10)
    with pytest.raises(RuntimeError, match=r"torch\.func\.vmap, jacrev"):
        torch.autograd.functional.jacobian(layer, x, vectorize=True)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        gradient.sum().backward()


@pytest.mark.long
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_compiled_transform_is_right_or_says_that_it_cannot_be(training):
    model, _ = build("path", training)
    x, weights = torch.randn(3, 5, 10, dtype=F64), torch.randn(3, 5, 9, dtype=F64)
    per_sample, arguments = vmap(grad(objective(model)), in_dims=(None, 0, 0)), (trainable(model), x, weights)
    expected = per_sample(*arguments)
    torch._dynamo.reset()
    assert_all_close(torch.compile(per_sample, backend="aot_eager")(*arguments), expected, F64)
    torch._dynamo.reset()
    whole = torch.compile(per_sample, backend="aot_eager", fullgraph=True)
    if training:
        with pytest.raises(RuntimeError, match="would lose the balance loss"):
            whole(*arguments)
    else:
        assert_all_close(whole(*arguments), expected, F64)
    torch._dynamo.reset()


# --- exporters ----------------------------------------------------------------------------------------------------


def gradients_by_name(module, run, x):
    module.zero_grad()
    torch.manual_seed(3)
    output = run(x)
    (output * output_weights(output)).sum().backward()
    return {"output": output.detach()} | {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.long
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_an_exported_program_computes_and_differentiates_as_the_module_does(case, training, strict, tmp_path):
    options = {**CASES[case], "balance_coefficient": 0.0, "dropout": 0.2}
    model = Model(**options, dtype=torch.float32).train(training)
    tokens = torch.export.Dim("tokens", min=2)
    exported = torch.export.export(model, (torch.randn(4, 10),), dynamic_shapes=({0: tokens},), strict=strict)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert targets and not any("goat_kernels" in target for target in targets), "a program needs torch alone"
    torch.export.save(exported, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    assert model.first.expert_load is None, "a tracer's tensors are not kept"
    x = torch.randn(11, 10)
    expected = gradients_by_name(model, model, x)
    assert_all_close(gradients_by_name(program, program, x), expected, torch.float32)


def test_an_exported_program_says_that_it_has_no_balance_loss():
    model = Model(dtype=torch.float32)
    x = torch.randn(4, 10)
    with pytest.warns(UserWarning, match="no balance loss"):
        program = torch.export.export(model, (x,)).module()
    plain = copy.deepcopy(model)
    plain.first.balance_coefficient = plain.second.balance_coefficient = 0.0
    assert_all_close(gradients_by_name(program, program, x), gradients_by_name(plain, plain, x), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.export.export(model.eval(), (x,))


@pytest.mark.parametrize("case", CASES)
def test_a_saved_trace_serves_any_number_of_tokens(case):
    model = Model(**CASES[case], dtype=torch.float32).eval()
    model(torch.randn(3, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = torch.jit.trace(model, (torch.randn(2, 10),))
    saved = io.BytesIO()
    torch.jit.save(trace, saved)
    saved.seek(0)
    loaded = torch.jit.freeze(torch.jit.load(saved))
    for size in ((1, 10), (9, 10)):
        x = torch.randn(size)
        assert_close("output", loaded(x), model(x).detach(), torch.float32)


def test_onnx_export_of_a_model_in_eval_mode(tmp_path):
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnx and onnxscript")
    from onnx.reference import ReferenceEvaluator

    model = Model(dtype=torch.float32).eval()
    program = torch.onnx.export(model, (torch.randn(4, 10),), dynamo=True, dynamic_shapes=({0: "tokens"},))
    program.save(tmp_path / "model.onnx")
    session = ReferenceEvaluator(str(tmp_path / "model.onnx"))
    for T in (4, 7):
        x = torch.randn(T, 10)
        (found,) = session.run(None, {session.input_names[0]: x.numpy()})
        assert_close("output", torch.from_numpy(found), model(x).detach(), torch.float32)
