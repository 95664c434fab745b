"""Generation: a small Llama, pretrained here on Python source, goes on to C++ headers or to prose.

Measured are the perplexity on files that neither training saw, and how often a text makes its own
continuation likelier more than it does three others (``data.Question``).
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import StackDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from bench.quality.corpora import PARTS, functions, part_of, texts
from bench.quality.data import Data, Question
from goat_kernels.finetuning.models import BaseModel, base_model
from goat_kernels.finetuning.options import FinetuneOptions
from goat_kernels.finetuning.pretraining import digest, pretrained
from goat_kernels.finetuning.tasks import pack

#: Files of Python's library and steps of its pretraining.
_PRETRAINING, _QUICK_PRETRAINING = (500, 800), (4, 2)
_LEARNING_RATE = 2e-3

#: Files that C++ headers are taken from, and of each library whose docstrings are prose.
_CPP_FILES, _PROSE_FILES, _QUICK_FILES = 400, 200, 6

#: Tokens in a block, and blocks in each part, at most.
_BLOCK = 128
_BLOCKS = {"train": 800, "validation": 80, "test": 160}
_QUICK_BLOCKS = 8

#: The token between texts.
_END = 0

#: A question has this many tokens of text, and of each continuation, and so many continuations to choose from.
_PROMPT, _ANSWER, _CHOICES = 64, 24, 4

#: The prose is that of libraries with long docstrings.
_PROSE_OF = ("scikit-learn", "scipy", "numpy", "matplotlib")


def to_cpp(quick: bool) -> Data:
    """From Python to torch's C++ headers."""
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for name, text in texts("torch", "include/**/*.h", _QUICK_FILES if quick else _CPP_FILES):
        parts[part_of("torch", name)].append(text)
    return _task(parts, quick)


def to_prose(quick: bool) -> Data:
    """From Python to the docstrings of four libraries, whole."""
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for function in functions(_QUICK_FILES if quick else _PROSE_FILES):
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


def _task(parts: dict[str, list[str]], quick: bool) -> Data:
    folder = _pretrained(quick)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = {}
    for part, of_part in parts.items():
        random.Random(0).shuffle(of_part)
        packed = pack(part, of_part, tokenizer, _BLOCK)
        order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))
        blocks[part] = packed[order[: _QUICK_BLOCKS if quick else _BLOCKS[part]]]
    # The model shifts the labels itself.
    train, validation, test = (StackDataset(input_ids=of_part, labels=of_part) for of_part in blocks.values())
    return Data(
        lambda seed: train,
        validation,
        test,
        default_data_collator,
        lambda seed: BaseModel(base_model(str(folder), AutoModelForCausalLM, seed, "float32").load, ()),
        digest(*blocks.values()),
        {part: _questions(blocks[part]) for part in ("validation", "test")},
    )


def _questions(blocks: Tensor) -> list[Question]:
    """One question per block [count, block]; the wrong continuations are the same places of other blocks."""
    rng = random.Random(0)
    questions = []
    for i in range(len(blocks)):
        others = rng.sample([j for j in range(len(blocks)) if j != i], min(_CHOICES, len(blocks)) - 1)
        choices = [i, *others]
        rng.shuffle(choices)
        prompts = blocks[i, :_PROMPT].expand(len(choices), -1)
        tokens = torch.cat([prompts, blocks[choices, _PROMPT : _PROMPT + _ANSWER]], dim=1)
        questions.append(Question(tokens, choices.index(i)))
    return questions


def _pretrained(quick: bool) -> Path:
    """The folder of the Llama and its tokenizer."""
    files, steps = _QUICK_PRETRAINING if quick else _PRETRAINING
    vocabulary = 300 if quick else 1024
    source = [text for _, text in texts("python", "*.py", files)]
    # Byte pairs learned from Python alone; any other text is spelled with them, down to single bytes.
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator(source, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<end>", pad_token="<end>")
    blocks = pack("Python's library", source, tokenizer, _BLOCK)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32 if quick else 128,
        intermediate_size=64 if quick else 344,
        num_hidden_layers=1 if quick else 4,
        num_attention_heads=2 if quick else 4,
        max_position_embeddings=_BLOCK,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=_END,
    )
    options = FinetuneOptions(max_steps=steps, batch_size=16, seed=0)
    return pretrained(
        "python-llama",
        LlamaForCausalLM,
        config,
        StackDataset(input_ids=blocks, labels=blocks),
        options,
        _LEARNING_RATE,
        identity={"data": digest(blocks), "steps": steps, "learning rate": _LEARNING_RATE},
        beside=tokenizer.save_pretrained,
    )
