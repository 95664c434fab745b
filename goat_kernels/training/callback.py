"""A callback for transformers.Trainer and its relatives: balance loss under accumulation, and what the routers do."""

from __future__ import annotations

from transformers import TrainerCallback

from goat_kernels.training.balance import balance_scales
from goat_kernels.training.statistics import router_statistics


class GoatCallback(TrainerCallback):
    """Logs the balance loss and the experts' load, and scales the balance loss where the trainer's loss is not seen.

    ``transformers.Trainer`` needs it only for the logs. A trainer that computes its loss outside the model (TRL's
    ``SFTTrainer``) needs it whenever it accumulates gradients: the balance loss is then scaled by
    1 / gradient_accumulation_steps. Its last, incomplete accumulation of an epoch is scaled the same.

    Each log entry gains ``goat/balance_loss`` (mean over the layers; K when the load is even), ``goat/load_max`` and
    ``goat/load_min`` (the most and least used expert of any layer, as a share of an even load: 1 is even).

    Attributes:
        history: one dict per logged training step: ``step``, the three numbers above without the prefix, and
            ``load_by_layer``, the share of tokens per expert by layer name.
    """

    def __init__(self) -> None:
        self.history: list[dict] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        for scale in balance_scales(model):
            scale.default = 1 / args.gradient_accumulation_steps

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        for scale in balance_scales(model):
            scale.default = 1.0

    def on_log(self, args, state, control, logs=None, model=None, **kwargs) -> None:
        if logs is None or "loss" not in logs:  # evaluation and the closing summary
            return
        statistics = router_statistics(model)
        if not statistics:
            return
        even = [_relative_to_even(layer.load) for layer in statistics.values()]
        summary = {
            "balance_loss": sum(layer.balance_loss for layer in statistics.values()) / len(statistics),
            "load_max": max(max(layer) for layer in even),
            "load_min": min(min(layer) for layer in even),
        }
        self.history.append(
            {
                "step": state.global_step,
                **summary,
                "load_by_layer": {name: layer.load for name, layer in statistics.items()},
            }
        )
        # The trainer has already copied `logs` into its history; callbacks after this one read `logs` itself.
        entries = {f"goat/{name}": value for name, value in summary.items()}
        logs.update(entries)
        if state.log_history:
            state.log_history[-1].update(entries)


def _relative_to_even(load: tuple[float, ...]) -> list[float]:
    total = sum(load) or 1.0  # a batch without tokens has no load
    return [share * len(load) / total for share in load]
