"""What ``goat-kernels finetune`` can be told, as dataclasses, and how a parsed command line becomes them.

Imports nothing heavy: the help text must appear at once.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, field

from goat_kernels.cli.errors import CommandError

#: Every method, in the order of the table.
METHODS: dict[str, str] = {
    "head": "only a new classifier on the frozen model",
    "full": "full fine-tuning",
    "lora": "PEFT's LoRA",
    "goat": "GOAT",
}

TASKS = ("digits", "image-classification", "text-classification", "causal-lm")

#: Learning rates where --learning-rate does not say. Those of the digits are for a tiny model trained for a minute;
#: the others are the usual ones for pretrained transformers (GOAT: the paper's).
LEARNING_RATES: dict[str, dict[str, float]] = {
    "digits": {"head": 2e-2, "full": 1e-3, "lora": 2e-3, "goat": 2e-3},
    "image-classification": {"head": 1e-3, "full": 2e-5, "lora": 2e-4, "goat": 1e-4},
    "text-classification": {"head": 1e-3, "full": 2e-5, "lora": 2e-4, "goat": 1e-4},
    "causal-lm": {"full": 1e-5, "lora": 1e-4, "goat": 1e-4},
}

#: eta where --eta does not say: the paper's, 1 for ViT and RoBERTa, 0.1 for Llama at a learning rate of 1e-4.
ETA = {"digits": 1.0, "image-classification": 1.0, "text-classification": 1.0, "causal-lm": 0.1}

#: Epochs and batch size where --epochs, --max-steps and --batch-size do not say.
EPOCHS = {"digits": 18, "image-classification": 3, "text-classification": 3, "causal-lm": 1}
BATCH_SIZES = {"digits": 32, "image-classification": 16, "text-classification": 16, "causal-lm": 4}


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Hyper-parameters of the adapters; ``rank``, ``target_modules`` and ``dropout`` serve LoRA too."""

    rank: int = 32
    experts: int = 8
    top_k: int = 2
    scaling: str | float = "goat"
    eta: float | None = None
    rho: float = 10.0
    init: str = "goat"
    residual: str = "path"
    balance_coefficient: float = 1e-3
    dropout: float = 0.0
    lora_alpha: float | None = None
    target_modules: str | tuple[str, ...] = "all-linear"
    backend: str = "auto"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How each method is trained; ``learning_rates`` has one entry per method, ``threads`` None is torch's choice."""

    learning_rates: dict[str, float]
    epochs: float
    max_steps: int | None
    batch_size: int
    accumulation: int = 1
    warmup: float = 0.1
    weight_decay: float = 0.0
    save_steps: int | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the model and the data come from, and how the data is read."""

    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    eval_fraction: float = 0.2
    text_column: str = "text"
    image_column: str = "image"
    label_column: str = "label"
    max_length: int = 256
    block_size: int = 256


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """One run of the command."""

    task: str
    methods: tuple[str, ...]
    output: str
    resume: bool
    overwrite: bool
    adapter: AdapterOptions
    training: TrainingOptions
    data: DataOptions = field(default_factory=DataOptions)

    def fingerprint(self) -> dict[str, object]:
        """Everything that determines the results, flat and JSON-ready, for comparing a resumed run with its start."""
        nested = asdict(self)
        flat = {"task": nested["task"], "methods": list(self.methods)}
        for group in ("adapter", "training", "data"):
            flat.update(nested[group])
        if isinstance(flat["target_modules"], tuple):
            flat["target_modules"] = list(flat["target_modules"])
        return flat


def options_from(arguments: argparse.Namespace) -> FinetuneOptions:
    """The options of a parsed command line; the checks that need torch come later (``models.check_adapter``).

    Raises:
        CommandError: an argument that contradicts another, or that the task does not know.
    """
    task = arguments.task
    if task not in TASKS:
        raise CommandError(f"--task {task!r} is unknown; it must be one of {', '.join(TASKS)}")
    for name in ("model", "data"):
        given = getattr(arguments, name) is not None
        if task == "digits" and given:
            raise CommandError(f"--{name} {getattr(arguments, name)!r} needs a --task: one of {', '.join(TASKS[1:])}")
        if task != "digits" and not given:
            raise CommandError(f"--task {task} needs --{name}: a path, or an id on the hub")
    if task == "digits" and arguments.eval_data is not None:
        raise CommandError(f"--eval-data {arguments.eval_data!r} needs --task and --data")
    if arguments.epochs is not None and arguments.max_steps is not None:
        raise CommandError(f"--epochs {arguments.epochs:g} and --max-steps {arguments.max_steps} exclude each other")
    if arguments.resume and arguments.overwrite:
        raise CommandError("--resume and --overwrite exclude each other: the one keeps --output, the other replaces it")
    methods = _methods(arguments.methods, task)
    return FinetuneOptions(
        task=task,
        methods=methods,
        output=arguments.output,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        adapter=AdapterOptions(**{name: getattr(arguments, name) for name in AdapterOptions.__dataclass_fields__}),
        training=TrainingOptions(
            learning_rates=_learning_rates(arguments.learning_rate, task),
            epochs=arguments.epochs or EPOCHS[task],
            max_steps=arguments.max_steps,
            batch_size=arguments.batch_size or BATCH_SIZES[task],
            # One thread keeps the digits' pace on a busy machine, and their results the same on any number of cores.
            threads=arguments.threads or (1 if task == "digits" else None),
            **{
                name: getattr(arguments, name)
                for name in ("accumulation", "warmup", "weight_decay", "save_steps", "seed", "device", "dtype")
            },
        ),
        data=DataOptions(**{name: getattr(arguments, name) for name in DataOptions.__dataclass_fields__}),
    )


def _methods(text: str | None, task: str) -> tuple[str, ...]:
    if text is None:
        return tuple(METHODS) if task == "digits" else ("lora", "goat")
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


def _learning_rates(text: str | None, task: str) -> dict[str, float]:
    rates = dict(LEARNING_RATES[task])
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
