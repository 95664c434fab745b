"""Running contenders on tasks: the learning rate is chosen on validation data, then five seeds meet the test data."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from bench import results
from bench.machine import describe
from bench.quality.contenders import Contender
from bench.quality.generation import share_answered
from bench.quality.tasks import METRICS, TASKS, Data, QualityTask, load
from goat_kernels.finetuning.models import BaseModel, build, trainable_parameters, training_device
from goat_kernels.finetuning.tasks import Task, evaluate
from goat_kernels.finetuning.train import train

#: Where a checkout keeps the results, one file per task and one row per run.
RESULTS_FOLDER = results.RESULTS_FOLDER / "quality"

#: Fields that say which run a row is.
KEY_FIELDS = ("task", "contender", "stage", "learning_rate", "seed", "steps", "batch_size", "quick", "data")

#: The seed of the runs that choose the learning rate, which is none of the test runs'.
TUNING_SEED = 1000

_QUICK_STEPS, _QUICK_RATES, _QUICK_SEEDS = 2, 1, 2

#: Points kept of a loss curve.
_CURVE_POINTS = 50


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        seeds: test runs per contender.
        quick: everything in small, for tests.
        device: ``"auto"`` or ``"cpu"``.
    """

    seeds: int = 5
    quick: bool = False
    device: str = "auto"

    def rates(self, task: QualityTask) -> tuple[float, ...]:
        """The learning rates to choose from."""
        return task.rates[:_QUICK_RATES] if self.quick else task.rates

    def steps(self, task: QualityTask) -> int:
        """Of training."""
        return _QUICK_STEPS if self.quick else task.steps

    def test_seeds(self) -> range:
        """The seeds of the test runs."""
        return range(_QUICK_SEEDS if self.quick else self.seeds)


def key_of(row: dict) -> tuple:
    """Equal for two runs of the same thing."""
    return tuple(row[name] for name in KEY_FIELDS)


def rows_of_task(folder: Path, task: str) -> list[dict]:
    """In the order in which they were written; where two processes did the same run, the first."""
    path, first = folder / f"{task}.jsonl", {}
    for row in results.read_rows(path) if path.is_file() else ():
        first.setdefault(key_of(row), row)
    return list(first.values())


def run_task(name: str, contenders: Iterable[Contender], plan: Plan, folder: Path) -> None:
    """Run what of a task's comparison is not in ``folder`` yet, with a progress bar; each run is written at once."""
    task, contenders = TASKS[name], list(contenders)
    data = load(name, plan.quick)
    total = len(contenders) * (len(plan.rates(task)) + len(plan.test_seeds()))
    with _imports_out_of_sight(), tqdm(total=total, desc=name, unit="run") as bar:

        def run(contender: Contender, stage: str, rate: float, seed: int) -> None:
            row = {"task": name, "contender": contender.name, "stage": stage, "learning_rate": rate, "seed": seed}
            row |= {"steps": plan.steps(task), "batch_size": task.batch_size, "quick": plan.quick}
            row["data"] = data.digest[:16]
            bar.set_postfix_str(f"{contender.name}, {stage}, {rate:g}, seed {seed}")
            if key_of(row) not in {key_of(done) for done in rows_of_task(folder, name)}:
                results.append(folder / f"{name}.jsonl", {**row, **_run(task, contender, row, plan, data)})
            bar.update()

        for contender in contenders:
            for rate in plan.rates(task):
                run(contender, "validation", rate, TUNING_SEED)
            rate = chosen_rate(rows_of_task(folder, name), contender.name, task.metric)
            for seed in plan.test_seeds():
                run(contender, "test", rate, seed)


@contextlib.contextmanager
def _imports_out_of_sight() -> Iterator[None]:
    """Every training collects garbage twice; what the imports left is none, and takes a second to look through."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def chosen_rate(rows: list[dict], contender: str, metric: str) -> float:
    """The learning rate with the best validation score; of several the lowest. A run that diverged is the worst."""
    tuning = [row for row in rows if row["contender"] == contender and row["stage"] == "validation"]
    sign = 1 if METRICS[metric] else -1

    def rank(row: dict) -> tuple[float, float]:
        score = row["scores"][metric]
        return (-math.inf if score is None else sign * score, -row["learning_rate"])

    return max(tuning, key=rank)["learning_rate"]


def _run(task: QualityTask, contender: Contender, row: dict, plan: Plan, data: Data) -> dict:
    """One training and its measurement: what the row lacks."""
    start, seed = time.perf_counter(), row["seed"]
    base = data.base(seed)
    options = replace(
        contender.options(base), max_steps=row["steps"], batch_size=task.batch_size, seed=seed, device=plan.device
    )
    device = training_device(options)
    steps, losses = [], []
    if contender.method == "head" and not base.new_modules:
        model = base.load().to(device).requires_grad_(False)  # a language model as it is: there is no head to train
    else:
        with TemporaryDirectory() as scratch:
            model, record = train(
                lambda: build(contender.method, base, options),
                data.training(seed),
                data.collate,
                options,
                row["learning_rate"],
                Path(scratch),
                description=contender.name,
            )
        steps, losses = record["loss_steps"], record["losses"]
    scores, load_by_layer = _scores(model, base, task, data, row["stage"], device)
    at = np.unique(np.linspace(0, len(losses) - 1, _CURVE_POINTS).astype(int)) if losses else []
    return {
        "scores": scores,
        "trainable_parameters": trainable_parameters(model),
        "rank": None if contender.method in ("head", "full") else options.rank,
        "losses": _curve(losses, at),
        "loss_steps": [steps[i] for i in at],
        # The routers of one seed are enough to look at.
        "load_by_layer": load_by_layer if row["stage"] == "test" and seed == 0 else {},
        "time_s": time.perf_counter() - start,
        **describe(device),
    }


def _curve(losses: list[float], at: Iterable[int]) -> list[float]:
    """The mean of the losses since the previous point, at each point."""
    ends = [i + 1 for i in at]
    return [float(np.mean(losses[a:b])) for a, b in zip([0, *ends[:-1]], ends, strict=True)] if ends else []


def _scores(
    model: nn.Module, base: BaseModel, task: QualityTask, data: Data, stage: str, device: torch.device
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metric -> value on the stage's data, and layer -> load of its experts there."""
    held_out = data.validation if stage == "validation" else data.test
    measured = Task(task.summary, held_out, held_out, data.collate, base, task.metric)
    evaluation = evaluate(model, measured, 2 * task.batch_size, device, stage)
    scores = {task.metric: evaluation["held_out"]}
    if data.questions is not None:
        questions = data.questions[0 if stage == "validation" else 1]
        scores["accuracy"] = share_answered(model, questions, device)
    return scores, evaluation["load_by_layer"]
