"""``goat-kernels finetune`` without a model of one's own: the demonstration, its output folder, cache and resuming."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from goat_kernels.cli import main
from goat_kernels.finetuning import models, pretraining
from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.options import TASKS
from goat_kernels.finetuning.pretraining import CACHE_VARIABLE

DEFAULT_METHODS = TASKS["digits"]["methods"].split(",")

#: Small enough for a test, large enough for every part to have something to do.
TINY = pretraining.Pretraining(hidden_size=32, layers=1, heads=2, patch_size=4, steps=3)
QUICK = ["--max-steps", "4", "--batch-size", "8", "--rank", "8", "--experts", "4"]


@pytest.fixture
def tiny_demo(monkeypatch, tmp_path):
    """A tiny model and a cache of its own; the test runs in an empty folder."""
    monkeypatch.setattr(pretraining, "PRETRAINING", TINY)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finetune(*arguments: str) -> int:
    return main(["finetune", *QUICK, *arguments])


def weights(output: Path, method: str) -> dict[str, torch.Tensor]:
    name = "adapter/adapter_model" if method in ("lora", "goat") else "model/model"
    return load_file(output / method / f"{name}.safetensors")


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() and first
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


class InterruptAt(TrainerCallback):
    """Sends this process the signal of Ctrl-C in the middle of one step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def interrupt_training(monkeypatch, description: str, step: int) -> None:
    """Send this process a real SIGINT while the run called ``description`` is in ``step``."""
    from goat_kernels.finetuning import run

    train = run.train

    def interrupted(*args, **kwargs):
        if kwargs["description"] == description:
            kwargs["callbacks"] = [*kwargs["callbacks"], InterruptAt(step)]
        return train(*args, **kwargs)

    monkeypatch.setattr(run, "train", interrupted)


def test_demo_leaves_table_figure_numbers_and_models(tiny_demo, capsys):
    assert finetune() == 0

    output = tiny_demo / "goat-output"
    printed = capsys.readouterr().out
    for method in DEFAULT_METHODS:
        assert METHODS[method].meaning in printed
        assert "loads back with bit-equal outputs: True\n" in printed.split(f"\n{method}: ", 1)[1]
    assert "±" in printed and "one standard error over the 898 held-out examples" in printed
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in results["methods"]}
    assert list(rows) == DEFAULT_METHODS
    for row in rows.values():
        p = row["held_out"]
        assert row["held_out_standard_error"] == pytest.approx((p * (1 - p) / 898) ** 0.5)
        assert row["steps"] == 4 and row["loss_steps"] == [1, 2, 3, 4] and len(row["losses"]) == 4
        assert row["time_per_step_ms"] > 0 and row["peak_memory_mib"] >= 0
    assert rows["head"]["trainable_parameters"] == 32 * 10 + 10
    # LoRA and GOAT have the same rank on the same layers; GOAT has the routers [E, N] more.
    extra = rows["goat"]["trainable_parameters"] - rows["lora"]["trainable_parameters"]
    assert extra == 4 * (5 * 32 + 128)  # q, k, v, o and fc1 have 32 inputs, fc2 has 128
    load = rows["goat"]["load_by_layer"]
    assert len(load) == 6 and all(sum(shares) == pytest.approx(2, abs=1e-4) for shares in load.values())
    assert rows["lora"]["load_by_layer"] == {}
    assert not list(output.rglob("checkpoint*")) and not list(output.rglob("*.tmp"))


@pytest.mark.long
def test_the_head_alone_moves_nothing_else(tiny_demo):
    assert finetune("--methods", "head") == 0
    trained = weights(tiny_demo / "goat-output", "head")
    (cached,) = (tiny_demo / "cache").glob("digits-vit-*")
    before = load_file(cached / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], trained[name])} == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.long
def test_second_run_takes_the_pretrained_model_from_the_cache(tiny_demo, capsys, monkeypatch):
    assert finetune("--methods", "lora", "--output", "first") == 0
    assert "(new)" in capsys.readouterr().out

    monkeypatch.setattr(pretraining, "train", lambda *args, **kwargs: pytest.fail("pretrained again"))
    assert finetune("--methods", "lora", "--output", "second") == 0
    assert "(cached)" in capsys.readouterr().out
    # The same seed, and so the same adapter: the run is deterministic from the cached model on.
    assert_same_weights(weights(tiny_demo / "first", "lora"), weights(tiny_demo / "second", "lora"))


@pytest.mark.long
def test_another_pretraining_has_another_place_in_the_cache(tiny_demo, monkeypatch):
    assert finetune("--methods", "head", "--output", "first") == 0
    monkeypatch.setattr(pretraining, "PRETRAINING", pretraining.Pretraining(**{**vars(TINY), "steps": 2}))
    assert finetune("--methods", "head", "--output", "second") == 0
    assert len(list((tiny_demo / "cache").iterdir())) == 2


def test_interrupted_pretraining_leaves_no_cache_entry(tiny_demo, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "train", interrupted)
    assert finetune() == 130
    assert not list((tiny_demo / "cache").iterdir())
    assert not (tiny_demo / "goat-output").exists()


@pytest.mark.long
@pytest.mark.parametrize("method", ["full", "goat"])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(tiny_demo, capsys, monkeypatch, method):
    # Dropout makes the random state matter; 5 batches of 200 cross an epoch (899 images) at step 5.
    options = ["--methods", f"head,{method}", "--max-steps", "8", "--batch-size", "200", "--dropout", "0.2"]
    assert finetune(*options, "--output", "whole") == 0

    with monkeypatch.context() as patch:
        interrupt_training(patch, f"{method}: training", step=7)
        assert finetune(*options, "--output", "parts") == 130
    assert f"{method} stopped after step 7" in capsys.readouterr().err
    assert (tiny_demo / "parts" / method / "checkpoints" / "checkpoint-7").is_dir()
    assert not (tiny_demo / "parts" / "results.json").exists()

    head_written = (tiny_demo / "parts" / "head" / "result.json").stat().st_mtime_ns
    assert finetune(*options, "--output", "parts", "--resume") == 0
    assert "head: done before" in capsys.readouterr().out
    assert (tiny_demo / "parts" / "head" / "result.json").stat().st_mtime_ns == head_written
    assert_same_weights(weights(tiny_demo / "whole", method), weights(tiny_demo / "parts", method))
    whole, parts = (
        json.loads((tiny_demo / name / method / "result.json").read_text(encoding="utf-8"))
        for name in ("whole", "parts")
    )
    for field in ("losses", "loss_steps", "held_out", "steps"):
        assert whole[field] == parts[field]


@pytest.mark.long
def test_interrupt_while_evaluating_keeps_the_training(tiny_demo, monkeypatch):
    from goat_kernels.finetuning import run

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", interrupted)
        assert finetune("--methods", "goat") == 130
    before = weights(tiny_demo / "goat-output", "goat")

    monkeypatch.setattr(run, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert finetune("--methods", "goat", "--resume") == 0
    assert_same_weights(before, weights(tiny_demo / "goat-output", "goat"))


def test_half_written_checkpoint_is_not_resumed_from(tmp_path):
    from goat_kernels.finetuning.train import last_checkpoint

    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"global_st')
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.long
def test_existing_results_are_kept_unless_overwriting_is_asked_for(tiny_demo, capsys):
    assert finetune("--methods", "head") == 0
    results = tiny_demo / "goat-output" / "results.json"
    before = results.read_bytes()

    assert finetune("--methods", "lora") == 2
    message = capsys.readouterr().err
    assert "--output 'goat-output' has results already" in message
    assert "--overwrite" in message and "--resume" in message
    assert results.read_bytes() == before

    assert finetune("--methods", "lora", "--overwrite") == 0
    assert json.loads(results.read_text(encoding="utf-8"))["methods"][0]["method"] == "lora"
    assert not (tiny_demo / "goat-output" / "head").exists()


def test_overwrite_never_removes_a_foreign_folder(tiny_demo, capsys):
    (tiny_demo / "photos").mkdir()
    (tiny_demo / "photos" / "cat.txt").write_text("meow", encoding="utf-8")
    assert finetune("--output", "photos", "--overwrite") == 2
    assert "--output 'photos' exists and was not made by this command" in capsys.readouterr().err
    assert (tiny_demo / "photos" / "cat.txt").read_text(encoding="utf-8") == "meow"


@pytest.mark.long
def test_resume_refuses_other_options(tiny_demo, capsys):
    assert finetune("--methods", "head") == 0
    assert finetune("--methods", "head", "--seed", "3", "--resume") == 2
    assert "--seed is 3, but the run in 'goat-output' was started with 0" in capsys.readouterr().err


def test_resume_needs_a_run(tiny_demo, capsys):
    assert finetune("--resume") == 2
    assert "--resume: --output 'goat-output' holds no run" in capsys.readouterr().err


@pytest.mark.long
def test_a_reload_that_differs_is_reported(tiny_demo, capsys, monkeypatch):
    real = models.load_back

    def damaged(method, *args):
        model = real(method, *args)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if name.endswith("classifier.bias")).add_(1e-3)
        return model

    monkeypatch.setattr(models, "load_back", damaged)
    assert finetune("--methods", "full") == 1
    assert "bit-equal outputs: False" in capsys.readouterr().out


SIGINT_SCRIPT = textwrap.dedent(
    """
    import socket
    import sys

    def refuse(*arguments):
        print("NETWORK", arguments, file=sys.stderr, flush=True)
        raise OSError("no network in this test")

    socket.getaddrinfo = socket.socket.connect = refuse

    from goat_kernels.cli import main
    from goat_kernels.finetuning import pretraining

    pretraining.PRETRAINING = pretraining.Pretraining(hidden_size=32, layers=1, heads=2, patch_size=4, steps=3)
    sys.exit(main(sys.argv[1:]))
    """
)


@pytest.mark.long
def test_sigint_to_the_process_leaves_a_checkpoint(tmp_path):
    """What a terminal does on Ctrl-C, from outside, at a moment nobody chose; the network is asked nothing."""
    environment = {**os.environ, CACHE_VARIABLE: str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SIGINT_SCRIPT, "finetune", "--methods", "goat", "--output", str(tmp_path / "out")]
    command += ["--rank", "8", "--experts", "4", "--batch-size", "4", "--max-steps", "100000"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    seen = ""
    for character in iter(lambda: process.stderr.read(1), ""):
        seen += character
        if "goat: training" in seen and "loss" in seen.rpartition("goat: training")[2]:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, seen + rest
    assert "--resume" in rest
    (checkpoint,) = (tmp_path / "out" / "goat" / "checkpoints").glob("checkpoint-*")
    assert (checkpoint / "trainer_state.json").is_file()
    assert "Traceback" not in rest
    assert "NETWORK" not in seen + rest
