"""The options of a fine-tuning run: each is declared once, here, and the command line is made from it.

Imports nothing heavy: the help text of ``goat-kernels finetune`` must appear at once.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial

from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning.methods import METHODS
from goat_kernels.rules import INIT_RULES, SCALING_RULES
from goat_kernels.settings import RESIDUAL_FORMS, AdapterSettings

_SETTINGS = {declared.name: declared for declared in fields(AdapterSettings)}

# --- defaults: by task, and by the paper's recipe for a domain ----------------------------------------------------

_ENCODER = {"methods": "lora,goat", "epochs": 3, "batch_size": 16, "eta": 1.0}

#: ``--task`` -> its defaults. eta is the paper's: 1 for ViT and RoBERTa, 0.1 for Llama at a learning rate of 1e-4.
TASKS: dict[str, dict] = {
    # A tiny model. One thread keeps its pace on a busy machine, and its results the same on any number of cores.
    "digits": {"methods": "head,full,lora,goat", "epochs": 18, "batch_size": 32, "eta": 1.0, "threads": 1},
    "image-classification": _ENCODER,
    "text-classification": _ENCODER,
    "causal-lm": {"methods": "lora,goat", "epochs": 1, "batch_size": 4, "eta": 0.1},
}

#: For pretrained encoders the usual ones (GOAT: the paper's).
_ENCODER_RATES = {"head": 1e-3, "full": 2e-5, "lora": 2e-4, "goat": 1e-4}

#: ``--task`` -> learning rates by method; one that is not there takes that of ``Method.rates_of``.
RATES: dict[str, dict[str, float]] = {
    "digits": {"head": 2e-2, "full": 1e-3, "lora": 2e-3, "goat": 2e-3},
    "image-classification": _ENCODER_RATES,
    "text-classification": _ENCODER_RATES,
    "causal-lm": {"full": 1e-5, "lora": 1e-4, "goat": 1e-4},
}


def _recipe(task: str, name: str, model: str, rank: int, learning_rate: float, **more) -> dict:
    """The paper's settings (arXiv 2502.16894) for a domain; epochs and batch size, which depend on the data, are the
    task's."""
    summary = f"{name}, E 8, K 2, R {rank}" + (f", eta {more['eta']}" if "eta" in more else "")
    paper = {"rank": rank, "eta": 1.0, "dropout": 0.05, "learning_rates": {"goat": learning_rate}}
    return {"task": task, "summary": summary, "model": model, **paper, **more}


def _generation(rank: int, learning_rate: float, targets: str, **more) -> dict:
    """The recipe of a language model on a prompt and its response."""
    more |= {"text_column": "prompt,response", "dtype": "bfloat16"}
    more["target_modules"] = tuple(f"{name}_proj" for name in targets.split())
    name, model = "LLaMA2-7B, a prompt and its response", "meta-llama/Llama-2-7b-hf"
    return _recipe("causal-lm", name, model, rank, learning_rate, **more)


#: ``--recipe`` -> its ``--task``, a summary for the help text, and options (none that names data).
RECIPES: dict[str, dict] = {
    "image": _recipe("image-classification", "CLIP ViT-B/32", "openai/clip-vit-base-patch32", 8, 1e-4),
    "glue": _recipe("text-classification", "RoBERTa-large", "FacebookAI/roberta-large", 32, 1e-4),
    "nlg": _generation(8, 2e-5, "q k v o gate up down", max_length=1024),
    "commonsense": _generation(32, 1e-4, "q k v up down", max_length=512, eta=0.1),
}

# --- from text on the command line to values ----------------------------------------------------------------------


def number(
    kind: type = float, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """A parser of numbers (int or float) for argparse; ``least`` is included, ``above`` and ``below`` are not."""
    bounds = {f"at least {least:g}": least, f"above {above:g}": above, f"below {below:g}": below}
    need = " and ".join(text for text, bound in bounds.items() if math.isfinite(bound))

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value >= least and above < value < below):  # so that NaN fails too
            raise argparse.ArgumentTypeError(f"{text!r} must be a {'whole ' * (kind is int)}number {need}")
        return value

    return parse


def name_or_number(text: str) -> str | float:
    """A number where ``text`` is one, else ``text``."""
    try:
        return float(text)
    except ValueError:
        return text


def names_or_pattern(text: str) -> str | tuple[str, ...]:
    """Names of modules as a tuple, which PEFT matches by suffix; ``all-linear`` and regular expressions as they are."""
    names = tuple(name.strip() for name in text.split(","))
    if text != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in names):
        return names
    try:
        re.compile(f"(?:{text})")  # it may become a part of a longer one
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither names nor a regular expression: {error}") from None
    return text


#: Field types that are neither numbers nor plain text -> parser.
_PARSERS = {"str | float": name_or_number, "str | tuple[str, ...]": names_or_pattern}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every field of :class:`FinetuneOptions` to ``parser``; an option that is not given is absent when parsed."""
    groups = {}
    for declared in fields(FinetuneOptions):
        more, kind = declared.metadata, declared.type.removesuffix(" | None")
        if more["group"] not in groups:
            groups[more["group"]] = parser.add_argument_group(more["group"])
        if kind == "bool":
            how = {"action": "store_true"}
        elif kind in ("int", "float"):
            bounds = {name: more[name] for name in ("least", "above", "below") if name in more}
            python_type, metavar = (int, "N") if kind == "int" else (float, "X")
            how = {"metavar": metavar, "type": number(python_type, **bounds)}
        else:
            how = {"metavar": more.get("metavar"), "choices": more.get("choices"), "type": _PARSERS.get(kind, str)}
        shown = more.get("shown", f"{declared.default:g}" if isinstance(declared.default, float) else declared.default)
        text = more["help"] + (f" (default: {shown})" if shown is not None and shown is not False else "")
        flag = more.get("flag", f"--{declared.name.replace('_', '-')}")
        groups[more["group"]].add_argument(flag, dest=declared.name, default=argparse.SUPPRESS, help=text, **how)


# --- the options --------------------------------------------------------------------------------------------------


def _option(group: str, default: object, help_text: str, **more):
    """A field that is an option of the command line.

    Args:
        group: its heading in the help text.
        default: where neither the command line nor the recipe nor the task (``TASKS``) has a value.
        help_text: what it is for.
        more: ``shown``, what the help text has as the default in place of ``default``; ``flag``, the option's name
            where it is not the field's; ``choices``, ``metavar``, and the bounds of :func:`number`.
    """
    made = {"default_factory": dict} if default is dict else {"default": default}
    return field(**made, metadata={"group": group, "help": help_text, **more})


_run = partial(_option, "what to run")
_data = partial(_option, "model and data (the defaults need neither)")
_adapter = partial(_option, "GOAT and LoRA")
_training = partial(_option, "training")


def _setting(name: str, note: str = "", **more):
    """An option that is a hyper-parameter of ``AdapterSettings``, which has its help text and its default."""
    declared = _SETTINGS[name]
    text = declared.metadata.get("help", "").replace("num_experts", "--experts").replace("lora_alpha", "--lora-alpha")
    default = more.pop("default", declared.default)
    return _adapter(default, f"{text} {note}".strip(), setting=name, **more)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """One run; every field is an option of ``goat-kernels finetune``.

    Names of modules are a tuple, a regular expression is a string. :func:`settle` fills in what depends on the task.
    """

    recipe: str | None = _run(
        None,
        "the paper's settings for one of its domains, where no option says otherwise: "
        + "; ".join(f"{name} ({recipe['summary']})" for name, recipe in RECIPES.items())
        + ". Needs --data, and a network unless --model names a folder",
    )
    task: str = _run("digits", f"one of {', '.join(TASKS)}; digits is the built-in demonstration above")
    methods: tuple[str, ...] = _run(
        (),
        "comma-separated, of: " + "; ".join(f"{name} ({method.meaning})" for name, method in METHODS.items()),
        shown=f"{TASKS['digits']['methods']} for the digits, {TASKS['causal-lm']['methods']} with your own model",
    )
    output: str = _run("goat-output", "the folder for the results")
    overwrite: bool = _run(
        False, "replace the results of an earlier run in --output; what this command did not write stays"
    )
    resume: bool = _run(
        False,
        "go on with the interrupted run in --output: finished methods are kept, the interrupted one continues from its "
        "checkpoint. Give the same options as before",
    )
    seed: int = _run(0, "seed of everything random", least=0)

    model: str | None = _data(None, "a folder that transformers can load, or a model's id on the hub")
    data: str | None = _data(
        None,
        "image-classification: a folder with one subfolder of images per class, or with train/ and test/ (or val/) of "
        "such folders; text-classification: CSV, TSV, JSON or JSONL; causal-lm: a text file, a folder of .txt files, "
        "or a table like those; or a data set's id on the hub, ID[:CONFIG][@SPLIT], which needs a network",
    )
    eval_data: str | None = _data(None, "held-out data, in place of a part of --data")
    eval_fraction: float = _data(
        0.2,
        "part of --data held out, the same part of every class",
        shown="0.2; the digits hold out half",
        above=0,
        below=1,
    )
    skip_bad_files: bool = _data(
        False, "go on without images that cannot be read, instead of refusing them before anything is trained"
    )
    text_column: str = _data(
        "text",
        "column of the text, or (causal-lm) of chats, lists of messages to which the tokenizer's chat template is "
        "applied; or of two: a pair to classify, or (causal-lm) a prompt and the response, on which alone the loss is "
        "taken",
        metavar="NAME[,NAME]",
    )
    label_column: str = _data("label", "column of the class", metavar="NAME")
    image_column: str = _data("image", "column of the image, for hub data", metavar="NAME")
    max_length: int = _data(256, "tokens kept of a text, or of a prompt with its response", least=1)
    block_size: int = _data(256, "causal-lm: texts are packed into blocks of this many tokens", least=2)

    rank: int = _setting("r", "LoRA's rank too.", least=1)
    experts: int = _setting("num_experts", least=1)
    top_k: int = _setting("top_k", least=1)
    scaling: str | float = _setting("scaling", metavar=f"{{{','.join(SCALING_RULES)},X}}")
    eta: float | None = _setting(
        "eta", default=None, shown="the paper's, 1 for classification and 0.1 for causal-lm", above=0
    )
    rho: float = _setting("rho", above=0)
    init: str = _setting("init", metavar=f"{{{','.join(INIT_RULES)}}}")
    residual: str = _setting("residual", metavar=f"{{{','.join(RESIDUAL_FORMS)}}}")
    balance_coefficient: float = _setting("balance_coefficient", default=1e-3, least=0)
    dropout: float = _setting("dropout", "LoRA's dropout too.", least=0, below=1)
    lora_alpha: float | None = _setting("lora_alpha", "LoRA's alpha too.", default=None, shown="2 R", above=0)
    target_modules: str | tuple[str, ...] = _adapter(
        "all-linear",
        "linear layers to adapt: all-linear (all but the head), comma-separated names, or a regular expression",
        metavar="NAMES",
    )
    exclude_modules: str | tuple[str, ...] | None = _adapter(
        None,
        "modules not to adapt, with all that is in them, whatever --target-modules says: comma-separated names, or a "
        "regular expression. The head is never adapted: it is trained in full",
        metavar="NAMES",
    )
    backend: str = _adapter("auto", "auto, torch or triton, for GOAT's layers")

    epochs: float | None = _training(
        None, "passes over the training data", shown=f"by task, {TASKS['digits']['epochs']} for the digits", above=0
    )
    max_steps: int | None = _training(None, "optimiser steps, in place of --epochs", least=1)
    batch_size: int = _training(16, "examples per batch", shown="by task", least=1)
    accumulation: int = _training(1, "batches per optimiser step", least=1)
    learning_rates: Mapping[str, float] = _training(
        dict,
        "one number for all methods, or for some of them: full=1e-5,lora=2e-4",
        shown="by task and method; for the digits "
        + ", ".join(f"{name} {rate:g}" for name, rate in RATES["digits"].items()),
        flag="--learning-rate",
        metavar="LR",
    )
    warmup: float = _training(
        0.1, "part of the steps over which the learning rate rises, before it falls to 0", least=0, below=1
    )
    weight_decay: float = _training(0.0, "AdamW's", least=0)
    save_steps: int | None = _training(None, "write a checkpoint every so many steps, against power cuts", least=1)
    device: str = _training("auto", "auto uses a GPU where there is one", choices=("auto", "cpu"))
    threads: int | None = _training(
        None,
        "CPU threads of torch",
        shown="torch's choice; 1 for the digits, whose model is too small for more",
        least=1,
    )
    dtype: str = _training(
        "float32", "the base model's dtype; adapters stay in float32", choices=("float32", "bfloat16", "float16")
    )

    def fingerprint(self) -> dict[str, object]:
        """Everything that determines the results, JSON-ready, for comparing a resumed run with its start."""
        left_out = ("output", "overwrite", "resume", "recipe")  # where results go, and what other options say in full
        values = {name: value for name, value in asdict(self).items() if name not in left_out}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def settle(given: Mapping[str, object]) -> FinetuneOptions:
    """Complete the options of the command line from the recipe and then from the task's defaults.

    ``given`` is field -> value; ``methods`` and ``learning_rates`` are text, and other keys are ignored. CommandError
    for an option that contradicts another, or that the task does not know.
    """
    given = {declared.name: given[declared.name] for declared in fields(FinetuneOptions) if declared.name in given}
    name, task = given.get("recipe"), given.get("task")
    for option, value, table in (("--recipe", name, RECIPES), ("--task", task, TASKS)):
        if value is not None and value not in table:
            raise CommandError(f"{option} {value!r} is unknown; it must be one of {', '.join(table)}")
    recipe = RECIPES.get(name, {"task": "digits"})
    task = task or recipe["task"]
    if name is not None and task != recipe["task"]:
        raise CommandError(f"--recipe {name} is for --task {recipe['task']}, not {task}")
    for argument in ("model", "data"):
        value = {**recipe, **given}.get(argument)
        if task == "digits" and value is not None:
            raise CommandError(f"--{argument} {value!r} needs a --task: one of {', '.join(list(TASKS)[1:])}")
        if task != "digits" and value is None:
            asking = f"--task {task}" if name is None else f"--recipe {name}"
            raise CommandError(f"{asking} needs --{argument}: a path, or an id on the hub")
    if task == "digits" and "eval_data" in given:
        raise CommandError(f"--eval-data {given['eval_data']!r} needs --task and --data")
    if given.get("skip_bad_files") and task != "image-classification":
        raise CommandError(f"--skip-bad-files is for --task image-classification, not {task}")
    if "epochs" in given and "max_steps" in given:
        raise CommandError(f"--epochs {given['epochs']:g} and --max-steps {given['max_steps']} exclude each other")
    if given.get("resume") and given.get("overwrite"):
        raise CommandError("--resume and --overwrite exclude each other: the one keeps --output, the other replaces it")
    values = {**TASKS[task], **recipe, **given, "task": task}
    values.pop("summary", None)
    rates = {method: RATES[task].get(method, RATES[task].get(row.rates_of)) for method, row in METHODS.items()}
    rates = {method: rate for method, rate in rates.items() if rate is not None} | recipe.get("learning_rates", {})
    values["methods"] = _methods(values["methods"], task)
    values["learning_rates"] = _learning_rates(given.get("learning_rates"), rates)
    return FinetuneOptions(**values)


def _methods(text: str, task: str) -> tuple[str, ...]:
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
    """``rates``, overridden by the option ``text``."""
    for part in () if text is None else text.split(","):
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
        rates = {**rates, name: rate} if separator else dict.fromkeys(rates, rate)
    return rates
