"""The tasks by name: each is a function from the options to a :class:`Task`, with an entry in :func:`load_task`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    default_data_collator,
)

from goat_kernels.command_errors import CommandError, one_line
from goat_kernels.finetuning.data import Examples, class_ids, class_names, describe_classes, split
from goat_kernels.finetuning.demo import digits_task
from goat_kernels.finetuning.examples import Images, Responses, Tensors, Texts, from_chats, pack
from goat_kernels.finetuning.images import (
    check_images,
    describe_ranges,
    merged,
    open_image,
    read_images,
    split_folders,
    to_rgb,
)
from goat_kernels.finetuning.models import BaseModel, base_model, classifier, load_config, text_limits
from goat_kernels.finetuning.options import FinetuneOptions
from goat_kernels.finetuning.task import Task
from goat_kernels.finetuning.texts import read_texts


def load_task(options: FinetuneOptions) -> Task:
    """Read the data and find the model.

    Raises:
        CommandError: the model or the data cannot be used.
    """
    return {
        "digits": digits_task,
        "image-classification": _image_classification,
        "text-classification": _text_classification,
        "causal-lm": _causal_lm,
    }[options.task](options)


def _image_classification(options: FinetuneOptions) -> Task:
    config = load_config(options.model, AutoModelForImageClassification)
    read, extremes = [], {}
    for argument, source in _sources(*split_folders(options.data, options.eval_data)).items():
        examples = read_images(argument, source, options.image_column, options.label_column)
        examples, found = check_images(argument, source, examples, options.skip_bad_files)
        read.append(examples)
        extremes = merged(extremes, found)
    for line in describe_ranges(extremes):
        print(line)
    parts, names = _classified(options, *read)
    pixels = _image_transform(options.model, config)
    train, held_out = (
        Images(items, ids, lambda item: pixels(to_rgb(open_image(item), extremes))) for items, ids in parts
    )
    base = classifier(options.model, AutoModelForImageClassification, options, names)
    return Task(_describe(options), train, held_out, default_data_collator, base, "accuracy")


def _text_classification(options: FinetuneOptions) -> Task:
    config = load_config(options.model, AutoModelForSequenceClassification)
    tokenizer = _tokenizer(options.model)
    positions, rows = text_limits(config, AutoModelForSequenceClassification)
    positions = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair="," in options.text_column)
    length = _max_length(options, positions, 1 + special)
    parts, names = _classified(
        options,
        *(
            read_texts(argument, source, options.text_column, options.label_column)
            for argument, source in _sources(options.data, options.eval_data).items()
        ),
    )
    train, held_out = (Texts(items, ids, tokenizer, length) for items, ids in parts)
    highest = _report_cut([train, held_out], length, options)
    _check_tokens(options.model, tokenizer, max(highest, tokenizer.pad_token_id), rows)
    base = classifier(
        options.model, AutoModelForSequenceClassification, options, names, pad_token_id=tokenizer.pad_token_id
    )
    return Task(_describe(options), train, held_out, DataCollatorWithPadding(tokenizer), base, "accuracy")


def _causal_lm(options: FinetuneOptions) -> Task:
    config = load_config(options.model, AutoModelForCausalLM)
    tokenizer = _tokenizer(options.model)
    positions, rows = text_limits(config, AutoModelForCausalLM)
    length = _max_length(options, positions, 2)
    items = {
        argument: read_texts(argument, source, options.text_column, None).items
        for argument, source in _sources(options.data, options.eval_data).items()
    }
    if "," in options.text_column:
        parts = [Responses(argument, pairs, tokenizer, length) for argument, pairs in items.items()]
        highest = max(_report_cut(parts, length, options), tokenizer.pad_token_id)
        tokenizer.padding_side = "right"
        collate = DataCollatorForSeq2Seq(tokenizer)
    else:
        kinds = {name: "texts" if isinstance(those[0], str) else "chat messages" for name, those in items.items()}
        if len(set(kinds.values())) > 1:
            has = ", ".join(f"{argument} has {kind}" for argument, kind in kinds.items())
            raise CommandError(f"{has}; both need the same, or the perplexity is not that of the training's format")
        block = min(options.block_size, positions or options.block_size)
        blocks = [
            pack(name, those if kinds[name] == "texts" else from_chats(name, those, tokenizer), tokenizer, block)
            for name, those in items.items()
        ]
        parts = [Tensors(input_ids=tokens, labels=tokens) for tokens in blocks]  # the model shifts the labels itself
        highest = max(int(tokens.max()) for tokens in blocks)
        collate = default_data_collator
    _check_tokens(options.model, tokenizer, highest, rows)
    if len(parts) == 1:
        halves = split(len(parts[0]), None, options.eval_fraction, options.seed, "--data")
        parts = [Subset(parts[0], half) for half in halves]
    # A language model's output is no new module, whatever its name.
    base = BaseModel(base_model(options.model, AutoModelForCausalLM, options.seed, options.dtype).load, ())
    return Task(_describe(options), *parts, collate, base, "perplexity")


def _sources(data: str, eval_data: str | None) -> dict[str, str]:
    """Option -> source, of what is given."""
    return {"--data": data} | ({"--eval-data": eval_data} if eval_data is not None else {})


def _describe(options: FinetuneOptions) -> str:
    return f"{options.task}: {options.model} on {options.data}"


def _classified(
    options: FinetuneOptions, examples: Examples, held_out: Examples | None = None
) -> tuple[list[tuple[Sequence, list[int]]], list[str]]:
    """[(items, class ids) for training, the same for held out], and the class names; prints how many of each."""
    names = class_names("--data", examples.labels)
    ids = class_ids("--data", examples.labels, names)
    if held_out is not None:
        parts = [(examples.items, ids), (held_out.items, class_ids("--eval-data", held_out.labels, names))]
    else:
        halves = split(len(ids), ids, options.eval_fraction, options.seed, "--data")
        parts = [(Subset(examples.items, half), [ids[i] for i in half]) for half in halves]
    print(describe_classes(names, *(ids for _, ids in parts)))
    return parts, names


# --- texts --------------------------------------------------------------------------------------------------------

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
        raise CommandError(f"--model {source!r} has no tokenizer that could be loaded ({one_line(error)})") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CommandError(f"--model {source!r} has a tokenizer with neither a pad nor an eos token; it needs one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _max_length(options: FinetuneOptions, positions: int | None, least: int) -> int:
    if options.max_length < least:
        raise CommandError(f"--max-length {options.max_length} leaves no room for a text; it needs at least {least}")
    return min(options.max_length, positions or options.max_length)


def _report_cut(parts: list[Texts] | list[Responses], length: int, options: FinetuneOptions) -> int:
    """Say how many texts do not fit; the highest token of all."""
    counts, highest = zip(*(part.count_cut() for part in parts), strict=True)
    if cut := sum(counts):
        reason = f"--max-length {length}" if length == options.max_length else "the model takes no more"
        print(f"{cut} of {sum(map(len, parts))} texts are cut to {length} tokens ({reason})")
    return max(highest)


def _check_tokens(source: str, tokenizer, highest: int, rows: int | None) -> None:
    """Raise CommandError where the embedding has no row for a token of the data, or for the padding."""
    if rows is not None and highest >= rows:
        raise CommandError(
            f"--model {source!r}: its embedding has {rows} rows, none for token {highest} of its tokenizer, "
            f"{tokenizer.convert_ids_to_tokens(highest)!r}, which the data needs; it needs its own tokenizer, or "
            "model.resize_token_embeddings(len(tokenizer)) and save_pretrained"
        )


# --- images -------------------------------------------------------------------------------------------------------


def _image_transform(source: str, config) -> Callable[[Image.Image], Tensor]:
    """RGB image -> pixel values [C, H, W], by the model's own processor where it has one."""
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
    else:
        return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]
    vision = getattr(config, "vision_config", config)  # models of text and images keep a part for each
    channels, size = getattr(vision, "num_channels", 3), getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    print(f"{source} has no image processor: images are resized to {height}x{width} and scaled to -1..1")

    def scaled(image: Image.Image) -> Tensor:
        image = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).reshape(height, width, channels)
        return pixels.permute(2, 0, 1) / 127.5 - 1

    return scaled
