"""The tasks (data, a base model and a metric), and the evaluation of a trained model on the held-out data.

Each task is a function from the options to a :class:`Task`, with an entry in :func:`load_task`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, StackDataset, Subset
from tqdm.auto import tqdm

from goat_kernels.command_errors import CommandError, one_line
from goat_kernels.finetuning import images, pretraining
from goat_kernels.finetuning.data import Examples, describe_classes, read_texts, split
from goat_kernels.finetuning.models import BaseModel, base_model, classifier, load_config, text_limits
from goat_kernels.finetuning.options import FinetuneOptions
from goat_kernels.training import router_statistics

#: The label of a token that the loss leaves out, in torch and transformers.
IGNORED = -100


class Prepared(Dataset):
    """``prepare(item)`` of each item when it is asked for, with its class id as ``labels`` where there are classes."""

    def __init__(self, items: Sequence, prepare: Callable[[object], dict], ids: Sequence[int] | None = None) -> None:
        self._items, self._prepare, self._ids = items, prepare, ids

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> dict:
        example = self._prepare(self._items[i])
        return example if self._ids is None else {**example, "labels": self._ids[i]}


@dataclass(frozen=True)
class Task:
    """Everything that the methods share: data sets of dicts, a pretrained model, and ``accuracy`` or ``perplexity``."""

    description: str  # one line for the report
    train: Dataset
    held_out: Dataset
    collate: Callable[[list[dict]], dict[str, Tensor]]
    base: BaseModel
    metric: str


def load_task(options: FinetuneOptions) -> Task:
    """Read the data and find the model; CommandError where one cannot be used."""
    classification = {"image-classification": _image_classification, "text-classification": _text_classification}
    return {"digits": _digits, "causal-lm": _causal_lm, **classification}[options.task](options)


def _digits(options: FinetuneOptions) -> Task:
    pixels, ids = pretraining.digits_data()
    folder, *halves = pretraining.pretrained_digits(options.device, pretraining.PRETRAINING)
    names = [str(i) for i in range(10)]
    print(describe_classes(names, *(ids[half].tolist() for half in halves)))
    pixels = pretraining.changed_appearance(pixels)
    train, held_out = (StackDataset(pixel_values=pixels[half], labels=ids[half]) for half in halves)
    description = (
        f"digits: ViT pretrained on 0-{pretraining.CLASSES - 1} as they are -> all ten, inverted and rotated; "
        f"{len(train)} images to train on, {len(held_out)} held out"
    )
    base = classifier(str(folder), transformers.AutoModelForImageClassification, options, names)
    return Task(description, train, held_out, transformers.default_data_collator, base, "accuracy")


def _image_classification(options: FinetuneOptions) -> Task:
    config = load_config(options.model, transformers.AutoModelForImageClassification)
    read, extremes = [], {}
    for source in _sources(*images.split_folders(options.data, options.eval_data)):
        examples = images.read_images(*source, options.image_column, options.label_column)
        read.append(images.check_images(*source, examples, options.skip_bad_files, extremes))
    for mode in extremes:
        low, high = images.pixel_range(mode, extremes)
        print(f"{images.UNBOUNDED[mode][0]} pixels are scaled: {low:g} is black, {high:g} is white")
    parts, names = _classified(options, *read)
    pixels = _image_transform(options.model, config)

    def prepare(item) -> dict[str, Tensor]:
        return {"pixel_values": pixels(images.to_rgb(images.open_image(item), extremes))}

    train, held_out = (Prepared(items, prepare, ids) for items, ids in parts)
    base = classifier(options.model, transformers.AutoModelForImageClassification, options, names)
    return Task(_describe(options), train, held_out, transformers.default_data_collator, base, "accuracy")


def _text_classification(options: FinetuneOptions) -> Task:
    auto_class = transformers.AutoModelForSequenceClassification
    tokenizer, positions, rows = _text_model(options, auto_class)
    positions = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
    length = _max_length(options, positions, 1 + tokenizer.num_special_tokens_to_add(pair="," in options.text_column))
    columns = (options.text_column, options.label_column)
    read = [read_texts(*source, *columns) for source in _sources(options.data, options.eval_data)]
    parts, names = _classified(options, *read)
    prepare = partial(encode, tokenizer, truncation=True, max_length=length)
    train, held_out = (Prepared(items, prepare, ids) for items, ids in parts)
    items = [item for items, _ in parts for item in items]
    every = (encode(tokenizer, item, verbose=False)["input_ids"] for item in items)
    highest = _report_cut(every, len(items), length, options)
    padding = tokenizer.pad_token_id
    _check_tokens(options.model, tokenizer, max(highest, padding), rows)
    base = classifier(options.model, auto_class, options, names, pad_token_id=padding)
    return Task(_describe(options), train, held_out, transformers.DataCollatorWithPadding(tokenizer), base, "accuracy")


def _causal_lm(options: FinetuneOptions) -> Task:
    tokenizer, positions, rows = _text_model(options, transformers.AutoModelForCausalLM)
    length = _max_length(options, positions, 2)
    sources = _sources(options.data, options.eval_data)
    items = {source[0]: read_texts(*source, options.text_column, None).items for source in sources}
    if "," in options.text_column:
        for name, pairs in items.items():
            if isinstance(pairs[0], str) or len(pairs[0]) != 2:
                raise CommandError(f"{name} needs two columns, a prompt and its response, as --text-column names them")
        parts = [Prepared(pairs, partial(encode_response, tokenizer, length)) for pairs in items.values()]
        both = (_prompt_and_response(tokenizer, pair) for pairs in items.values() for pair in pairs)
        every = (prompt + response for prompt, response in both)
        highest = max(_report_cut(every, sum(map(len, parts)), length, options), tokenizer.pad_token_id)
        tokenizer.padding_side = "right"
        collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    else:
        chats = {name: not isinstance(those[0], str) for name, those in items.items()}
        if len(set(chats.values())) > 1:
            has = ", ".join(f"{name} has {'chat messages' if chat else 'texts'}" for name, chat in chats.items())
            raise CommandError(f"{has}; both need the same, or the perplexity is not that of the training's format")
        block = min(options.block_size, positions or options.block_size)
        blocks = [
            pack(name, _from_chats(name, those, tokenizer) if chats[name] else those, tokenizer, block)
            for name, those in items.items()
        ]
        parts = [StackDataset(input_ids=tokens, labels=tokens) for tokens in blocks]  # the model shifts the labels
        highest = max(int(tokens.max()) for tokens in blocks)
        collate = transformers.default_data_collator
    _check_tokens(options.model, tokenizer, highest, rows)
    if len(parts) == 1:
        halves = split(len(parts[0]), None, options.eval_fraction, options.seed, "--data")
        parts = [Subset(parts[0], half) for half in halves]
    # A language model's output is no new module, whatever its name.
    base = BaseModel(base_model(options.model, transformers.AutoModelForCausalLM, options.seed, options.dtype).load, ())
    return Task(_describe(options), *parts, collate, base, "perplexity")


def _sources(data: str, eval_data: str | None) -> list[tuple[str, str]]:
    """(option, source) of the options that are given."""
    return [("--data", data)] + ([("--eval-data", eval_data)] if eval_data is not None else [])


def _describe(options: FinetuneOptions) -> str:
    return f"{options.task}: {options.model} on {options.data}"


def _classified(
    options: FinetuneOptions, examples: Examples, held_out: Examples | None = None
) -> tuple[list[tuple[Sequence, list[int]]], list[str]]:
    """[(items, class ids) for training, the same for held out], and the class names; prints how many of each."""
    names = sorted(set(examples.labels))
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        names.sort(key=int)
    if len(names) < 2:
        raise CommandError(f"--data has one class, {names[0]!r:.80}; classification needs at least two")
    index = {name: i for i, name in enumerate(names)}
    ids = [index[label] for label in examples.labels]
    if held_out is not None:
        if unknown := sorted(set(held_out.labels) - index.keys()):
            raise CommandError(
                f"--eval-data has the classes {unknown[:5]}, which the training data lacks: {names[:20]}"
            )
        parts = [(examples.items, ids), (held_out.items, [index[label] for label in held_out.labels])]
    else:
        halves = split(len(ids), ids, options.eval_fraction, options.seed, "--data")
        parts = [(Subset(examples.items, half), [ids[i] for i in half]) for half in halves]
    print(describe_classes(names, *(ids for _, ids in parts)))
    return parts, names


# --- texts --------------------------------------------------------------------------------------------------------

#: A folder with a tokenizer has at least one of these.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")


def _text_model(options: FinetuneOptions, auto_class) -> tuple:
    """The tokenizer of --model, and its :func:`text_limits`."""
    source = options.model
    config = load_config(source, auto_class)
    path = Path(source).expanduser()
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES):
        # transformers would make one from the model's type, without any words.
        raise CommandError(
            f"--model {source!r} has no tokenizer; it needs one of the files {', '.join(_TOKENIZER_FILES)}"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CommandError(f"--model {source!r} has no tokenizer that could be loaded ({one_line(error)})") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CommandError(f"--model {source!r} has a tokenizer with neither a pad nor an eos token; it needs one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, *text_limits(config, auto_class)


def _max_length(options: FinetuneOptions, positions: int | None, least: int) -> int:
    if options.max_length < least:
        raise CommandError(f"--max-length {options.max_length} leaves no room for a text; it needs at least {least}")
    return min(options.max_length, positions or options.max_length)


def _report_cut(every: Iterable[list[int]], count: int, length: int, options: FinetuneOptions) -> int:
    """Print how many of ``count`` texts, given as tokens, are too long; returns the highest token id of all."""
    cut, highest = 0, 0
    for tokens in tqdm(every, desc="counting tokens", total=count, leave=False):
        cut += len(tokens) > length
        highest = max(highest, *tokens, 0)
    if cut:
        reason = f"--max-length {length}" if length == options.max_length else "the model takes no more"
        print(f"{cut} of {count} texts are cut to {length} tokens ({reason})")
    return highest


def _check_tokens(source: str, tokenizer, highest: int, rows: int | None) -> None:
    """Raise CommandError where the embedding has no row for a token of the data, or for the padding."""
    if rows is not None and highest >= rows:
        raise CommandError(
            f"--model {source!r}: its embedding has {rows} rows, none for token {highest} of its tokenizer, "
            f"{tokenizer.convert_ids_to_tokens(highest)!r}, which the data needs; it needs its own tokenizer, or "
            "model.resize_token_embeddings(len(tokenizer)) and save_pretrained"
        )


def encode(tokenizer, item: str | tuple[str, str], **options) -> dict:
    """A text, or a pair of texts, in tokens."""
    return tokenizer(*([item] if isinstance(item, str) else item), **options)


def _prompt_and_response(tokenizer, pair: tuple[str, str]) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of its response, which ends with the end-of-text token."""
    prompt, response = tokenizer(list(pair), add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        prompt = [tokenizer.bos_token_id, *prompt]
    if tokenizer.eos_token_id is not None:
        response = [*response, tokenizer.eos_token_id]
    return prompt, response


def encode_response(tokenizer, max_length: int, pair: tuple[str, str]) -> dict[str, list[int]]:
    """A prompt with its response; the loss is on the response alone.

    What is too long loses the beginning of its prompt, and the end of its response where that alone is too long.
    """
    prompt, response = _prompt_and_response(tokenizer, pair)
    response = response[: max_length - 1]
    prompt = prompt[-(max_length - len(response)) :]
    tokens = [*prompt, *response]
    labels = [*[IGNORED] * len(prompt), *response]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def _from_chats(argument: str, chats: Sequence[list[dict]], tokenizer) -> list[str]:
    """Each chat as one text, by the tokenizer's chat template.

    Raises:
        CommandError: a tokenizer without a template, or a chat that the template refuses.
    """
    if not tokenizer.chat_template:
        raise CommandError(
            f"{argument} has chat messages, and the tokenizer of --model has no chat template; it needs a model for "
            "chats, or texts"
        )
    texts = []
    for number, chat in enumerate(chats, start=1):
        try:
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False))
        except Exception as error:  # a template raises what it likes
            raise CommandError(
                f"{argument}: row {number} does not fit the tokenizer's chat template ({one_line(error)})"
            ) from None
    return texts


def pack(argument: str, texts: Sequence[str], tokenizer, block: int) -> Tensor:
    """All texts one after the other, an end-of-text token behind each, cut into blocks [count, block]."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens: list[int] = []
    for text in texts:
        # A whole book is one text here, so the tokenizer's warning about its length means nothing.
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
    count = len(tokens) // block
    if count == 0:
        raise CommandError(
            f"{argument} has {len(tokens)} tokens, less than one block of {block}; "
            "it needs more text, or a smaller --block-size"
        )
    return torch.tensor(tokens[: count * block]).reshape(count, block)


# --- images -------------------------------------------------------------------------------------------------------


def _image_transform(source: str, config) -> Callable[[Image.Image], Tensor]:
    """RGB image -> pixel values [C, H, W], by the model's own processor where it has one."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(source)
    except (OSError, ImportError) as error:
        bare = Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").exists()
        if isinstance(error, ImportError) and not bare:
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


# --- evaluation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batch_size: int, device: torch.device, description: str) -> dict:
    """Measure ``model`` on the held-out data; returns the evaluation's fields of a row (``results``)."""
    model.eval()
    accuracy = task.metric == "accuracy"
    scores: list[Tensor] = []
    load: dict[str, Tensor | float] = defaultdict(float)
    loader = DataLoader(task.held_out, batch_size=batch_size, collate_fn=task.collate)
    for batch in tqdm(loader, desc=description, unit="batch", leave=False):
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits
        if accuracy:
            score = (logits.argmax(dim=-1) == labels) & ~logits.isnan().any(dim=-1)
        else:  # the mean loss of each sequence over the tokens that have one, in float32
            shifted, labels = logits[:, :-1].float().transpose(1, 2), labels[:, 1:]
            losses = nn.functional.cross_entropy(shifted, labels, reduction="none")
            score = losses.sum(dim=1) / (labels != IGNORED).sum(dim=1)
        scores.append(score.cpu())
        for name, layer in router_statistics(model).items():
            load[name] += torch.tensor(layer.load) * len(labels)
    score = torch.cat(scores).double()
    count, held_out = len(score), score.mean().item()
    if accuracy:
        error = math.sqrt(held_out * (1 - held_out) / count)
    else:
        held_out = score.mean().exp().item()
        error = held_out * score.std().item() / math.sqrt(count) if count > 1 else None  # d exp(m) = exp(m) dm
    return {
        "metric": task.metric,
        "held_out": held_out,
        "held_out_standard_error": error,
        "held_out_examples": count,
        "load_by_layer": {name: (total / count).tolist() for name, total in load.items()},
    }
