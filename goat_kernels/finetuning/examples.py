"""Examples as models take them: texts with classes, blocks of text, prompts with responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from goat_kernels.command_errors import CommandError, one_line

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


def encode(tokenizer, item: str | tuple[str, str], **options) -> dict:
    """A text, or a pair of texts, in tokens."""
    return tokenizer(*([item] if isinstance(item, str) else item), **options)


def prompt_and_response(tokenizer, pair: tuple[str, str]) -> tuple[list[int], list[int]]:
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
    prompt, response = prompt_and_response(tokenizer, pair)
    response = response[: max_length - 1]
    prompt = prompt[-(max_length - len(response)) :]
    tokens = [*prompt, *response]
    labels = [*[IGNORED] * len(prompt), *response]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def from_chats(argument: str, chats: Sequence[list[dict]], tokenizer) -> list[str]:
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
