"""The balance scale's hooks leave models as they are; statistics and callback report what the layers saw."""

from __future__ import annotations

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import get_peft_model, get_peft_model_state_dict
from peft_tiny_models import batch, tiny_llama
from torch import nn

from goat_kernels import GoatLinear
from goat_kernels.peft import GoatConfig
from goat_kernels.training import (
    GoatCallback,
    attach_balance_scale,
    balance_scales,
    detach_balance_scale,
    router_statistics,
)


def goat_llama(**changes):
    return get_peft_model(tiny_llama(), GoatConfig(r=8, num_experts=4, target_modules=["q_proj", "v_proj"], **changes))


class Wrapped(nn.Module):
    """A GoatLinear whose model returns its loss in the form that a test asks for."""

    def __init__(self, form):
        super().__init__()
        self.layer = GoatLinear(16, 8, r=4, num_experts=2, top_k=1, balance_coefficient=0.5)
        self.form = form

    def forward(self, x):
        y = self.layer(x)
        return self.form(y.square().mean(), y)


FORMS = {
    "dict": lambda loss, y: {"loss": loss, "y": y},
    "object": lambda loss, y: SimpleNamespace(loss=loss, y=y),
    "ModelOutput": lambda loss, y: transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=y),
    "tuple": lambda loss, y: (loss, y),
}
LOSS_OF = {"dict": lambda o: o["loss"], "tuple": lambda o: o[0]}


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_found_and_unchanged(form):
    model = Wrapped(FORMS[form])
    x = torch.randn(6, 16)
    plain = LOSS_OF.get(form, lambda o: o.loss)(model(x))
    scale = attach_balance_scale(model)
    outputs = model(x)
    assert type(outputs) is type(model.form(plain, x))
    loss = LOSS_OF.get(form, lambda o: o.loss)(outputs)
    assert torch.equal(loss, plain)
    assert model.layer.balance_scale.item() == 1
    loss *= 2.5  # trainers edit the loss in place
    loss.backward()
    assert model.layer.balance_scale.item() == 2.5
    model(x)
    assert model.layer.balance_scale.item() == 1
    assert balance_scales(model) == [scale]


@pytest.mark.parametrize(
    "form",
    [
        lambda loss, y: y,
        lambda loss, y: None,
        lambda loss, y: (y, loss),
        lambda loss, y: {"y": y},
        lambda loss, y: {"loss": None},
        lambda loss, y: {"loss": y.square()},
        lambda loss, y: SimpleNamespace(loss=loss.item()),
        lambda loss, y: (),
    ],
)
def test_outputs_without_a_loss_pass_through(form):
    model = Wrapped(form)
    attach_balance_scale(model)
    expected = form(torch.tensor(0.0), torch.zeros(6, 8))
    assert type(model(torch.randn(6, 16))) is type(expected)
    model.layer(torch.randn(6, 16)).sum().backward()
    assert model.layer.balance_scale.item() == 1


def test_nothing_happens_without_gradients():
    model = Wrapped(FORMS["dict"])
    attach_balance_scale(model)
    model(torch.randn(6, 16))["loss"].mul(4).backward()
    with torch.no_grad():
        assert model.eval()(torch.randn(6, 16))["loss"].grad_fn is None
    assert model.layer.balance_scale.item() == 4


def test_attaching_again_and_around():
    inner = Wrapped(FORMS["dict"])
    first = attach_balance_scale(inner)
    assert attach_balance_scale(inner) is first
    assert len(inner._forward_hooks) == 1
    outer = nn.Sequential(inner)
    second = attach_balance_scale(outer)
    assert balance_scales(outer) == [second]
    assert not inner._forward_hooks and not inner._forward_pre_hooks
    (3 * outer(torch.randn(6, 16))["loss"]).backward()
    assert inner.layer.balance_scale.item() == 3
    detach_balance_scale(outer)
    assert balance_scales(outer) == [] and inner.layer.balance_scale is None
    assert not outer._forward_hooks
    detach_balance_scale(outer)


def test_a_copy_has_a_scale_of_its_own():
    model = goat_llama().train()
    other = copy.deepcopy(model)
    (5 * other(**batch("llama")).loss).backward()
    (mine,), (others,) = balance_scales(model), balance_scales(other)
    assert mine is not others
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    other_layer = other.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.balance_scale.item() == 1 and other_layer.balance_scale.item() == 5


def test_the_tuner_attaches_once_and_takes_in_later_layers():
    model = goat_llama()
    model.add_adapter("second", GoatConfig(r=8, num_experts=4, target_modules=["up_proj"]))
    assert len(balance_scales(model)) == 1
    model.set_adapter("second")
    (2 * model.train()(**batch("llama")).loss).backward()
    assert model.get_base_model().model.layers[0].mlp.up_proj.balance_scale.item() == 2
    assert len(model.get_base_model()._forward_hooks) == 1


def test_a_frozen_adapter_injects_nothing():
    model = goat_llama(balance_coefficient=10.0).train()
    inputs = {"inputs_embeds": torch.randn(2, 4, 32, requires_grad=True), "labels": torch.ones(2, 4, dtype=torch.long)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model(**inputs).loss.backward()
    frozen = inputs["inputs_embeds"].grad.clone()
    inputs["inputs_embeds"].grad = None
    model.eval()(**inputs).loss.backward()
    torch.testing.assert_close(frozen, inputs["inputs_embeds"].grad)


def test_router_statistics():
    model = goat_llama()
    assert router_statistics(model) == {}
    model(**batch("llama"))
    statistics = router_statistics(model)
    assert len(statistics) == 4
    layer = model.get_base_model().model.layers[1].self_attn.v_proj
    found = statistics["base_model.model.model.layers.1.self_attn.v_proj"]
    assert found.balance_loss == layer.balance_loss.item()
    assert found.load == tuple(layer.expert_load.tolist())
    assert sum(found.load) == pytest.approx(2)


def test_statistics_cover_goat_linear():
    model = nn.Sequential(GoatLinear(16, 16, r=4, num_experts=2, top_k=1), nn.ReLU())
    model(torch.randn(5, 16))
    assert list(router_statistics(model)) == ["0"]


def test_callback_logs_and_scales(tmp_path):
    model = goat_llama()
    rows = batch("llama", rows=8)
    data = [{key: value[i] for key, value in rows.items()} for i in range(8)]
    callback = GoatCallback()
    defaults = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            defaults.append(balance_scales(model)[0].default)

    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data[:2],
        callbacks=[callback, Watch()],
    )
    trainer.train()
    trainer.evaluate()
    assert defaults == [0.5, 0.5]
    assert balance_scales(model)[0].default == 1
    assert [entry["step"] for entry in callback.history] == [1, 2]
    logged = [entry for entry in trainer.state.log_history if "goat/balance_loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    for entry, log in zip(callback.history, logged, strict=True):
        assert log["goat/balance_loss"] == entry["balance_loss"] > 1
        assert 0 <= log["goat/load_min"] <= 1 <= log["goat/load_max"] <= 2
        assert len(entry["load_by_layer"]) == 4
        assert all(sum(load) == pytest.approx(2) for load in entry["load_by_layer"].values())


@pytest.mark.long
@pytest.mark.parametrize("residual", ["path", "fold"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(residual, tmp_path):
    rows = batch("llama", rows=16)
    data = [{key: value[i] for key, value in rows.items()} for i in range(16)]

    def train(folder, stop_after, resume=False):
        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step >= stop_after

        model = goat_llama(residual=residual, seed=1)
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                str(folder),
                max_steps=4,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                save_steps=2,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=data,
            callbacks=[Stop(), GoatCallback()],
        )
        trainer.train(resume_from_checkpoint=resume)
        return get_peft_model_state_dict(model)

    torch.manual_seed(0)
    unbroken = train(tmp_path / "unbroken", stop_after=4)
    torch.manual_seed(0)
    train(tmp_path / "broken", stop_after=2)
    torch.manual_seed(1)  # other routers are drawn; the checkpoint's replace them
    resumed = train(tmp_path / "broken", stop_after=4, resume=True)
    assert all(torch.equal(resumed[key], value) for key, value in unbroken.items())


@pytest.mark.long
def test_training_imports_without_transformers_and_peft():
    code = (
        "import sys, goat_kernels.training as t; t.attach_balance_scale; "
        "print([m for m in ('transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
