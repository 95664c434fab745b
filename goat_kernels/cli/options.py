"""How a parsed command line of ``goat-kernels finetune`` becomes ``FinetuneOptions``.

Imports nothing heavy: a contradiction must be told at once.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import TypeVar

from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning.methods import DEFAULT_METHODS, METHODS
from goat_kernels.finetuning.options import (
    BATCH_SIZES,
    EPOCHS,
    ETA,
    LEARNING_RATES,
    TASKS,
    AdapterOptions,
    DataOptions,
    FinetuneOptions,
    TrainingOptions,
)
from goat_kernels.finetuning.recipes import RECIPES, Recipe

Options = TypeVar("Options", AdapterOptions, DataOptions)


def options_from(arguments: argparse.Namespace) -> FinetuneOptions:
    """The options of a parsed command line; the checks that need torch come later (``models.check_adapter``).

    Raises:
        CommandError: an argument that contradicts another, or that the task does not know.
    """
    recipe = _recipe(arguments)
    task = arguments.task or recipe.task
    if task not in TASKS:
        raise CommandError(f"--task {task!r} is unknown; it must be one of {', '.join(TASKS)}")
    if arguments.recipe and task != recipe.task:
        raise CommandError(f"--recipe {arguments.recipe} is for --task {recipe.task}, not {task}")
    data = _settled(arguments, recipe.data)
    for name in ("model", "data"):
        value = getattr(data, name)
        if task == "digits" and value is not None:
            raise CommandError(f"--{name} {value!r} needs a --task: one of {', '.join(TASKS[1:])}")
        if task != "digits" and value is None:
            asking = f"--recipe {arguments.recipe}" if arguments.recipe else f"--task {task}"
            raise CommandError(f"{asking} needs --{name}: a path, or an id on the hub")
    if arguments.skip_bad_files and task != "image-classification":
        raise CommandError(f"--skip-bad-files is for --task image-classification, not {task}")
    if task == "digits" and data.eval_data is not None:
        raise CommandError(f"--eval-data {data.eval_data!r} needs --task and --data")
    if arguments.epochs is not None and arguments.max_steps is not None:
        raise CommandError(f"--epochs {arguments.epochs:g} and --max-steps {arguments.max_steps} exclude each other")
    if arguments.resume and arguments.overwrite:
        raise CommandError("--resume and --overwrite exclude each other: the one keeps --output, the other replaces it")
    adapter = _settled(arguments, recipe.adapter)
    return FinetuneOptions(
        task=task,
        methods=_methods(arguments.methods, task),
        output=arguments.output,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        adapter=adapter if adapter.eta is not None else replace(adapter, eta=ETA[task]),
        training=_training(arguments, recipe, task),
        data=data,
    )


def _recipe(arguments: argparse.Namespace) -> Recipe:
    if arguments.recipe is None:
        return Recipe(summary="", task="digits")
    if arguments.recipe not in RECIPES:
        raise CommandError(f"--recipe {arguments.recipe!r} is unknown; it must be one of {', '.join(RECIPES)}")
    return RECIPES[arguments.recipe]


def _given(arguments: argparse.Namespace, names) -> dict[str, object]:
    """The options among ``names`` that the command line has."""
    values = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _settled(arguments: argparse.Namespace, options: Options) -> Options:
    """The recipe's options, with what the command line says in their place."""
    return replace(options, **_given(arguments, options.__dataclass_fields__))


def _training(arguments: argparse.Namespace, recipe: Recipe, task: str) -> TrainingOptions:
    values = {
        "epochs": EPOCHS[task],
        "max_steps": None,
        "batch_size": BATCH_SIZES[task],
        # One thread keeps the digits' pace on a busy machine, and their results the same on any number of cores.
        "threads": 1 if task == "digits" else None,
        **recipe.training,
        **_given(arguments, TrainingOptions.__dataclass_fields__),
    }
    rates = {name: rate for name in METHODS if (rate := _default_rate(name, LEARNING_RATES[task])) is not None}
    return TrainingOptions(**values, learning_rates=_learning_rates(arguments.learning_rate, {**rates, **recipe.rates}))


def _default_rate(method: str, rates: dict[str, float]) -> float | None:
    return rates.get(method, rates.get(METHODS[method].rates_of))


def _methods(text: str | None, task: str) -> tuple[str, ...]:
    if text is None:
        return DEFAULT_METHODS if task == "digits" else ("lora", "goat")
    asked = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in METHODS]
    if unknown or not asked:
        raise CommandError(
            f"--methods {text!r} names {', '.join(map(repr, unknown)) or 'nothing'}; "
            f"it must be a comma-separated list of {', '.join(METHODS)}"
        )
    if task == "causal-lm" and "head" in asked:
        raise CommandError(f"--methods {text!r}: head trains a new classifier, and --task causal-lm has none")
    return tuple(name for name in METHODS if name in asked)


def _learning_rates(text: str | None, rates: dict[str, float]) -> dict[str, float]:
    if text is None:
        return rates
    for part in text.split(","):
        name, separator, value = part.rpartition("=")
        name = name.strip()
        if separator and name not in rates:
            raise CommandError(f"--learning-rate {text!r} names {name!r}; it must be one of {', '.join(rates)}")
        try:
            rate = float(value)
        except ValueError:
            rate = math.nan
        if not (math.isfinite(rate) and rate > 0) or (not separator and "," in text):
            raise CommandError(
                f"--learning-rate {text!r} must be one positive number, or a list such as full=1e-5,lora=2e-4"
            )
        rates.update({name: rate} if separator else dict.fromkeys(rates, rate))
    return rates
