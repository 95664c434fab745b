"""One run: prepare, then each method in turn, then the report.

A method is done in two stages, each of which leaves a file when it is complete, so that an interrupted run goes on
with the stage it was in:

    train     build, train, save, load back and compare            -> trained.json beside the saved model
    evaluate  load the saved model, measure it on held-out data    -> result.json
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from torch import nn

from goat_kernels.command_errors import CommandError, Interrupted, one_line
from goat_kernels.files import write_json, written_whole
from goat_kernels.finetuning import models
from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.options import FinetuneOptions
from goat_kernels.finetuning.output import check_output, claim_output
from goat_kernels.finetuning.results import format_table, results_json, write_figure
from goat_kernels.finetuning.tasks import Task, evaluate, load_task
from goat_kernels.finetuning.train import last_checkpoint, steps_of, stop_signal, train
from goat_kernels.training import GoatCallback

#: What the two stages leave in a method's folder.
TRAINED_FILE, RESULT_FILE = "trained.json", "result.json"


def run(options: FinetuneOptions) -> list[dict]:
    """Run every method of ``options`` and write the report; returns the rows of the table (``results``).

    Raises:
        CommandError: input that cannot be used, before anything is trained; or a file that cannot be written.
        Interrupted: Ctrl-C after the output folder was begun.
    """
    root = Path(options.output).expanduser()
    check_output(root, options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    task = load_task(options)
    models.check_adapters(task.base, options)
    claim_output(root, options)
    try:
        return _run_methods(task, options, root)
    except KeyboardInterrupt as interrupt:
        raise Interrupted(str(interrupt) or _how_to_go_on(options)) from None
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save has no exception of its own for a write that fails
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = f"a file could not be read or written ({one_line(error)})"
        raise CommandError(f"{reason}. {_how_to_go_on(options)}") from error


def _run_methods(task: Task, options: FinetuneOptions, root: Path) -> list[dict]:
    print(task.description)
    print(f"{steps_of(len(task.train), options)} steps of {options.batch_size} examples per method\n")
    if options.task == "digits" and not all((root / name / TRAINED_FILE).is_file() for name in options.methods):
        _warm_up(task, options)
    rows = [_run_method(method, task, options, root / method) for method in options.methods]
    write_json(root / "results.json", results_json(task.description, options, rows))
    write_figure(root / "results.png", rows, task.description)
    print(f"\n{format_table(rows, task.description)}\n")
    for row in rows:
        if row["diverged_at_step"] is None:
            print(f"{row['method']}: {row['saved_in']} loads back with bit-equal outputs: {row['reload_bit_equal']}")
            continue
        checkpoint = last_checkpoint(root / row["method"] / "checkpoints")
        print(
            f"{row['method']}: diverged at step {row['diverged_at_step']} (its loss or its weights are NaN or "
            "infinite) and is not saved; a lower --learning-rate may help"
            + (f". The last checkpoint is {checkpoint}" if checkpoint else "")
        )
    print(f"written to {root}: results.json, results.png")
    return rows


def _warm_up(task: Task, options: FinetuneOptions) -> None:
    """One step that is not measured: the first one loads libraries, which cost more memory than the digits' model."""
    with TemporaryDirectory() as scratch:
        once = replace(options, max_steps=1)
        train(task.base.load, task.train, task.collate, once, 0.0, Path(scratch), description="warming up")


def _run_method(method: str, task: Task, options: FinetuneOptions, folder: Path) -> dict:
    result_file, trained_file = folder / RESULT_FILE, folder / TRAINED_FILE
    if result_file.is_file():
        print(f"{method}: done before")
        return _read_json(result_file)
    folder.mkdir(exist_ok=True)
    model = None if trained_file.is_file() else _train_method(method, task, options, folder)
    row = _read_json(trained_file)
    if row["diverged_at_step"] is not None:  # the last checkpoint is all there is, and stays
        row |= {"metric": task.metric, "held_out": None, "held_out_standard_error": None, "held_out_examples": 0}
        write_json(result_file, row | {"load_by_layer": {}})
        return _read_json(result_file)
    device = models.training_device(options)
    if model is None:
        model = models.load_back(method, task.base, folder.parent / row["saved_in"], device)
    write_json(result_file, row | evaluate(model, task, options.batch_size, device, f"{method}: evaluating"))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return _read_json(result_file)


def _train_method(method: str, task: Task, options: FinetuneOptions, folder: Path) -> nn.Module | None:
    """Train, save and write ``TRAINED_FILE``; returns the model as loaded back on a fresh base.

    A model that diverged is not saved: nobody is to take it for a trained one. Returns None for it.
    """
    saved, device = folder / ("model" if METHODS[method].config is None else "adapter"), models.training_device(options)
    with stop_signal() as stop:
        model, record = train(
            lambda: models.build(method, task.base, options),
            task.train,
            task.collate,
            options,
            options.learning_rates[method],
            folder / "checkpoints",
            description=f"{method}: training",
            stop=stop,
            callbacks=[GoatCallback()] if METHODS[method].rates_of == "goat" else [],
        )
        steps, diverged = record["steps"], record["diverged_at_step"] is not None
        if not diverged and steps < steps_of(len(task.train), options):
            raise Interrupted(f"{method} stopped after step {steps}; a checkpoint is written. {_how_to_go_on(options)}")
        reloaded, bit_equal = None, None
        if not diverged:
            with written_whole(saved) as temporary:  # what a user put beside an earlier run's files stays
                models.save(model, temporary)
            batch = task.collate([task.held_out[i] for i in range(min(options.batch_size, len(task.held_out)))])
            batch.pop("labels")
            expected = models.outputs(model, batch, device)
            reloaded = models.load_back(method, task.base, saved, device)
            # As torch.equal, to which NaN is not the NaN it was saved as.
            found = models.outputs(reloaded, batch, device)
            bit_equal = torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)
        trained = {
            "method": method,
            "learning_rate": options.learning_rates[method],
            "trainable_parameters": models.trainable_parameters(model),
            "saved_in": None if diverged else f"{method}/{saved.name}",
            "reload_bit_equal": bit_equal,
        }
        write_json(folder / TRAINED_FILE, trained | record)
        if stop.requested:
            done = f"diverged at step {steps}" if diverged else "is trained and saved"
            raise Interrupted(f"{method} {done}. {_how_to_go_on(options)}")
    return reloaded


def _read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def _how_to_go_on(options: FinetuneOptions) -> str:
    return f"Go on with the same command and --resume (results so far: {options.output})"
