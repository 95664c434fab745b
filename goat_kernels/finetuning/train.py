"""One training run through ``transformers.Trainer``: progress, time, memory, checkpoints, Ctrl-C, divergence."""

from __future__ import annotations

import gc
import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass(frozen=True)
class TrainingRecord:
    """What a run leaves behind.

    Attributes:
        steps: optimiser steps done; fewer than planned after an interruption, or where the run diverged.
        finished: whether all planned steps were done.
        diverged_at_step: the step whose loss was NaN or infinite, after which the run was stopped, or that left
            trained parameters so; None where all is finite.
        loss_steps: the steps at which ``losses`` were taken.
        losses: training loss, the mean since the previous entry.
        time_per_step_ms: median over the steps since the run was started or resumed, from the batch being there
            to the weights being updated; nan where none was left to do.
        peak_memory_mib: how far memory rose above where it stood before the model was loaded.
        peak_memory_source: what ``peak_memory_mib`` measures, in words.
    """

    steps: int
    finished: bool
    diverged_at_step: int | None
    loss_steps: list[int] = field(repr=False)
    losses: list[float] = field(repr=False)
    time_per_step_ms: float
    peak_memory_mib: float
    peak_memory_source: str


class StopSignal:
    """Turns the first Ctrl-C into a request to stop after the running step; a second one interrupts at once.

    A context manager; outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        tqdm.write("stopping after this step and writing a checkpoint; Ctrl-C again to stop at once")


def train(
    build_model: Callable[[], PreTrainedModel],
    dataset: Dataset,
    collate: Callable,
    options: FinetuneOptions,
    learning_rate: float,
    folder: Path,
    *,
    description: str,
    stop: StopSignal | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[PreTrainedModel, TrainingRecord]:
    """Train a model, from the last complete checkpoint in ``folder`` where there is one.

    Args:
        build_model: makes the model; called inside the memory measurement.
        dataset: of dicts that ``collate`` makes a batch of.
        collate: list of dicts -> the model's keyword arguments.
        options: batch size, steps, seed and so on.
        learning_rate: at its highest; it rises over the warm-up and then falls linearly to 0.
        folder: for checkpoints.
        description: label of the progress bar.
        stop: asked after every step whether to write a checkpoint and return early.
        callbacks: further Trainer callbacks.

    Returns:
        the trained model, in eval mode, and the record of the run.
    """
    arguments = _training_arguments(dataset, options, learning_rate, folder)
    watch = _Watch(description, arguments.device, stop)
    checkpoint = last_checkpoint(folder)
    with PeakMemory(arguments.device) as memory:
        model = build_model()
        if checkpoint is not None and not isinstance(model, PeftModel):
            _load_weights(model, checkpoint)
        trainer = _Trainer(
            watch, model=model, args=arguments, train_dataset=dataset, data_collator=collate, callbacks=callbacks
        )
        trainer.remove_callback(PrinterCallback)
        state = _final_state(checkpoint, arguments.max_steps)
        if state is None:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            state = trainer.state
        elif isinstance(model, PeftModel):
            model.load_adapter(str(checkpoint), model.active_adapter)
    diverged_at_step = watch.diverged_at_step
    if diverged_at_step is None and not _finite_parameters(model):
        diverged_at_step = state.global_step
    logged = [entry for entry in state.log_history if "loss" in entry]
    record = TrainingRecord(
        steps=state.global_step,
        finished=state.global_step >= state.max_steps,
        diverged_at_step=diverged_at_step,
        loss_steps=[entry["step"] for entry in logged],
        losses=[entry["loss"] for entry in logged],
        time_per_step_ms=statistics.median(watch.steps_ms) if watch.steps_ms else math.nan,
        peak_memory_mib=memory.peak_mib,
        peak_memory_source=memory.source,
    )
    return model.eval(), record


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None. Trainer writes a checkpoint's state file last."""
    complete = [path for path in folder.glob("checkpoint-*") if _is_json(path / "trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _final_state(checkpoint: Path | None, steps: int) -> TrainerState | None:
    """The state in ``checkpoint`` where all steps are done: Trainer, resumed from there, would do one more."""
    if checkpoint is None:
        return None
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state if state.global_step >= steps else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or cut short where the process was killed
        return False
    return True


def _load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Put a checkpoint's weights into ``model``.

    Trainer does so itself, but by the names in the file: transformers 5 saves some architectures (ViT among them) under
    other names than their modules have, which Trainer then skips without an error and trains on from the base weights.
    """
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


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


class PeakMemory:
    """Context manager: by how many MiB memory rose, at its peak, above where it stood at the start.

    On a GPU that is torch's allocator (exact). On a CPU it is the resident memory of the process, sampled every 5 ms;
    memory that the process had freed but not given back to the system is given back first, where psutil can do that.

    Attributes:
        peak_mib: set when the block ends.
        source: what was measured, in words.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_mib = 0.0
        self.source = "GPU memory allocated by torch" if device.type == "cuda" else "resident memory of the process"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            return self
        if hasattr(psutil, "heap_trim"):
            psutil.heap_trim()
        self._process, self._stop = psutil.Process(), threading.Event()
        self._start = self._peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._thread.join()
        self.peak_mib = (self._peak - self._start) / 2**20

    def _sample(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(_SAMPLE_S)
            self._peak = max(self._peak, self._process.memory_info().rss)


class _Watch(TrainerCallback):
    """What happens around every optimiser step: its time, the progress bar, and whether the run is to stop there.

    Attributes:
        steps_ms: wall time of every step since the process started; a checkpoint does not keep it.
        diverged_at_step: the first step with a loss, or a checkpoint's weights, that are NaN or infinite; or None.
    """

    def __init__(self, description: str, device: torch.device, stop: StopSignal | None) -> None:
        self._description, self._device, self._stop = description, device, stop
        self.steps_ms: list[float] = []
        self.diverged_at_step: int | None = None

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


class _Trainer(Trainer):
    """Has ``watch`` look at the loss of every batch: what is logged is a mean, of many steps in a long run."""

    def __init__(self, watch: _Watch, *, callbacks: Sequence[TrainerCallback], **arguments) -> None:
        self._watch = watch
        super().__init__(callbacks=[watch, *callbacks], **arguments)

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._watch.diverged_at_step is None and not torch.isfinite(loss).all():
            self._watch.diverged_at_step = self.state.global_step + 1
        return loss
