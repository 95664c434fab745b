"""Generation: a small Llama, pretrained here on Python source, goes on to C++ headers or to prose.

Measured are the perplexity on files that neither training saw, and how often a text makes its own continuation likelier
more than it does three others.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
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

from bench.quality.data import Data
from bench.quality.texts import FILES, PARTS, functions, part_of, source_texts
from goat_kernels.finetuning.models import BaseModel, base_model
from goat_kernels.finetuning.options import FinetuneOptions
from goat_kernels.finetuning.pretraining import digest, pretrained
from goat_kernels.finetuning.tasks import pack

#: Files of Python's library, and steps of the pretraining on them.
_PRETRAINING_FILES, _PRETRAINING_STEPS = 500, 800
_LEARNING_RATE = 2e-3

#: Of the Llama.
_SIZES = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 344}
_LAYERS = {"num_hidden_layers": 4, "num_attention_heads": 4}

#: Files that C++ headers are taken from.
_CPP_FILES = 400

#: Tokens in a block, and blocks in each part, at most.
_BLOCK = 128
_BLOCKS = {"train": 800, "validation": 80, "test": 160}

#: The token between texts.
_END = 0

#: A question has this many tokens of text, and of each continuation, and so many continuations to choose from.
_PROMPT, _ANSWER, _CHOICES = 64, 24, 4

#: The prose is that of libraries with long docstrings.
_PROSE_OF = ("scikit-learn", "scipy", "numpy", "matplotlib")


def to_cpp() -> Data:
    """A small Llama pretrained on Python source goes on to C++ headers."""
    return _task((part_of("torch", name), text) for name, text in source_texts("torch", "include/**/*.h", _CPP_FILES))


def to_prose() -> Data:
    """The same Llama goes on to the prose of docstrings."""
    return _task(
        (part_of(function.library, function.file), function.docstring)
        for function in functions(FILES)
        if function.library in _PROSE_OF and len(function.docstring) > 200
    )


@torch.no_grad()
def share_answered(model: nn.Module, questions: Sequence[tuple[Tensor, int]], device: torch.device) -> float:
    """Share of the questions (``Data.questions``) whose own continuation gains the most from the text before it.

    The gain, log p(answer | text) - log p(answer | end of text), does not ask which answer is common by itself.
    """

    def losses(tokens: Tensor, start: int) -> Tensor:
        """-log p of what begins at ``start`` [choices], given what is before."""
        logits = model(input_ids=tokens).logits[:, start - 1 : -1].transpose(1, 2).float()
        return nn.functional.cross_entropy(logits, tokens[:, start:], reduction="none").sum(dim=1)

    right = 0
    for tokens, own in questions:
        tokens = tokens.to(device)
        alone = tokens[:, _PROMPT - 1 :].clone()
        alone[:, 0] = _END
        right += int((losses(alone, 1) - losses(tokens, _PROMPT)).argmax()) == own
    return right / len(questions)


def _task(texts: Iterable[tuple[str, str]]) -> Data:
    """Data of texts, each with its part."""
    folder, found, blocks = _pretrained(), {part: [] for part in PARTS}, {}
    for part, text in texts:
        found[part].append(text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for part, of_part in found.items():
        random.Random(0).shuffle(of_part)
        packed = pack(part, of_part, tokenizer, _BLOCK)
        order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))
        blocks[part] = packed[order[: _BLOCKS[part]]]
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


def _questions(blocks: Tensor) -> list[tuple[Tensor, int]]:
    """One question per block [count, block]; the wrong continuations are the same places of other blocks."""
    rng, questions = random.Random(0), []
    for i in range(len(blocks)):
        choices = [i, *rng.sample([j for j in range(len(blocks)) if j != i], _CHOICES - 1)]
        rng.shuffle(choices)
        prompts = blocks[i, :_PROMPT].expand(len(choices), -1)
        tokens = torch.cat([prompts, blocks[choices, _PROMPT : _PROMPT + _ANSWER]], dim=1)
        questions.append((tokens, choices.index(i)))
    return questions


def _pretrained() -> Path:
    """The folder of the Llama and its tokenizer."""
    source = [text for _, text in source_texts("python", "*.py", _PRETRAINING_FILES)]
    # Byte pairs learned from Python alone; any other text is spelled with them, down to single bytes.
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZES["vocab_size"],
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator(source, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<end>", pad_token="<end>")
    blocks = pack("Python's library", source, tokenizer, _BLOCK)
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": _END}
    return pretrained(
        "python-llama",
        LlamaForCausalLM,
        LlamaConfig(**_SIZES, **_LAYERS, **tokens, max_position_embeddings=_BLOCK, tie_word_embeddings=True),
        StackDataset(input_ids=blocks, labels=blocks),
        FinetuneOptions(max_steps=_PRETRAINING_STEPS, batch_size=16, seed=0),
        _LEARNING_RATE,
        identity={"data": digest(blocks), "steps": _PRETRAINING_STEPS, "learning rate": _LEARNING_RATE},
        beside=tokenizer.save_pretrained,
    )
