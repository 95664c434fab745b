"""One training run through ``transformers.Trainer``: progress, time, memory, checkpoints, Ctrl-C, divergence."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from goat_kernels.finetuning.options import FinetuneOptions

#: Losses kept of a run: every step up to this many, then every second one, and so on.
_LOGGED_STEPS = 2000

#: Between two looks at the memory of the process.
_SAMPLE_S = 0.005


@contextlib.contextmanager
def stop_signal() -> Iterator[SimpleNamespace]:
    """Turn the first Ctrl-C into a request to stop after the running step, the yielded object's ``requested``; a second
    one interrupts at once."""
    stop = SimpleNamespace(requested=False)

    def handle(number, frame) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        tqdm.write("stopping after this step and writing a checkpoint; Ctrl-C again to stop at once")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def train(
    build_model: Callable[[], PreTrainedModel],
    dataset: Dataset,
    collate: Callable,
    options: FinetuneOptions,
    learning_rate: float,
    folder: Path,
    *,
    description: str,
    stop: SimpleNamespace | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[PreTrainedModel, dict]:
    """Train a model, from the last complete checkpoint in ``folder`` where there is one.

    Args:
        build_model: makes the model; called inside the memory measurement.
        dataset, collate: dicts, and what makes a list of them the model's keyword arguments.
        options: batch size, steps, seed and so on.
        learning_rate: at its highest; it rises over the warm-up and then falls linearly to 0.
        folder: for checkpoints.
        description: label of the progress bar.
        stop: from :func:`stop_signal`; asked after every step whether to write a checkpoint and return early.
        callbacks: further Trainer callbacks.

    Returns:
        the trained model, in eval mode, and the training's fields of a row (``results``).
    """
    arguments = _training_arguments(dataset, options, learning_rate, folder)
    watch = _Watch(description, arguments.device, stop)
    checkpoint = last_checkpoint(folder)
    with peak_memory(arguments.device) as memory:
        model = build_model()
        if checkpoint is not None and not isinstance(model, PeftModel):
            # Trainer does so itself, but by the names in the file: transformers 5 saves some architectures (ViT among
            # them) under other names than their modules have. Trainer skips those without an error, and trains on from
            # the base weights.
            model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())
        trainer = Trainer(
            model=model, args=arguments, train_dataset=dataset, data_collator=collate, callbacks=[watch, *callbacks]
        )
        training_step = trainer.training_step

        def watched_step(*args, **kwargs) -> Tensor:
            loss = training_step(*args, **kwargs)
            # Each batch's: what is logged is a mean, of many steps in a long run.
            if watch.diverged_at_step is None and not torch.isfinite(loss).all():
                watch.diverged_at_step = trainer.state.global_step + 1
            return loss

        trainer.training_step = watched_step
        trainer.remove_callback(PrinterCallback)
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else trainer.state
        if state.global_step < arguments.max_steps:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            state = trainer.state
        elif isinstance(model, PeftModel):  # all steps are done: Trainer, resumed from there, would do one more
            model.load_adapter(str(checkpoint), model.active_adapter)
    diverged_at_step = watch.diverged_at_step
    if diverged_at_step is None and not _finite_parameters(model):
        diverged_at_step = state.global_step
    logged = [entry for entry in state.log_history if "loss" in entry]
    return model.eval(), {
        "steps": state.global_step,
        "diverged_at_step": diverged_at_step,
        "loss_steps": [entry["step"] for entry in logged],
        "losses": [entry["loss"] for entry in logged],
        "time_per_step_ms": statistics.median(watch.steps_ms) if watch.steps_ms else math.nan,
        "peak_memory_mib": memory.peak_mib,
        "peak_memory_source": memory.source,
    }


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None. Trainer writes a checkpoint's state file last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        with contextlib.suppress(OSError, ValueError):  # absent, or cut short where the process was killed
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
    return None


def steps_of(count: int, options: FinetuneOptions) -> int:
    """Optimiser steps of a run over ``count`` examples."""
    if options.max_steps is not None:
        return options.max_steps
    batches = math.ceil(count / options.batch_size)
    return max(1, math.ceil(options.epochs * math.ceil(batches / options.accumulation)))


def _training_arguments(
    dataset: Dataset, options: FinetuneOptions, learning_rate: float, folder: Path
) -> TrainingArguments:
    steps = steps_of(len(dataset), options)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(options.warmup * steps),
        weight_decay=options.weight_decay,
        seed=options.seed,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        save_total_limit=1,
        logging_steps=math.ceil(steps / _LOGGED_STEPS),
        logging_nan_inf_filter=False,  # a loss of nan is to be seen
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=options.device == "cpu",
    )
    if arguments.n_gpu > 1:
        # Trainer would wrap the model in DataParallel, whose replicas are not what this command measures.
        arguments._n_gpu = 1
    return arguments


def _finite_parameters(model: PreTrainedModel | PeftModel) -> bool:
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return all(bool(torch.isfinite(parameter).all()) for parameter in trained)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[SimpleNamespace]:
    """Measure by how many MiB memory rises, at its peak, above the level at the start: ``peak_mib`` of the yielded
    object when the block ends, of what ``source`` says."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        memory = SimpleNamespace(source="GPU memory allocated by torch")
        yield memory
        memory.peak_mib = (torch.cuda.max_memory_allocated(device) - start) / 2**20
        return
    if hasattr(psutil, "heap_trim"):  # returns what the process has freed but still holds to the system
        psutil.heap_trim()
    process, done = psutil.Process(), threading.Event()
    memory = SimpleNamespace(source="resident memory of the process", peak_mib=0.0)
    start = process.memory_info().rss

    def sample() -> None:
        last = False
        while not last:
            last = done.wait(_SAMPLE_S)
            memory.peak_mib = max(memory.peak_mib, (process.memory_info().rss - start) / 2**20)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()


class _Watch(TrainerCallback):
    """What happens around every optimiser step: its time, the progress bar, and whether the run is to stop there."""

    def __init__(self, description: str, device: torch.device, stop: SimpleNamespace | None) -> None:
        self._description, self._device, self._stop = description, device, stop
        self.steps_ms: list[float] = []  # since the process started; a checkpoint does not keep it
        self.diverged_at_step: int | None = None  # the first with a NaN or infinity in the loss or a checkpoint

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._bar = tqdm(desc=self._description, total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._start = self._now()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps_ms.append((self._now() - self._start) * 1e3)
        self._bar.update()
        if self._stop is not None and self._stop.requested and state.global_step < state.max_steps:
            # Between two steps, so that nothing is half done.
            control.should_save = control.should_training_stop = True
        if self.diverged_at_step is None and control.should_save and not _finite_parameters(model):
            self.diverged_at_step = state.global_step
        if self.diverged_at_step is not None:
            control.should_training_stop = control.should_log = True
            control.should_save = False  # it would replace a checkpoint that is finite
        return control

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._bar.close()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
