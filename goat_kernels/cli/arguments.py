"""The arguments of ``goat-kernels finetune``, with their help texts; ``options.py`` says what becomes of them.

What a recipe can settle has no default here: None means that the recipe, and after it the dataclass, has its say.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.options import (
    LEARNING_RATES,
    TASKS,
    AdapterOptions,
    DataOptions,
    TrainingOptions,
)
from goat_kernels.finetuning.recipes import RECIPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every option of ``goat-kernels finetune``."""
    _add_run_arguments(parser.add_argument_group("what to run"))
    _add_data_arguments(parser.add_argument_group("model and data (the defaults need neither)"))
    _add_adapter_arguments(parser.add_argument_group("GOAT and LoRA"))
    _add_training_arguments(parser.add_argument_group("training"))


def _add_run_arguments(group) -> None:
    group.add_argument(
        "--recipe",
        metavar="NAME",
        help="the paper's settings for one of its domains, where no option says otherwise: "
        + "; ".join(f"{name} ({recipe.summary})" for name, recipe in RECIPES.items())
        + ". Needs --data, and a network unless --model names a folder",
    )
    group.add_argument(
        "--task",
        help=f"one of {', '.join(TASKS)}. The default, digits, is the built-in demonstration above.",
    )
    group.add_argument(
        "--methods",
        metavar="LIST",
        help="comma-separated, of: "
        + "; ".join(f"{name} ({method.meaning})" for name, method in METHODS.items())
        + ". Default: head,full,lora,goat for the digits, lora,goat with your own model",
    )
    group.add_argument(
        "--output", default="goat-output", metavar="FOLDER", help="where results go (default: %(default)s)"
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the results of an earlier run in --output; what this command did not write stays",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the interrupted run in --output: finished methods are kept, the interrupted one continues "
        "from its checkpoint. Give the same options as before",
    )
    group.add_argument(
        "--seed", metavar="N", type=integer(0), default=0, help="seed of everything random (default: %(default)s)"
    )


def _add_data_arguments(group) -> None:
    group.add_argument(
        "--model", metavar="PATH_OR_ID", help="a folder that transformers can load, or a model's id on the hub"
    )
    group.add_argument(
        "--data",
        metavar="PATH_OR_ID",
        help="image-classification: a folder with one subfolder of images per class, or with train/ and test/ (or "
        "val/) of such folders; text-classification: CSV, TSV, JSON or JSONL; causal-lm: a text file, a folder of .txt "
        "files, or a table like those; or a data set's id on the hub, ID[:CONFIG][@SPLIT], which needs a network and "
        "pip install 'goat-kernels[data]'",
    )
    default = DataOptions()
    group.add_argument("--eval-data", metavar="PATH_OR_ID", help="held-out data, in place of a part of --data")
    group.add_argument(
        "--eval-fraction",
        type=number(0, 1),
        metavar="F",
        help="part of --data held out, the same part of every class "
        f"(default: {default.eval_fraction}; the digits hold out half)",
    )
    group.add_argument(
        "--skip-bad-files",
        action="store_true",
        default=None,
        help="go on without images that cannot be read, instead of refusing them before anything is trained",
    )
    group.add_argument(
        "--text-column",
        metavar="NAME[,NAME]",
        help="column of the text, or (causal-lm) of chats, lists of messages to which the tokenizer's chat template is "
        "applied; or of two: a pair to classify, or (causal-lm) a prompt and the response, on which "
        f"alone the loss is taken (default: {default.text_column})",
    )
    group.add_argument("--label-column", metavar="NAME", help=f"column of the class (default: {default.label_column})")
    group.add_argument(
        "--image-column", metavar="NAME", help=f"column of the image, for hub data (default: {default.image_column})"
    )
    group.add_argument(
        "--max-length",
        type=integer(1),
        metavar="N",
        help=f"tokens kept of a text, or of a prompt with its response (default: {default.max_length})",
    )
    group.add_argument(
        "--block-size",
        type=integer(2),
        metavar="N",
        help=f"causal-lm: texts are packed into blocks of this many tokens (default: {default.block_size})",
    )


def _add_adapter_arguments(group) -> None:
    default = AdapterOptions()
    group.add_argument(
        "--rank",
        metavar="R",
        type=integer(1),
        help=f"total rank R, of LoRA too (default: {default.rank})",
    )
    group.add_argument(
        "--experts",
        metavar="E",
        type=integer(1),
        help="experts E, a divisor of --rank (default: 8)",
    )
    group.add_argument(
        "--top-k",
        metavar="K",
        type=integer(1),
        help=f"experts K that a token uses (default: {default.top_k})",
    )
    group.add_argument(
        "--scaling",
        metavar="RULE",
        type=_name_or_number,
        help="s: goat sqrt(3 eta N / D), goat_s the same per expert, lora alpha / D, rslora alpha / sqrt(D), or a "
        f"number (default: {default.scaling})",
    )
    group.add_argument(
        "--eta",
        metavar="X",
        type=number(0),
        help="full fine-tuning learning rate / GOAT learning rate, in the goat scalings "
        "(default: the paper's, 1 for classification and 0.1 for causal-lm)",
    )
    group.add_argument(
        "--rho",
        metavar="X",
        type=number(0),
        help=f"the adapter starts with 1/rho of its segment of the weight (default: {default.rho})",
    )
    group.add_argument(
        "--init",
        metavar="RULE",
        help="the singular triples the experts start from: goat, goat_mini, pissa, milora, pissa_milora, random; or "
        f"none: lora, hydralora (default: {default.init})",
    )
    group.add_argument(
        "--residual",
        metavar="FORM",
        help="how the adapter's expected start is subtracted: path (beside the untouched weight) or fold (inside "
        f"it) (default: {default.residual})",
    )
    group.add_argument(
        "--balance-coefficient",
        type=number(0, inclusive=True),
        metavar="C",
        help=f"weight of the load-balancing loss (default: {default.balance_coefficient})",
    )
    group.add_argument(
        "--dropout",
        metavar="P",
        type=number(0, 1, inclusive=True),
        help=f"dropout in front of the adapters, of LoRA too (default: {default.dropout})",
    )
    group.add_argument(
        "--lora-alpha",
        type=number(0),
        metavar="ALPHA",
        help="alpha of LoRA, and of --scaling lora and rslora (default: 2 R)",
    )
    group.add_argument(
        "--target-modules",
        type=_modules,
        metavar="NAMES",
        help="linear layers to adapt: all-linear (all but the head), comma-separated names, or a regular expression",
    )
    group.add_argument(
        "--exclude-modules",
        type=_modules,
        metavar="NAMES",
        help="modules not to adapt, with all that is in them, whatever --target-modules says: comma-separated names, "
        "or a regular expression. The head is never adapted: it is trained in full",
    )
    group.add_argument(
        "--backend",
        metavar="NAME",
        help=f"auto, torch or triton, for GOAT's layers (default: {default.backend})",
    )


def _add_training_arguments(group) -> None:
    default = TrainingOptions
    group.add_argument(
        "--epochs",
        metavar="N",
        type=number(0),
        help="passes over the training data (default: by task, 18 for the digits)",
    )
    group.add_argument("--max-steps", type=integer(1), metavar="N", help="optimiser steps, in place of --epochs")
    group.add_argument("--batch-size", type=integer(1), metavar="N", help="examples per batch (default: by task)")
    group.add_argument(
        "--accumulation",
        type=integer(1),
        metavar="N",
        help=f"batches per optimiser step (default: {default.accumulation})",
    )
    group.add_argument(
        "--learning-rate",
        metavar="LR",
        help="one number for all methods, or for some of them: full=1e-5,lora=2e-4 (default: by task and method; for "
        "the digits " + ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES["digits"].items()) + ")",
    )
    group.add_argument(
        "--warmup",
        type=number(0, 1, inclusive=True),
        metavar="F",
        help=f"part of the steps over which the learning rate rises, before it falls to 0 (default: {default.warmup})",
    )
    group.add_argument(
        "--weight-decay",
        type=number(0, inclusive=True),
        metavar="W",
        help=f"AdamW's (default: {default.weight_decay:g})",
    )
    group.add_argument(
        "--save-steps", type=integer(1), metavar="N", help="write a checkpoint every N steps, against power cuts"
    )
    group.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto uses a GPU where there is one")
    group.add_argument(
        "--threads",
        type=integer(1),
        metavar="N",
        help="CPU threads of torch (default: torch's choice; 1 for the digits, whose model is too small for more)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help=f"the base model's dtype; adapters stay in float32 (default: {default.dtype})",
    )


def integer(minimum: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``minimum`` on."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {minimum}")
        return int(text)

    return parse


def number(minimum: float, below: float = math.inf, *, inclusive: bool = False) -> Callable[[str], float]:
    """A parser of numbers above (``inclusive``: from) ``minimum`` and below ``below``."""
    need = f"{'at least' if inclusive else 'above'} {minimum:g}" + (f" and below {below:g}" * (below < math.inf))

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        # `not (a and b)` also catches nan.
        if not ((value >= minimum if inclusive else value > minimum) and value < below):
            raise argparse.ArgumentTypeError(f"{text!r} must be a number {need}")
        return value

    return parse


def _name_or_number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _modules(text: str) -> str | tuple[str, ...]:
    """``all-linear`` and regular expressions stay strings; names become a tuple, which PEFT matches by suffix."""
    names = tuple(name.strip() for name in text.split(","))
    if text != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in names):
        return names
    try:
        re.compile(f"(?:{text})")  # it may become a part of a longer one
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither names nor a regular expression: {error}") from None
    return text
