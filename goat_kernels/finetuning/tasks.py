"""A task as the command sees it: data sets, how they are batched, the base model, and what is measured.

One function per ``--task``; :func:`load_task` picks it. The digits are in ``demo.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    default_data_collator,
)

from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning.columns import describe_classes
from goat_kernels.finetuning.data import Examples, class_ids, class_names, read_texts, split
from goat_kernels.finetuning.examples import Blocks, Images, PadRight, Responses, Selection, Texts, from_chats, pack
from goat_kernels.finetuning.image_folders import read_images, split_folders
from goat_kernels.finetuning.images import check_images, describe_ranges, merged, reader
from goat_kernels.finetuning.models import BaseModel, base_model, load_config, text_limits
from goat_kernels.finetuning.options import DataOptions, FinetuneOptions


@dataclass(frozen=True)
class Task:
    """Everything that the methods share.

    Attributes:
        description: one line for the report.
        train: data set of dicts, for training.
        held_out: the same, for measuring.
        collate: list of dicts -> batch.
        base: the pretrained model.
        metric: ``"accuracy"`` or ``"perplexity"``.
        classes: class names; empty where there are none.
    """

    description: str
    train: Dataset
    held_out: Dataset
    collate: Callable[[list[dict]], dict[str, Tensor]]
    base: BaseModel
    metric: str
    classes: tuple[str, ...] = ()


def load_task(options: FinetuneOptions) -> Task:
    """Read the data and find the model.

    Raises:
        CommandError: the model or the data cannot be used.
    """
    if options.task == "digits":
        from goat_kernels.finetuning.demo import digits_task

        return digits_task(options)
    return {
        "image-classification": _image_classification,
        "text-classification": _text_classification,
        "causal-lm": _causal_lm,
    }[options.task](options)


def _image_classification(options: FinetuneOptions) -> Task:
    data = options.data
    config = load_config(data.model, AutoModelForImageClassification)

    sources = split_folders(data.data, data.eval_data)
    read, extremes = [], {}
    for argument, source in zip(("--data", "--eval-data"), sources, strict=True):
        if source is not None:
            examples = read_images(argument, source, data.image_column, data.label_column)
            examples, found = check_images(argument, source, examples, data.skip_bad_files)
            read.append(examples)
            extremes = merged(extremes, found)
    print(*describe_ranges(extremes), sep="\n", end="\n" * bool(extremes))
    parts, names = _classified(options, *read)
    transform = _image_transform(data.model, config)
    train, held_out = (Images(part, ids, reader(extremes), transform) for part, ids in parts)
    base = _classifier(options, AutoModelForImageClassification, names)
    return Task(_describe(options), train, held_out, default_data_collator, base, "accuracy", tuple(names))


def _text_classification(options: FinetuneOptions) -> Task:
    data = options.data
    config = load_config(data.model, AutoModelForSequenceClassification)
    tokenizer = _tokenizer(data.model)
    positions, rows = text_limits(config, AutoModelForSequenceClassification)
    positions = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
    length = _max_length(data, positions, 1 + tokenizer.num_special_tokens_to_add(pair="," in data.text_column))
    parts, names = _classified(
        options,
        *(
            read_texts(argument, source, data.text_column, data.label_column)
            for argument, source in (("--data", data.data), ("--eval-data", data.eval_data))
            if source is not None
        ),
    )
    train, held_out = (Texts(part, ids, tokenizer, length) for part, ids in parts)
    highest = _report_cut([train, held_out], length, data)
    _check_tokens(data.model, tokenizer, max(highest, tokenizer.pad_token_id), rows)
    base = _classifier(options, AutoModelForSequenceClassification, names, pad_token_id=tokenizer.pad_token_id)
    collate = DataCollatorWithPadding(tokenizer)
    return Task(_describe(options), train, held_out, collate, base, "accuracy", tuple(names))


def _causal_lm(options: FinetuneOptions) -> Task:
    data = options.data
    config = load_config(data.model, AutoModelForCausalLM)
    tokenizer = _tokenizer(data.model)
    positions, rows = text_limits(config, AutoModelForCausalLM)
    prompted = "," in data.text_column
    length = _max_length(data, positions, 2)

    def read(argument: str, items: Sequence) -> Tensor | Responses:
        if prompted:
            return Responses(argument, items, tokenizer, length)
        if not isinstance(items[0], str):
            items = from_chats(argument, items, tokenizer)
        return pack(argument, items, tokenizer, min(data.block_size, positions or data.block_size))

    items = {
        argument: read_texts(argument, source, data.text_column, None).items
        for argument, source in (("--data", data.data), ("--eval-data", data.eval_data))
        if source is not None
    }
    kinds = {argument: "texts" if isinstance(those[0], str) else "chat messages" for argument, those in items.items()}
    if not prompted and len(set(kinds.values())) > 1:
        has = ", ".join(f"{argument} has {kind}" for argument, kind in kinds.items())
        raise CommandError(f"{has}; both need the same, or the perplexity is not that of the training's format")
    whole = read("--data", items["--data"])
    if data.eval_data is not None:
        train, held_out = whole, read("--eval-data", items["--eval-data"])
    every = [whole] if data.eval_data is None else [train, held_out]
    if prompted:
        highest = max(_report_cut(every, length, data), tokenizer.pad_token_id)
    else:
        highest = max(int(blocks.max()) for blocks in every)
    _check_tokens(data.model, tokenizer, highest, rows)
    if data.eval_data is None:
        parts = split(len(whole), None, data.eval_fraction, options.training.seed, "--data")
        train, held_out = (Subset(whole, part) if prompted else whole[part] for part in parts)
    base = base_model(data.model, AutoModelForCausalLM, options.training.seed, options.training.dtype)
    base = BaseModel(base.load, ())
    if prompted:
        collate = PadRight(tokenizer.pad_token_id)
        return Task(_describe(options), train, held_out, collate, base, "perplexity")
    return Task(_describe(options), Blocks(train), Blocks(held_out), default_data_collator, base, "perplexity")


def _describe(options: FinetuneOptions) -> str:
    return f"{options.task}: {options.data.model} on {options.data.data}"


def _check_tokens(source: str, tokenizer, highest: int, rows: int | None) -> None:
    """Raise CommandError where the embedding has no row for a token of the data, or for the padding."""
    if rows is not None and highest >= rows:
        raise CommandError(
            f"--model {source!r}: its embedding has {rows} rows, none for token {highest} of its tokenizer, "
            f"{tokenizer.convert_ids_to_tokens(highest)!r}, which the data needs; it needs its own tokenizer, or "
            "model.resize_token_embeddings(len(tokenizer)) and save_pretrained"
        )


def _max_length(data: DataOptions, positions: int | None, least: int) -> int:
    if data.max_length < least:
        raise CommandError(f"--max-length {data.max_length} leaves no room for a text; it needs at least {least}")
    return min(data.max_length, positions or data.max_length)


def _report_cut(parts: list[Texts] | list[Responses], length: int, data: DataOptions) -> int:
    """Say how many texts do not fit; the highest token of all."""
    counts, highest = zip(*(part.count_cut() for part in parts), strict=True)
    cut = sum(counts)
    if cut:
        reason = f"--max-length {length}" if length == data.max_length else "the model takes no more"
        print(f"{cut} of {sum(map(len, parts))} texts are cut to {length} tokens ({reason})")
    return max(highest)


def _classified(
    options: FinetuneOptions, examples: Examples, held_out: Examples | None = None
) -> tuple[list[tuple[Sequence, list[int]]], list[str]]:
    """[(items, class ids) for training, the same for held out], and the class names; prints how many of each."""
    data = options.data
    names = class_names("--data", examples.labels)
    ids = class_ids("--data", examples.labels, names)
    if held_out is not None:
        parts = [(examples.items, ids), (held_out.items, class_ids("--eval-data", held_out.labels, names))]
    else:
        halves = split(len(ids), ids, data.eval_fraction, options.training.seed, "--data")
        parts = [(Selection(examples.items, half), [ids[i] for i in half]) for half in halves]
    print(describe_classes(names, *(ids for _, ids in parts)))
    return parts, names


def _classifier(options: FinetuneOptions, auto_class, names: list[str], **config_changes) -> BaseModel:
    return base_model(
        options.data.model,
        auto_class,
        options.training.seed,
        options.training.dtype,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        **config_changes,
    )


#: A folder with a tokenizer has at least one of these.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")


def _tokenizer(source: str):
    path = Path(source).expanduser()
    if path.is_dir() and not any(True for pattern in _TOKENIZER_FILES for _ in path.glob(pattern)):
        # transformers would make one from the model's type, without any words.
        raise CommandError(
            f"--model {source!r} has no tokenizer; it needs one of the files {', '.join(_TOKENIZER_FILES)}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"--model {source!r} has no tokenizer that could be loaded ({reason:.200})") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CommandError(f"--model {source!r} has a tokenizer with neither a pad nor an eos token; it needs one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _image_transform(source: str, config) -> Callable[[Image.Image], Tensor]:
    """PIL image -> pixel values [C, H, W], by the model's own processor where it has one."""
    try:
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ImportError) as error:
        folder = Path(source)
        if isinstance(error, ImportError) and not (
            folder.is_dir() and not (folder / "preprocessor_config.json").exists()
        ):
            raise CommandError(
                f"--model {source}: this version of transformers prepares images with torchvision alone; install "
                "torchvision, or a newer transformers"
            ) from error
        vision = getattr(config, "vision_config", config)  # models of text and images keep a part for each
        channels = getattr(vision, "num_channels", 3)
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        print(f"{source} has no image processor: images are resized to {height}x{width} and scaled to -1..1")
        return lambda image: _scaled_pixels(image, channels, height, width)

    def process(image: Image.Image) -> Tensor:
        return processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    return process


def _scaled_pixels(image: Image.Image, channels: int, height: int, width: int) -> Tensor:
    resized = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32)).reshape(height, width, channels)
    return pixels.permute(2, 0, 1) / 127.5 - 1
