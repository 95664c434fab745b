"""A callback for transformers.Trainer and its relatives: balance loss under accumulation, and what the routers do."""

from __future__ import annotations

import functools
import math
import sys

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from goat_kernels.training.balance import balance_scales
from goat_kernels.training.report import router_statistics


class GoatCallback(TrainerCallback):
    """Logs the balance loss and the experts' load, and scales the balance loss where the trainer's loss is not seen.

    ``transformers.Trainer`` needs it only for the logs. A trainer that computes its loss outside the model (TRL's
    ``SFTTrainer``; label smoothing; ``compute_loss_func``) needs it whenever it accumulates gradients or scales its
    loss for float16: the balance loss of each batch then counts as 1 / (batches that this step accumulates), times the
    loss scale.

    Each log entry of a training step gains, in ``state.log_history`` and wherever ``report_to`` sends the logs:

    - ``goat/balance_loss``: mean over the layers; K when the load is even
    - ``goat/load_entropy``: mean over the layers, of the load's entropy over ln E: 1 when even
    - ``goat/load_max``, ``goat/load_min``: the most and least used expert of any layer, over an even load: 1 is even
    - ``goat/<layer>/balance_loss``, ``goat/<layer>/load_entropy`` and, for each expert, ``goat/<layer>/load_<i>``, the
      share of tokens that used it. The console does not print these.

    They describe the last batch before the log, on this process. To have its entries in the logs before TensorBoard's,
    wandb's and the like read them, the callback puts itself in front of the trainer's callbacks, and those that print
    behind all others.

    Args:
        per_layer: whether to log the entries of each layer. They are E + 2 numbers per layer and log, which Trainer
            also writes into ``trainer_state.json`` with every checkpoint.

    Attributes:
        history: one dict per logged training step: ``step``, the four numbers without the prefix, and by layer name
            ``load_by_layer``, the share of tokens per expert, ``balance_loss_by_layer`` and ``load_entropy_by_layer``.
    """

    def __init__(self, *, per_layer: bool = True) -> None:
        if not isinstance(per_layer, bool):
            raise TypeError(f"per_layer must be True or False, got {per_layer!r}")
        self.per_layer = per_layer
        self.history: list[dict] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        trainer = _trainer_that_calls(self)
        if trainer is not None:
            _order_callbacks(self, trainer.callback_handler)
            _guard_training(trainer, model)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs) -> None:
        scaler = getattr(optimizer, "scaler", None)  # accelerate multiplies the loss by its scale for float16
        batches = _accumulated_batches(args.gradient_accumulation_steps, state.global_step, train_dataloader)
        _set_default(model, (scaler.get_scale() if scaler is not None else 1.0) / batches)

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        _unguard(_trainer_that_calls(self))
        _set_default(model, 1.0)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs) -> None:
        if logs is None or "loss" not in logs:  # evaluation and the closing summary
            return
        statistics = router_statistics(model)
        if not statistics:
            return
        layers = statistics.values()
        summary = {
            "balance_loss": sum(layer.balance_loss for layer in layers) / len(layers),
            "load_entropy": sum(layer.load_entropy for layer in layers) / len(layers),
            "load_max": max(max(layer.relative_load) for layer in layers),
            "load_min": min(min(layer.relative_load) for layer in layers),
        }
        by_layer = {
            f"{number}_by_layer": {name: getattr(layer, number) for name, layer in statistics.items()}
            for number in ("load", "balance_loss", "load_entropy")
        }
        self.history.append({"step": state.global_step, **summary, **by_layer})
        entries = {f"goat/{name}": value for name, value in summary.items()}
        if self.per_layer:
            for name, layer in statistics.items():
                entries[f"goat/{name}/balance_loss"] = layer.balance_loss
                entries[f"goat/{name}/load_entropy"] = layer.load_entropy
                entries |= {f"goat/{name}/load_{expert}": share for expert, share in enumerate(layer.load)}
        # The trainer has already copied `logs` into its history; callbacks after this one read `logs` itself.
        logs.update(entries)
        if state.log_history:
            state.log_history[-1].update(entries)


class _ShortConsole(TrainerCallback):
    """Takes the layers' entries out of the logs before they are printed: thousands of numbers for a large model."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        for name in [name for name in logs or () if name.startswith("goat/") and name.count("/") > 1]:
            del logs[name]


# --- the scale of trainers that compute their own loss ------------------------------------------------------------


def _set_default(model, value: float) -> None:
    for scale in balance_scales(model):
        scale.default = value


def _guard_training(trainer: Trainer, model) -> None:
    """Put the default back where training ends in an exception, which Trainer tells no callback of: a loop of the
    user's own would otherwise use the scale of a step that never ended. The method that runs an epoch is wrapped."""
    _unguard(trainer)  # a training that failed before its first epoch has left its wrapper there
    run_epoch = trainer._run_epoch

    @functools.wraps(run_epoch)
    def run_epoch_or_reset(*args, **kwargs):
        try:
            return run_epoch(*args, **kwargs)
        except BaseException:
            _unguard(trainer)
            _set_default(model, 1.0)
            raise

    trainer._run_epoch = run_epoch_or_reset


def _unguard(trainer: Trainer | None) -> None:
    if trainer is not None:
        vars(trainer).pop("_run_epoch", None)


def _accumulated_batches(steps: int, global_step: int, dataloader) -> int:
    """How many batches the step about to begin accumulates: fewer than ``steps`` where an epoch ends."""
    try:
        batches = len(dataloader)
    except TypeError:  # an iterable data set has no length
        return steps
    updates = max(1, math.ceil(batches / steps))
    last = global_step % updates == updates - 1
    return max(1, batches - (updates - 1) * steps) if last else steps


# --- the trainer --------------------------------------------------------------------------------------------------


def _trainer_that_calls(callback: GoatCallback) -> Trainer | None:
    """The trainer whose event ``callback`` is handling, found among the callers; None where something else calls.

    Trainer hands callbacks no way to itself or to its list of callbacks, and it tells them of no exception. Without the
    trainer the entries reach the history and later callbacks alone, and `test_training_report::test_reaches_report_to`,
    `::test_every_callback_reads_the_entries` and
    `test_training_balance::test_an_exception_in_training_leaves_no_scale_behind` fail.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and any(c is callback for c in caller.callback_handler.callbacks):
            return caller
        frame = frame.f_back
    return None


def _order_callbacks(callback: GoatCallback, handler: CallbackHandler) -> None:
    """Order the trainer's callbacks: ``callback``, the others, and last those that print.

    Trainer's own, which write to ``report_to``, come before the user's and would read the logs before ``callback`` adds
    to them. A new list, since Trainer is going through the present one.
    """
    others = [c for c in handler.callbacks if c is not callback and not isinstance(c, _ShortConsole)]
    console = [c for c in others if _prints(c)]
    handler.callbacks = [callback, *(c for c in others if not _prints(c)), _ShortConsole(), *console]


def _prints(callback: TrainerCallback) -> bool:
    # The notebook's needs IPython to import, so it is known by where it comes from.
    in_notebook = type(callback).__module__ == "transformers.utils.notebook"
    return in_notebook or isinstance(callback, PrinterCallback | ProgressCallback)
