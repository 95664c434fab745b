"""What people see of the routers: the callback's log entries where the Trainer logs, and the report."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import get_peft_model
from peft_tiny_models import batch, tiny_llama
from torch import nn
from transformers.integrations import integration_utils
from transformers.trainer_callback import PrinterCallback

from goat_kernels import GoatLinear
from goat_kernels.peft import GoatConfig
from goat_kernels.training import GoatCallback, RouterStatistics, router_report, router_statistics

LAYER = "base_model.model.model.layers.1.self_attn.v_proj"


def goat_llama(**changes):
    return get_peft_model(tiny_llama(), GoatConfig(r=8, num_experts=4, target_modules=["q_proj", "v_proj"], **changes))


def trainer(folder, *callbacks, late=(), **changes):
    rows = batch("llama", rows=8)
    values = {"max_steps": 2, "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    found = transformers.Trainer(
        goat_llama(),
        transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=2, use_cpu=True, **{**values, **changes}
        ),
        train_dataset=[{key: value[i] for key, value in rows.items()} for i in range(8)],
        callbacks=list(callbacks),
    )
    for callback in late:
        found.add_callback(callback)
    return found


class Recorder(transformers.TrainerCallback):
    """Keeps what a callback that sends logs somewhere gets to see, and how often it was called."""

    def __init__(self) -> None:
        self.logs, self.begun, self.ended = [], 0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun += 1

    def on_train_end(self, args, state, control, **kwargs):
        self.ended += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class OtherRecorder(Recorder):
    pass


def with_layers(entries) -> list[dict]:
    return [entry for entry in entries if f"goat/{LAYER}/load_entropy" in entry]


# --- GoatCallback -------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("added", ["with the others", "after the console's", "before the others"])
def test_every_callback_reads_the_entries(added, tmp_path):
    first, second, callback = Recorder(), OtherRecorder(), GoatCallback()
    if added == "with the others":
        made = trainer(tmp_path, first, callback, second)
    elif added == "before the others":
        made = trainer(tmp_path, callback, late=(first, second))
    else:
        made = trainer(tmp_path, first, late=(callback, second))
    made.train()
    made.train()  # orders its callbacks again
    assert (first.begun, first.ended, second.begun, second.ended) == (2, 2, 2, 2)
    names = [type(c).__name__ for c in made.callback_handler.callbacks]
    assert names == [
        "GoatCallback",
        "DefaultFlowCallback",
        "Recorder",
        "OtherRecorder",
        "_ShortConsole",
        "PrinterCallback",
    ]
    for seen in (first.logs, second.logs, made.state.log_history):
        assert len(with_layers(seen)) in (2, 4)  # the history starts anew with each run
        for entry in with_layers(seen):
            load = [entry[f"goat/{LAYER}/load_{expert}"] for expert in range(4)]
            assert sum(load) == pytest.approx(2)
            shares = [share / 2 for share in load if share]
            assert entry[f"goat/{LAYER}/load_entropy"] == pytest.approx(-sum(p * math.log(p, 4) for p in shares))
            assert entry[f"goat/{LAYER}/balance_loss"] > 0
            assert sum(name.startswith("goat/") for name in entry) == 4 + 4 * (4 + 2)
    json.dumps(made.state.log_history)


def test_the_entries_are_those_of_the_layers(tmp_path):
    callback = GoatCallback()
    made = trainer(tmp_path, callback, max_steps=1)
    made.train()
    statistics, (entry,) = router_statistics(made.model), with_layers(made.state.log_history)
    assert len({layer.balance_loss for layer in statistics.values()}) == 4
    for name, layer in statistics.items():
        module = made.model.get_submodule(name)
        assert (layer.balance_loss, layer.load) == (module.balance_loss.item(), tuple(module.expert_load.tolist()))
        assert entry[f"goat/{name}/balance_loss"] == layer.balance_loss
        assert callback.history[0]["load_by_layer"][name] == layer.load
        assert callback.history[0]["balance_loss_by_layer"][name] == layer.balance_loss
        assert callback.history[0]["load_entropy_by_layer"][name] == layer.load_entropy
    entropies = [layer.load_entropy for layer in statistics.values()]
    assert entry["goat/load_entropy"] == pytest.approx(sum(entropies) / 4)


def test_reaches_report_to(tmp_path, monkeypatch):
    """TensorBoard's and wandb's callbacks of transformers, with their clients replaced."""
    scalars, rows = {}, []

    class Writer:
        def add_scalar(self, name, value, step):
            scalars[name] = value

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    class TensorBoard(integration_utils.TensorBoardCallback):
        def __init__(self):
            self.tb_writer = Writer()

        def on_train_begin(self, *args, **kwargs):
            pass

    class Wandb(integration_utils.WandbCallback):
        def __init__(self):
            self._wandb = SimpleNamespace(log=rows.append, run=SimpleNamespace(summary={}))
            self._initialized, self._log_model = True, integration_utils.WandbLogModel.FALSE

        def on_train_begin(self, *args, **kwargs):
            pass

        on_train_end = on_train_begin

    reporters = {"tensorboard": TensorBoard(), "wandb": Wandb()}
    monkeypatch.setattr(
        transformers.trainer, "get_reporting_integration_callbacks", lambda names: [reporters[name] for name in names]
    )
    trainer(tmp_path, GoatCallback(), report_to=["tensorboard", "wandb"]).train()
    assert f"train/goat/{LAYER}/load_3" in scalars
    assert 0 < scalars["train/goat/load_entropy"] <= 1
    assert any(f"train/goat/{LAYER}/load_3" in row for row in rows)


def test_the_console_is_spared_the_layers(tmp_path, capsys):
    trainer(tmp_path, GoatCallback()).train()
    printed = capsys.readouterr().out
    assert "goat/balance_loss" in printed and "goat/load_entropy" in printed
    assert LAYER not in printed


def test_without_layers(tmp_path):
    made = trainer(tmp_path, GoatCallback(per_layer=False))
    made.train()
    assert not with_layers(made.state.log_history)
    assert "goat/load_entropy" in made.state.log_history[0]
    with pytest.raises(TypeError, match="per_layer must be True or False, got 'no'"):
        GoatCallback(per_layer="no")


def test_a_callback_outside_a_trainer_does_no_harm():
    """Other trainers call callbacks in their own ways; there is then no list to order."""
    model, callback = goat_llama(), GoatCallback()
    arguments = SimpleNamespace(gradient_accumulation_steps=2)
    callback.on_train_begin(arguments, SimpleNamespace(), None, model=model)
    model(**batch("llama"))
    logs = {"loss": 1.0}
    callback.on_log(arguments, SimpleNamespace(global_step=3, log_history=[]), None, logs=logs, model=model)
    assert callback.history[0]["step"] == 3 and "goat/balance_loss" in logs
    assert PrinterCallback().on_log(None, SimpleNamespace(is_local_process_zero=False), None, logs=logs) is None


# --- statistics and report ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "entropy", "relative"),
    [
        ((0.5, 0.5, 0.5, 0.5), 1.0, (1.0, 1.0, 1.0, 1.0)),
        ((1.0, 1.0, 0.0, 0.0), 0.5, (2.0, 2.0, 0.0, 0.0)),
        ((1.0, 0.0, 0.0, 0.0), 0.0, (4.0, 0.0, 0.0, 0.0)),
        ((1.0,), 1.0, (1.0,)),
        ((0.0, 0.0), 0.0, (0.0, 0.0)),
    ],
)
def test_entropy(load, entropy, relative):
    layer = RouterStatistics(balance_loss=2.0, load=load)
    assert layer.load_entropy == pytest.approx(entropy)
    assert layer.relative_load == pytest.approx(relative)


def test_a_report_of_a_peft_model(tmp_path):
    model = goat_llama()
    model(**batch("llama"))
    report = router_report(model, heatmap=tmp_path / "load.png")
    assert report.layers == router_statistics(model)
    lines = str(report).splitlines()
    assert len(lines) == 2 + 4
    assert lines[0].split()[:3] == ["layer", "balance", "loss"]
    assert [line.split()[0] for line in lines[2:]] == [
        f"{i}.self_attn.{n}" for i in range(2) for n in ("q_proj", "v_proj")
    ]
    layer = report.layers[LAYER]
    assert f"{layer.balance_loss:.4f}" in lines[-1] and f"{layer.load_entropy:.4f}" in lines[-1]
    assert lines[-1].split()[-4:] == [f"{100 * share:.1f}" for share in layer.load]
    most = max(range(4), key=lambda i: layer.load[i])
    assert f"{most}: {2 * layer.load[most]:.2f}x" in lines[-1]
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [tmp_path / "load.png"]


def test_a_report_of_layers_placed_by_hand(tmp_path):
    model = nn.Sequential(
        GoatLinear(16, 24, r=4, num_experts=2, top_k=1),
        nn.ReLU(),
        GoatLinear(24, 20, r=20, num_experts=20),
        GoatLinear(20, 16, r=4, num_experts=2),
    )
    model[0](torch.randn(5, 16))
    lines = router_report(model).table.splitlines()
    assert lines[2].split()[0] == "0"
    assert lines[-1] == "2 routed layers have not run: 2, 3"
    model(torch.randn(5, 16))
    report = router_report(model)  # 20 experts are too many for the table
    assert len(report.table.splitlines()) == 5 and "%" not in report.table
    assert report.save_heatmap(str(tmp_path / "a.png")) == tmp_path / "a.png"
    alone = GoatLinear(16, 16, r=4, num_experts=2)
    alone(torch.randn(5, 16))
    assert "(the model)" in router_report(alone).table


def test_a_report_that_cannot_be_made(tmp_path):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        router_report("model")
    with pytest.raises(
        ValueError, match=r"model \(Linear\) has no GOAT layer; it needs a GOAT adapter or a GoatLinear"
    ):
        router_report(nn.Linear(4, 4))
    model = goat_llama()
    with pytest.raises(ValueError, match=r"none of the 4 GOAT layers of model .* run a forward first"):
        router_report(model)
    with pytest.raises(FileNotFoundError, match="needs a folder that exists"):
        router_report(model, heatmap=tmp_path / "nowhere" / "load.png")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        router_report(model, heatmap=tmp_path)
