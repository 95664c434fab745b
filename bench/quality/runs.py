"""Running contenders on tasks: the learning rate is chosen on validation data, then five seeds meet the test data."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm.auto import tqdm

from bench import results
from bench.machine import describe
from bench.quality.contenders import Contender
from bench.quality.data import Data
from bench.quality.generation import share_answered
from bench.quality.tasks import METRICS, TASKS, QualityTask
from goat_kernels.finetuning.models import build, trainable_parameters, training_device
from goat_kernels.finetuning.tasks import Task, evaluate
from goat_kernels.finetuning.train import train

#: Where a checkout keeps the results, one file per task and one row per run.
RESULTS_FOLDER = results.RESULTS_FOLDER / "quality"

#: Fields that say which run a row is.
KEY_FIELDS = ("task", "contender", "stage", "learning_rate", "seed", "steps", "batch_size", "data")

#: The seed of the runs that choose the learning rate, which is none of the test runs'.
TUNING_SEED = 1000


def rows_of_task(folder: Path, task: str) -> list[dict]:
    """In the order in which they were written; where two processes did the same run, the first."""
    path, first = folder / f"{task}.jsonl", {}
    for row in results.read_rows(path) if path.is_file() else ():
        first.setdefault(results.part_of(row, KEY_FIELDS), row)
    return list(first.values())


def run_task(name: str, contenders: Sequence[Contender], folder: Path, seeds: int = 5) -> None:
    """Run what of a task's comparison is not in ``folder`` yet, with a progress bar; each run is written at once.

    Args:
        name: a key of ``TASKS``.
        contenders: what is compared.
        folder: where the results are.
        seeds: test runs of each contender.
    """
    task = TASKS[name]
    data = task.load()
    with tqdm(total=len(contenders) * (len(task.rates) + seeds), desc=name, unit="run") as bar:

        def run(contender: Contender, stage: str, rate: float, seed: int) -> None:
            row = {"task": name, "contender": contender.name, "stage": stage, "learning_rate": rate, "seed": seed}
            row |= {"steps": task.steps, "batch_size": task.batch_size, "data": data.digest[:16]}
            bar.set_postfix_str(f"{contender.name}, {stage}, {rate:g}, seed {seed}")
            if not any(row.items() <= done.items() for done in rows_of_task(folder, name)):
                results.append(folder / f"{name}.jsonl", {**row, **_run(task, contender, row, data)})
            bar.update()

        for contender in contenders:
            for rate in task.rates:
                run(contender, "validation", rate, TUNING_SEED)
            rate = chosen_rate(rows_of_task(folder, name), contender.name, task.metric)
            for seed in range(seeds):
                run(contender, "test", rate, seed)


def chosen_rate(rows: list[dict], contender: str, metric: str) -> float | None:
    """The learning rate with the best validation score; of several the lowest. A run that diverged is the worst.

    None where the contender has no validation run.
    """
    tuning = [row for row in rows if row["contender"] == contender and row["stage"] == "validation"]

    def rank(row: dict) -> tuple[float, float]:
        score = row["scores"][metric]
        return (-math.inf if score is None else METRICS[metric].sign * score, -row["learning_rate"])

    return max(tuning, key=rank)["learning_rate"] if tuning else None


def _run(task: QualityTask, contender: Contender, row: dict, data: Data) -> dict:
    """One training and its measurement: what the row lacks."""
    start, seed, stage, method = time.perf_counter(), row["seed"], row["stage"], contender.method
    base = data.base(seed)
    options = replace(contender.options, max_steps=task.steps, batch_size=task.batch_size, seed=seed)
    device = training_device(options)
    if method == "head" and not base.new_modules:
        model = base.load().to(device).requires_grad_(False)  # a language model as it is: there is no head to train
    else:
        with TemporaryDirectory() as scratch:
            model, _ = train(
                lambda: build(method, base, options),
                data.training(seed),
                data.collate,
                options,
                row["learning_rate"],
                Path(scratch),
                description=contender.name,
            )
    held_out = getattr(data, stage)
    measured = Task(task.summary, held_out, held_out, data.collate, base, task.metric)
    scores = {task.metric: evaluate(model, measured, 2 * task.batch_size, device, stage)["held_out"]}
    if data.questions is not None:
        scores["accuracy"] = share_answered(model, data.questions[stage], device)
    return {
        "scores": scores,
        "trainable_parameters": trainable_parameters(model),
        "rank": None if method in ("head", "full") else options.rank,
        "time_s": time.perf_counter() - start,
        **describe(device),
    }
