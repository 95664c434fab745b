"""The table and results.json."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.options import FinetuneOptions


@dataclass(frozen=True)
class MethodResult:
    """One row of the table; the fields are those of results.json, with their units in their names.

    JSON has no NaN and no infinity: a number that is one is null there. A method that diverged has no saved model and
    no held-out metric.

    Attributes:
        method: a key of ``methods.METHODS``.
        learning_rate: the highest of the schedule.
        trainable_parameters: numbers that the optimiser updated.
        saved_in: where the trained model is, inside the output folder; None where the method diverged.
        reload_bit_equal: whether the saved model, loaded back, gave the same outputs bit for bit; None likewise.
        steps: optimiser steps.
        loss_steps, losses: the training loss.
        time_per_step_ms: median.
        peak_memory_mib, peak_memory_source: see ``train.TrainingRecord``.
        metric: ``"accuracy"`` (0..1) or ``"perplexity"``.
        held_out, held_out_standard_error: the metric on ``held_out_examples`` held-out examples; None where the method
            diverged or the metric is not finite.
        load_by_layer: layer -> share of the held-out tokens that used each expert.
        diverged_at_step: see ``train.TrainingRecord``; None where the method did not diverge.
    """

    method: str
    learning_rate: float
    trainable_parameters: int
    saved_in: str | None
    reload_bit_equal: bool | None
    steps: int
    loss_steps: list[int] = field(repr=False)
    losses: list[float] = field(repr=False)
    time_per_step_ms: float
    peak_memory_mib: float
    peak_memory_source: str
    metric: str
    held_out: float | None
    held_out_standard_error: float | None
    held_out_examples: int
    load_by_layer: dict[str, list[float]] = field(repr=False)
    diverged_at_step: int | None = None

    @classmethod
    def read(cls, file: Path) -> MethodResult:
        """The row in a method's result.json; a number that is null there is NaN, except the metric."""
        content = json.loads(file.read_text(encoding="utf-8"))
        content["losses"] = [math.nan if loss is None else loss for loss in content["losses"]]
        if content["time_per_step_ms"] is None:
            content["time_per_step_ms"] = math.nan
        return cls(**content)

    @property
    def failed(self) -> bool:
        """Whether the method diverged, has no finite metric, or was not loaded back as it was saved."""
        return self.held_out is None or not self.reload_bit_equal


def format_table(results: Sequence[MethodResult], title: str) -> str:
    """The table in plain text, with what its columns mean underneath."""
    first = next((result for result in results if result.held_out is not None), results[0])
    rows = [["method", f"held-out {first.metric}", "trainable", "ms/step", "peak MiB"]]
    rows += [
        [
            METHODS[result.method].meaning,
            _with_error(result),
            f"{result.trainable_parameters:,}",
            f"{result.time_per_step_ms:.1f}",
            f"{result.peak_memory_mib:.0f}",
        ]
        for result in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title, "", *lines, "", *_notes(first)])


def _with_error(result: MethodResult) -> str:
    if result.diverged_at_step is not None:
        return f"diverged at step {result.diverged_at_step}"
    if result.held_out is None:
        return "not finite"
    scale, digits = (100, 1) if result.metric == "accuracy" else (1, 2)
    unit = " %" if result.metric == "accuracy" else ""
    error = result.held_out_standard_error
    after = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * result.held_out:.{digits}f}{after}{unit}"


def _notes(result: MethodResult) -> list[str]:
    examples = "blocks" if result.metric == "perplexity" else "examples"
    about_errors = [
        f"± one standard error over the {result.held_out_examples} held-out {examples}, one seed: this does not rank",
        "  methods that are closer than two or three of them.",
    ]
    return [
        *(about_errors if result.held_out is not None else []),
        "trainable: parameters updated. ms/step: median, from the batch being ready to the weights being updated.",
        f"peak MiB: rise of the {result.peak_memory_source}, from before the method's model was loaded",
        "  to the peak of its training.",
    ]


def results_json(description: str, options: FinetuneOptions, results: Sequence[MethodResult]) -> dict:
    """The content of results.json."""
    import peft
    import transformers

    return {
        "description": description,
        "options": options.fingerprint(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "methods": [asdict(result) for result in results],
    }
