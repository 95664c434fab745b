"""Adapted models under selective checkpointing, torch.compile over checkpoints, exporters and torch.func."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import get_peft_model
from peft_tiny_models import tiny_llama
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from goat_kernels import GoatConfig
from goat_kernels.training import router_statistics

aten = torch.ops.aten


def adapted(**options):
    torch.manual_seed(2)
    base = nn.Sequential(nn.Linear(14, 26), nn.Tanh(), nn.Linear(26, 11, bias=False))
    settings = {"r": 6, "num_experts": 3, "balance_coefficient": 0.2, "target_modules": ["0", "2"], **options}
    return get_peft_model(base, GoatConfig(**settings))


def gradients(model, run, *inputs):
    model.zero_grad()
    torch.manual_seed(6)
    output = run(*inputs)
    (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
    return {"output": output.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_equal(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys() and len(found) > 6
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance / 10, msg=name)


@pytest.mark.parametrize("is_hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("options", [{}, {"residual": "fold", "lora_dropout": 0.3}], ids=str)
def test_selective_checkpointing_changes_no_bit_also_over_a_hooked_base(options, is_hooked):
    model = adapted(**options)
    if is_hooked:  # the base layer is then called, and the adapter added onto its output
        for layer in (model.base_model.model[0], model.base_model.model[2]):
            layer.base_layer.register_forward_hook(lambda module, args, output: output * 1.25)
    x = torch.randn(3, 5, 14)
    expected = gradients(model, model, x)
    for policy in (
        [aten.mm.default, aten.addmm.default],
        lambda ctx, op, *a, **k: CheckpointPolicy.PREFER_RECOMPUTE if op.is_view else CheckpointPolicy.MUST_SAVE,
    ):
        contexts = partial(create_selective_checkpoint_contexts, policy)
        run = partial(checkpoint, model.base_model.model, use_reentrant=False, context_fn=contexts)
        assert_equal(gradients(model, run, x), expected)


def llama(**options):
    model = tiny_llama()
    model = get_peft_model(model, GoatConfig(r=8, num_experts=4, target_modules="all-linear", **options))
    model.config.use_cache = False  # transformers would log about it in the middle of a graph
    return model.train()


@pytest.mark.long
@pytest.mark.parametrize("options", [{"balance_coefficient": 0.1}, {"lora_dropout": 0.2}], ids=str)
def test_a_checkpointed_llama_compiles_whole_and_injects_with_the_scale_of_its_loss(options):
    torch._dynamo.reset()
    model = llama(**options)
    fresh = copy.deepcopy(model)
    fresh.gradient_checkpointing_enable({"use_reentrant": False})
    # Not needed without re-entrance, and nothing that a graph can hold.
    fresh.get_base_model().disable_input_require_grads()
    step = torch.compile(fresh, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(50, (2, 12))
    for factor in (1.0, 0.25):
        outcomes = []
        for module, run in ((model, model), (fresh, step)):
            module.zero_grad()
            torch.manual_seed(9)
            (factor * run(input_ids=tokens, labels=tokens).loss).backward()
            outcomes.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
        assert_equal(outcomes[1], outcomes[0], tolerance=1e-5)
        assert router_statistics(fresh) == router_statistics(model)
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_exported_adapted_model_computes_and_differentiates_as_it_does(training, tmp_path):
    model = adapted(balance_coefficient=0.0, lora_dropout=0.2).train(training)
    exported = torch.export.export(model, (torch.randn(4, 14),), dynamic_shapes={"args": ({0: torch.export.Dim.AUTO},)})
    torch.export.save(exported, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    x = torch.randn(9, 14)
    assert_equal(gradients(program, program, x), gradients(model, model, x), tolerance=1e-5)


def test_a_trace_of_an_adapted_model_warns_of_nothing_and_loads_without_the_package(tmp_path):
    import subprocess
    import sys

    model = adapted().eval()
    torch.jit.save(torch.jit.trace(model, (torch.randn(3, 14),)), tmp_path / "trace.pt")
    x = torch.randn(8, 14)
    torch.save({"x": x, "y": model(x).detach()}, tmp_path / "data.pt")
    code = (
        "import sys, torch; sys.modules['goat_kernels'] = None; data = torch.load(sys.argv[2]);"
        "torch.testing.assert_close(torch.jit.load(sys.argv[1])(data['x']), data['y'])"
    )
    paths = [str(tmp_path / "trace.pt"), str(tmp_path / "data.pt")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_per_sample_gradients_of_an_adapted_model_are_those_of_each_sample(training):
    model = adapted().double().train(training)
    x, weights = torch.randn(4, 6, 14).double(), torch.linspace(-1, 2, 66).view(6, 11).double()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return (functional_call(model, parameters, (x,)) * weights).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for sample in range(4):
        expected = gradients(model, model, x[sample])
        found = {"output": expected["output"]} | {name: gradient[sample] for name, gradient in per_sample.items()}
        assert_equal(found, expected, tolerance=1e-9)


def test_per_sample_gradients_of_a_llama_that_returns_its_loss():
    model = llama(balance_coefficient=0.1)
    tokens = torch.randint(50, (3, 1, 10))
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, tokens):
        return functional_call(model, parameters, kwargs={"input_ids": tokens, "labels": tokens}).loss

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, tokens)
    for sample in range(3):
        model.zero_grad()
        model(input_ids=tokens[sample], labels=tokens[sample]).loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert_equal({n: g[sample] for n, g in per_sample.items()}, expected, tolerance=1e-4)


def test_an_adapter_with_more_experts_keeps_its_own_statistics_in_compiled_checkpoints():
    torch._dynamo.reset()
    model = adapted(r=6)
    model.add_adapter("wide", GoatConfig(r=5, num_experts=5, target_modules=["0", "2"]))
    body = model.base_model.model
    for name, E in (("wide", 5), ("default", 3)):
        model.set_adapter(name)
        run = torch.compile(lambda x: checkpoint(body, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
        run(torch.randn(7, 14)).sum().backward()
        load = body[0].expert_load
        assert load.shape == (E,) and float(load.sum()) == pytest.approx(2.0)
    torch._dynamo.reset()
