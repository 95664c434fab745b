"""``goat-kernels finetune`` where a method diverges: it is reported, the others go on, the files stay JSON."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from test_cli_finetune import TINY, finetune, tiny_demo

from goat_kernels.files import write_json
from goat_kernels.finetuning import models, pretraining
from goat_kernels.finetuning.results import draw_losses, format_table
from goat_kernels.finetuning.tasks import Task, evaluate

__all__ = ["tiny_demo"]  # fixture

#: Two methods of which the second diverges; without warm-up, which would begin with a step of rate 0.
DIVERGING = ["--methods", "head,lora", "--learning-rate", "lora=1e30", "--warmup", "0"]


def strict_json(path: Path) -> dict:
    def refuse(token: str):
        raise AssertionError(f"{path} has {token}, which is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_diverging_method_is_stopped_and_reported_and_the_others_go_on(tiny_demo, capsys):
    assert finetune(*DIVERGING, "--max-steps", "20") == 1
    printed = capsys.readouterr().out
    output = tiny_demo / "goat-output"
    head, lora = strict_json(output / "results.json")["methods"]
    step = lora["diverged_at_step"]
    assert step in (2, 3) and lora["steps"] == step  # the first update is the one that breaks it
    assert lora["losses"][-1] is None and lora["loss_steps"][-1] == step
    assert all(math.isfinite(loss) for loss in lora["losses"][:-1])
    assert (lora["held_out"], lora["saved_in"], lora["reload_bit_equal"]) == (None, None, None)
    assert strict_json(output / "lora" / "result.json") == lora
    assert head["diverged_at_step"] is None and head["held_out"] > 0 and head["reload_bit_equal"]
    row = next(line for line in printed.splitlines() if line.startswith("PEFT's LoRA"))
    assert f"diverged at step {step}" in row and "%" not in row
    assert f"lora: diverged at step {step}" in printed and "head/model loads back" in printed
    assert (output / "results.png").is_file() and not (output / "lora" / "adapter").exists()


@pytest.mark.long
def test_a_resumed_run_reads_back_what_diverged(tiny_demo, capsys):
    options = [*DIVERGING, "--max-steps", "6"]
    assert finetune(*options) == 1
    output = tiny_demo / "goat-output"
    first = strict_json(output / "results.json")["methods"]
    (output / "results.json").unlink()
    capsys.readouterr()
    assert finetune(*options, "--resume") == 1
    printed = capsys.readouterr().out
    assert "lora: done before" in printed and f"lora: diverged at step {first[1]['diverged_at_step']}" in printed
    assert strict_json(output / "results.json")["methods"] == first


@pytest.mark.long
def test_weights_that_the_last_step_breaks_are_a_divergence_too(tiny_demo):
    assert finetune("--methods", "full", "--learning-rate", "1e39", "--warmup", "0", "--max-steps", "1") == 1
    (row,) = strict_json(tiny_demo / "goat-output" / "results.json")["methods"]
    assert math.isfinite(row["losses"][0]) and row["diverged_at_step"] == 1
    assert not (tiny_demo / "goat-output" / "full" / "model").exists()


@pytest.mark.long
def test_the_checkpoint_before_the_divergence_stays(tiny_demo, capsys):
    assert finetune("--methods", "lora", "--learning-rate", "lora=1e30", "--save-steps", "1", "--max-steps", "20") == 1
    (row,) = strict_json(tiny_demo / "goat-output" / "results.json")["methods"]
    (checkpoint,) = (tiny_demo / "goat-output" / "lora" / "checkpoints").glob("checkpoint-*")
    assert int(checkpoint.name.rpartition("-")[2]) == row["diverged_at_step"] - 1
    assert load_file(checkpoint / "adapter_model.safetensors")
    assert checkpoint.name in capsys.readouterr().out


@pytest.mark.long
def test_no_checkpoint_has_weights_that_are_not_finite(tiny_demo):
    options = ["--methods", "full", "--learning-rate", "1e39", "--warmup", "0", "--save-steps", "1", "--max-steps", "5"]
    assert finetune(*options) == 1
    (row,) = strict_json(tiny_demo / "goat-output" / "results.json")["methods"]
    assert row["diverged_at_step"] == row["steps"] == 1
    assert not list((tiny_demo / "goat-output").rglob("checkpoint-*"))


def test_a_pretraining_that_diverges_is_not_cached(tiny_demo, monkeypatch, capsys):
    monkeypatch.setattr(pretraining, "PRETRAINING", pretraining.Pretraining(**{**vars(TINY), "learning_rate": 1e39}))
    assert finetune("--methods", "head") == 2
    assert "the pretraining of digits-vit diverged at step" in capsys.readouterr().err
    assert not list((tiny_demo / "cache").iterdir())


@pytest.mark.long
def test_outputs_that_are_nan_before_and_after_are_bit_equal(tiny_demo, monkeypatch):
    real = models.outputs

    def with_nan(*args):
        found = real(*args)
        found[0] = math.nan
        return found

    monkeypatch.setattr(models, "outputs", with_nan)
    assert finetune("--methods", "head") == 0
    assert strict_json(tiny_demo / "goat-output" / "results.json")["methods"][0]["reload_bit_equal"] is True


class Fixed(torch.nn.Module):
    """A model with the same logits for each example."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self._logits = logits

    def forward(self, input_ids):
        return SimpleNamespace(logits=self._logits.expand(len(input_ids), *self._logits.shape))


def evaluated(logits: torch.Tensor, labels: torch.Tensor, metric: str):
    data = [{"input_ids": torch.zeros(labels.shape or 1), "labels": labels} for _ in range(4)]
    collate = torch.utils.data.default_collate
    task = Task("fixed", data, data, collate, None, metric)
    return evaluate(Fixed(logits), task, 2, torch.device("cpu"), "fixed")


def test_an_output_that_is_nan_is_no_right_answer():
    # argmax of a row with NaN is the NaN's place, here that of the right class
    assert evaluated(torch.tensor([math.nan, 1.0, 0.0]), torch.tensor(0), "accuracy")["held_out"] == 0
    assert evaluated(torch.tensor([2.0, 1.0, 0.0]), torch.tensor(0), "accuracy")["held_out"] == 1


def test_a_perplexity_beyond_all_numbers_is_infinite():
    logits = torch.tensor([[0.0, 5000.0]]).repeat(3, 1)
    assert evaluated(logits, torch.tensor([0, 0, 0]), "perplexity")["held_out"] == math.inf


def result(**changes) -> dict:
    values = {
        "method": "goat",
        "learning_rate": 1e-3,
        "trainable_parameters": 10,
        "saved_in": "goat/adapter",
        "reload_bit_equal": True,
        "steps": 3,
        "loss_steps": [1, 2, 3],
        "losses": [1.0, 2.0, math.nan],
        "time_per_step_ms": math.nan,
        "peak_memory_mib": 1.0,
        "peak_memory_source": "memory",
        "metric": "perplexity",
        "held_out": math.inf,
        "held_out_standard_error": math.nan,
        "held_out_examples": 5,
        "load_by_layer": {},
        "diverged_at_step": None,
    }
    return {**values, **changes}


def test_what_is_not_finite_becomes_null_and_can_be_shown(tmp_path):
    write_json(tmp_path / "result.json", result())
    written = strict_json(tmp_path / "result.json")
    assert (written["losses"], written["held_out"], written["time_per_step_ms"]) == ([1.0, 2.0, None], None, None)
    assert "not finite" in format_table([written], "title")
    axes = Figure().subplots()
    draw_losses(axes, [written])
    assert [math.isnan(loss) for loss in axes.lines[1].get_ydata()] == [False, False, True]


def test_a_table_of_methods_that_all_diverged_has_no_note_on_errors():
    table = format_table([result(held_out=None, diverged_at_step=17, held_out_examples=0)], "title")
    assert "diverged at step 17" in table and "standard error" not in table


def test_the_figure_names_the_step(tmp_path):
    axes = Figure().subplots()
    draw_losses(axes, [result(diverged_at_step=17), result(method="lora")])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["GOAT (diverged at step 17)", "PEFT's LoRA"]


@pytest.mark.parametrize("content", [{"a": (math.nan, {"b": -math.inf})}, [math.inf]])
def test_write_json_never_writes_what_is_not_json(content, tmp_path):
    write_json(tmp_path / "file.json", content)
    assert "null" in (tmp_path / "file.json").read_text()
    strict_json(tmp_path / "file.json")
