"""The flow of ``goat-kernels finetune``: prepare, then each method in turn, then the report.

A method is done in two stages, each of which leaves a file when it is complete, so that an interrupted run goes on
with the stage it was in:

    train     build, train, save, load back and compare      -> trained.json beside the saved model
    evaluate  load the saved model, measure it on held-out data    -> result.json
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from torch import nn

from goat_kernels.cli.figure import write_figure
from goat_kernels.cli.output import OutputFolder
from goat_kernels.cli.report import MethodResult, format_table, results_json
from goat_kernels.command_errors import CommandError, Interrupted
from goat_kernels.files import write_json
from goat_kernels.finetuning.evaluate import Evaluation, evaluate
from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.models import (
    build,
    check_adapters,
    load_back,
    options_named,
    outputs,
    save,
    trainable_parameters,
    training_device,
)
from goat_kernels.finetuning.options import FinetuneOptions
from goat_kernels.finetuning.tasks import Task, load_task
from goat_kernels.finetuning.train import StopSignal, last_checkpoint, steps_of, train
from goat_kernels.peft.files import written_whole
from goat_kernels.training import GoatCallback

#: What the two stages leave in a method's folder.
TRAINED_FILE, RESULT_FILE = "trained.json", "result.json"


def compare(options: FinetuneOptions) -> list[MethodResult]:
    """Run every method of ``options`` and write the report; returns the rows of the table.

    Raises:
        CommandError: the model, the data, the adapters or the output folder do not work out, and nothing was trained;
            or a file could not be written, and what is complete is in the output folder.
        Interrupted: Ctrl-C after the output folder was begun; a method's checkpoint is there where one was training.
    """
    folder = OutputFolder(options)
    folder.check()
    if options.training.threads is not None:
        torch.set_num_threads(options.training.threads)
    task = load_task(options)
    check_adapters(task.base, options)
    folder.claim()
    with _can_be_resumed(options):
        return _run(task, options, folder)


def _run(task: Task, options: FinetuneOptions, folder: OutputFolder) -> list[MethodResult]:
    print(task.description)
    print(f"{steps_of(len(task.train), options.training)} steps of {options.training.batch_size} examples per method\n")
    if options.task == "digits" and not all((folder.method(name) / TRAINED_FILE).is_file() for name in options.methods):
        _warm_up(task, options)
    results = [_run_method(method, task, options, folder.method(method)) for method in options.methods]
    write_json(folder.root / "results.json", results_json(task.description, options, results))
    write_figure(folder.root / "results.png", results, task.description)
    print(f"\n{format_table(results, task.description)}\n")
    for result in results:
        print(_outcome(result, folder))
    print(f"written to {folder.root}: results.json, results.png")
    return results


def _outcome(result: MethodResult, folder: OutputFolder) -> str:
    """One line about the saved model, or why there is none."""
    if result.diverged_at_step is None:
        return f"{result.method}: {result.saved_in} loads back with bit-equal outputs: {result.reload_bit_equal}"
    checkpoint = last_checkpoint(folder.method(result.method) / "checkpoints")
    return (
        f"{result.method}: diverged at step {result.diverged_at_step} (its loss or its weights are NaN or infinite) "
        "and is not saved; a lower --learning-rate may help"
        + (f". The last checkpoint is {checkpoint}" if checkpoint is not None else "")
    )


@contextlib.contextmanager
def _can_be_resumed(options: FinetuneOptions) -> Iterator[None]:
    """Say how to go on where Ctrl-C, or a disk that takes no more, ends a run whose folder has been begun."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(_how_to_go_on(options)) from None
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save has no exception of its own for a write that fails
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise CommandError(f"a file could not be read or written ({reason:.200}). {_how_to_go_on(options)}") from error


def _warm_up(task: Task, options: FinetuneOptions) -> None:
    """One step that is not measured: the first one loads libraries, which cost more memory than the digits' model does.

    Not for a model of the user's own, where the libraries weigh little and a step may take long.
    """
    with TemporaryDirectory() as scratch:
        once = replace(options.training, max_steps=1)
        train(task.base.load, task.train, task.collate, once, 0.0, Path(scratch), description="warming up")


def _run_method(method: str, task: Task, options: FinetuneOptions, folder: Path) -> MethodResult:
    result_file, trained_file = folder / RESULT_FILE, folder / TRAINED_FILE
    if result_file.is_file():
        print(f"{method}: done before")
        return MethodResult.read(result_file)
    saved = folder / ("model" if METHODS[method].config is None else "adapter")
    model = None
    if not trained_file.is_file():
        model = _train_method(method, task, options, folder, saved, trained_file)
    trained = json.loads(trained_file.read_text(encoding="utf-8"))
    diverged = trained.get("diverged_at_step") is not None
    if diverged:
        evaluation = Evaluation(math.nan, None, 0, {})
    else:
        device = training_device(options.training)
        if model is None:
            model = load_back(method, task.base, saved, device)
        evaluation = evaluate(model, task, options.training.batch_size, device, f"{method}: evaluating")
    measured = {
        "metric": task.metric,
        "held_out": evaluation.value,
        "held_out_standard_error": evaluation.standard_error,
        "held_out_examples": evaluation.examples,
        "load_by_layer": evaluation.load_by_layer,
    }
    write_json(result_file, {**trained, **measured})
    if not diverged:  # otherwise the last checkpoint is all there is
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return MethodResult.read(result_file)


def _train_method(
    method: str, task: Task, options: FinetuneOptions, folder: Path, saved: Path, trained_file: Path
) -> nn.Module | None:
    """Train, save to ``saved`` and write ``trained_file``; returns the model as loaded back from there.

    A model that diverged is not saved: nobody is to take it for a trained one. Returns None for it.
    """
    learning_rate = options.training.learning_rates[method]

    def build_method() -> nn.Module:
        with options_named():
            return build(method, task.base, options.adapter, options.training.seed)

    with StopSignal() as stop:
        model, record = train(
            build_method,
            task.train,
            task.collate,
            options.training,
            learning_rate,
            folder / "checkpoints",
            description=f"{method}: training",
            stop=stop,
            callbacks=[GoatCallback()] if METHODS[method].rates_of == "goat" else [],
        )
        diverged = record.diverged_at_step is not None
        if not record.finished and not diverged:
            raise Interrupted(
                f"{method} stopped after step {record.steps}; a checkpoint is written. {_how_to_go_on(options)}"
            )
        count = trainable_parameters(model)
        reloaded, bit_equal = None, None
        if not diverged:
            with written_whole(saved) as temporary:  # what a user put beside an earlier run's files stays
                save(model, temporary)
            reloaded, bit_equal = _load_back_and_compare(method, model, task, options, saved)
        trained = {
            "method": method,
            "learning_rate": learning_rate,
            "trainable_parameters": count,
            "saved_in": None if diverged else f"{folder.name}/{saved.name}",
            "reload_bit_equal": bit_equal,
            **{name: value for name, value in asdict(record).items() if name != "finished"},
        }
        write_json(trained_file, trained)
        if stop.requested:
            done = f"diverged at step {record.diverged_at_step}" if diverged else "is trained and saved"
            raise Interrupted(f"{method} {done}. {_how_to_go_on(options)}")
    return reloaded


def _load_back_and_compare(
    method: str, model: nn.Module, task: Task, options: FinetuneOptions, saved: Path
) -> tuple[nn.Module, bool]:
    """The saved model on a freshly loaded base, and whether its outputs are those of ``model``, bit for bit."""
    device = training_device(options.training)
    count = min(options.training.batch_size, len(task.held_out))
    batch = task.collate([task.held_out[i] for i in range(count)])
    batch.pop("labels")
    expected = outputs(model, batch, device)
    reloaded = load_back(method, task.base, saved, device)
    # As torch.equal, to which NaN is not the NaN it was saved as.
    found = outputs(reloaded, batch, device)
    return reloaded, torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def _how_to_go_on(options: FinetuneOptions) -> str:
    return f"Go on with the same command and --resume (results so far: {options.output})"
