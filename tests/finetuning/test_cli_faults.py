"""``goat-kernels finetune`` interrupted in every phase, killed, without disk or permission: what --resume finds."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from fault_tools import bound_by_permissions, in_child, no_file_longer_than
from test_cli_finetune import TINY, assert_same_weights, weights
from transformers import TrainerState

from goat_kernels.cli import main
from goat_kernels.finetuning import models, pretraining, run

OPTIONS = ["--methods", "goat", "--max-steps", "6", "--batch-size", "100", "--rank", "8", "--experts", "4"]
OPTIONS += ["--dropout", "0.1", "--save-steps", "2", "--device", "cpu"]


def finetune(*arguments: str) -> int:
    return main(["finetune", *OPTIONS, *arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing happened to, and the cache that it filled."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "PRETRAINING", TINY)
        patch.setenv(pretraining.CACHE_VARIABLE, str(folder / "cache"))
        patch.chdir(folder)
        assert finetune("--output", "out") == 0
    return folder


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """An empty folder to run in, with the pretrained model in the cache; what only takes time is left out."""
    monkeypatch.setattr(pretraining, "PRETRAINING", TINY)
    monkeypatch.setattr(run, "_warm_up", lambda task, options: None)
    monkeypatch.setattr(run, "write_figure", lambda path, results, title: path.write_bytes(b"figure"))
    monkeypatch.setenv(pretraining.CACHE_VARIABLE, str(whole / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def goes_on_to_the_same_end(whole: Path) -> None:
    """Run again, resuming where a run was begun: weights, losses and accuracy are those of the uninterrupted run."""
    begun = (Path("out") / "run.json").is_file()
    assert finetune("--output", "out", *["--resume"] * begun) == 0
    assert_same_weights(weights(whole / "out", "goat"), weights(Path("out"), "goat"))
    first, second = (json.loads((root / "out/goat/result.json").read_text()) for root in (whole, Path()))
    for field in ("steps", "losses", "loss_steps", "held_out", "load_by_layer"):
        assert first[field] == second[field], field
    assert (Path("out") / "results.png").is_file()
    assert not list(Path("out").rglob(".*")), "nothing half written stays"


@pytest.fixture(autouse=True)
def _ctrl_c_arrives():
    """Also where the tests are a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


#: Phase -> (module, its function that begins the phase).
PHASES = {
    "start-up": (run, "load_task"),
    "pretraining": (pretraining, "train"),
    "checking": (models, "check_adapters"),
    "warming-up": (run, "_warm_up"),
    "building": (models, "build"),
    "saving": (models, "save"),
    "loading-back": (models, "load_back"),
    "evaluating": (run, "evaluate"),
    "report": (run, "results_json"),
    "figure": (run, "write_figure"),
}
BEFORE_THE_FOLDER = ("start-up", "pretraining", "checking")


def send(monkeypatch, phase: str, number: signal.Signals, *, times: int = 1, after: bool = False) -> None:
    """Send this process a signal when ``phase`` begins, or when its function returns."""
    module, name = PHASES[phase]
    real = getattr(module, name)

    def with_signal(*args, **kwargs):
        result = real(*args, **kwargs) if after else None
        for _ in range(times):
            os.kill(os.getpid(), number)
        return result if after else real(*args, **kwargs)

    monkeypatch.setattr(module, name, with_signal)


@pytest.mark.long
@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_in_any_phase(phase, place, whole, monkeypatch, capsys):
    if phase == "pretraining":
        monkeypatch.setenv(pretraining.CACHE_VARIABLE, str(place / "cache"))
    with monkeypatch.context() as patch:
        send(patch, phase, signal.SIGINT)
        assert finetune("--output", "out") == 130
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("goat-kernels finetune: interrupted.")
    assert ("--resume" in message) == (phase not in BEFORE_THE_FOLDER)
    assert Path("out").exists() == (phase not in BEFORE_THE_FOLDER)
    goes_on_to_the_same_end(whole)


@pytest.mark.long
@pytest.mark.parametrize("phase", ["building", "saving"])
def test_ctrl_c_twice_does_not_wait(phase, place, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        send(patch, phase, signal.SIGINT, times=2)
        assert finetune("--output", "out") == 130
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert not (Path("out") / "goat" / "adapter").exists()
    goes_on_to_the_same_end(whole)


def killed_within_the_checkpoint_of(step: int):
    """Trainer's writing of a checkpoint's last file, in the middle of which the process is killed."""
    save_to_json = TrainerState.save_to_json

    def half(state: TrainerState, path: str) -> None:
        save_to_json(state, path)
        if state.global_step == step:
            Path(path).write_text(Path(path).read_text()[:50])
            os.kill(os.getpid(), signal.SIGKILL)

    return half


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("phase", ["checkpoint", "saving", "loading-back", "evaluating", "figure"])
def test_a_killed_run_goes_on_to_the_same_end(phase, place, whole, monkeypatch):
    with monkeypatch.context() as patch:
        if phase == "checkpoint":
            patch.setattr(TrainerState, "save_to_json", killed_within_the_checkpoint_of(4))
        else:
            send(patch, phase, signal.SIGKILL, after=True)
        assert os.WTERMSIG(in_child(lambda: finetune("--output", "out"))) == signal.SIGKILL
    if phase == "checkpoint":
        assert {path.name for path in Path("out/goat/checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    if phase == "saving":
        assert list(Path("out/goat").glob(".adapter*")), "it was killed with the adapter under its temporary name"
    goes_on_to_the_same_end(whole)


@pytest.mark.long
@pytest.mark.parametrize("size", [100, 5000, 60000], ids=["first-file", "adapter", "optimizer"])
def test_a_full_disk_is_one_line_and_no_loss(size, place, whole, capsys):
    with no_file_longer_than(size):
        assert finetune("--output", "out") == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "goat-kernels finetune: error: " in line]
    assert "too large" in message or "inline_container" in message
    assert ("--resume" in message) == (size > 100)
    goes_on_to_the_same_end(whole)


def test_a_folder_that_may_not_be_written(place, capsys):
    (place / "closed").mkdir(mode=0o555)
    with bound_by_permissions():
        for output in ("closed", "closed/below"):
            assert finetune("--output", output) == 2
            assert f"--output '{output}' cannot be written to (Permission denied)" in capsys.readouterr().err
    assert not list((place / "closed").iterdir())
