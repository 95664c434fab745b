"""Generation: a small Llama, pretrained here on Python source, goes on to C++ headers or to prose.

Measured are the perplexity on files that neither training saw, and how often a text makes its own
continuation likelier more than it does three others (``Question``).
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from bench.quality.corpora import cpp_files, functions, part_of, python_files
from goat_kernels.finetuning.examples import Tensors, pack
from goat_kernels.finetuning.models import BaseModel, base_model
from goat_kernels.finetuning.options import FinetuneOptions
from goat_kernels.finetuning.pretraining import digest, pretrained


@dataclass(frozen=True)
class Pretraining:
    """The Llama and how it is pretrained; part of the cache's key."""

    vocabulary: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 344
    layers: int = 4
    heads: int = 4
    block: int = 128
    files: int = 500
    learning_rate: float = 2e-3
    batch_size: int = 16
    steps: int = 800
    seed: int = 0


_FULL = Pretraining()
_QUICK = Pretraining(vocabulary=300, hidden_size=32, intermediate_size=64, layers=1, heads=2, files=4, steps=2)

_FILES, _QUICK_FILES = 400, 6
_FUNCTION_FILES, _QUICK_FUNCTION_FILES = 200, 6

#: Blocks of tokens in each part, at most.
_BLOCKS = {"train": 800, "validation": 80, "test": 160}
_QUICK_BLOCKS = 8

#: The token between texts.
_END = 0

#: A question has this many tokens of text, and of each continuation, and so many continuations to choose from.
_PROMPT, _ANSWER, _CHOICES = 64, 24, 4

#: The prose is that of libraries with long docstrings.
_PROSE_OF = ("scikit-learn", "scipy", "numpy", "matplotlib")


@dataclass(frozen=True)
class Question:
    """A text and continuations of equal length, of which ``right`` is its own and the others come from other places.

    Attributes:
        tokens: [choices, prompt + answer].
        right: index of the text's own.
    """

    tokens: Tensor
    right: int


def to_cpp(quick: bool) -> dict[str, object]:
    """From Python to torch's C++ headers."""
    files = cpp_files(_QUICK_FILES if quick else _FILES)
    parts: dict[str, list[str]] = {part: [] for part in _BLOCKS}
    for name, text in files.items():
        parts[part_of("torch", name)].append(text)
    return _task(parts, quick)


def to_prose(quick: bool) -> dict[str, object]:
    """From Python to the docstrings of four libraries, whole."""
    parts: dict[str, list[str]] = {part: [] for part in _BLOCKS}
    for function in functions(_QUICK_FUNCTION_FILES if quick else _FUNCTION_FILES):
        if function.library in _PROSE_OF and len(function.docstring) > 200:
            parts[part_of(function.library, function.file)].append(function.docstring)
    return _task(parts, quick)


@torch.no_grad()
def share_answered(model: nn.Module, questions: list[Question], device: torch.device) -> float:
    """Share of the questions whose own continuation gains the most likelihood from the text before it.

    The gain, log p(answer | text) - log p(answer | end of text), does not ask which answer is common by itself.
    """
    right = 0
    for question in questions:
        tokens = question.tokens.to(device)
        alone = tokens[:, _PROMPT - 1 :].clone()
        alone[:, 0] = _END
        gains = _answer_losses(model, alone, 1) - _answer_losses(model, tokens, _PROMPT)
        right += int(gains.argmax()) == question.right
    return right / len(questions)


def _answer_losses(model: nn.Module, tokens: Tensor, start: int) -> Tensor:
    """-log p of what begins at ``start`` [choices], given what is before."""
    logits = model(input_ids=tokens).logits[:, start - 1 : -1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2).float(), tokens[:, start:], reduction="none")
    return losses.sum(dim=1)


def _task(parts: dict[str, list[str]], quick: bool) -> dict[str, object]:
    pretraining = _QUICK if quick else _FULL
    folder = _pretrained(pretraining)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = {}
    for part, texts in parts.items():
        random.Random(0).shuffle(texts)
        packed = pack(part, texts, tokenizer, pretraining.block)
        order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))
        blocks[part] = packed[order[: _QUICK_BLOCKS if quick else _BLOCKS[part]]]
    train = _examples(blocks["train"])

    def base(seed: int) -> BaseModel:
        return BaseModel(base_model(str(folder), AutoModelForCausalLM, seed, "float32").load, ())

    return {
        "training": lambda seed: train,
        "validation": _examples(blocks["validation"]),
        "test": _examples(blocks["test"]),
        "collate": default_data_collator,
        "base": base,
        "digest": digest(*blocks.values()),
        "questions": tuple(_questions(blocks[part]) for part in ("validation", "test")),
    }


def _examples(blocks: Tensor) -> Tensors:
    return Tensors(input_ids=blocks, labels=blocks)  # the model shifts the labels itself


def _questions(blocks: Tensor) -> list[Question]:
    """One question per block [count, block]; the wrong continuations are the same places of other blocks."""
    rng = random.Random(0)
    questions = []
    for i in range(len(blocks)):
        others = rng.sample([j for j in range(len(blocks)) if j != i], min(_CHOICES, len(blocks)) - 1)
        choices = [i, *others]
        rng.shuffle(choices)
        tokens = torch.stack(
            [torch.cat([blocks[i, :_PROMPT], blocks[j, _PROMPT : _PROMPT + _ANSWER]]) for j in choices]
        )
        questions.append(Question(tokens, choices.index(i)))
    return questions


def _pretrained(pretraining: Pretraining) -> Path:
    texts = list(python_files(pretraining.files).values())
    tokenizer = _tokenizer(texts, pretraining.vocabulary)
    blocks = pack("Python's library", texts, tokenizer, pretraining.block)
    config = LlamaConfig(
        vocab_size=pretraining.vocabulary,
        hidden_size=pretraining.hidden_size,
        intermediate_size=pretraining.intermediate_size,
        num_hidden_layers=pretraining.layers,
        num_attention_heads=pretraining.heads,
        num_key_value_heads=pretraining.heads,
        max_position_embeddings=pretraining.block,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=_END,
    )

    options = FinetuneOptions(max_steps=pretraining.steps, batch_size=pretraining.batch_size, seed=pretraining.seed)
    return pretrained(
        "python-llama",
        LlamaForCausalLM,
        config,
        _examples(blocks),
        options,
        pretraining.learning_rate,
        identity={"data": digest(blocks), "pretraining": asdict(pretraining)},
        beside=tokenizer.save_pretrained,
    )


def _tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte pairs learned from Python alone; any other text is spelled with them, down to single bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
