"""Data sets of dicts, as models take them: images, texts with classes, blocks of text, prompts with responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from goat_kernels.command_errors import CommandError, one_line

#: The label of a token that the loss leaves out, in torch and transformers.
IGNORED = -100


class Tensors(Dataset):
    """Examples in memory: tensors of equal length, under the model's names for them, such as ``labels``."""

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self._tensors.values())))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: tensor[i] for name, tensor in self._tensors.items()}


class Images(Dataset):
    """Images with class ids; ``read`` makes the model's input of an item when it is asked for."""

    def __init__(self, items: Sequence, ids: list[int], read: Callable[[object], Tensor]) -> None:
        self._items, self._ids, self._read = items, ids, read

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> dict:
        item = self._items[i]
        try:
            return {"pixel_values": self._read(item), "labels": self._ids[i]}
        except OSError as error:  # it was there and whole when it was checked
            raise CommandError(f"the image {str(item)!r} can no longer be read: {error}") from None


class Texts(Dataset):
    """Texts, or pairs of texts, with class ids; at most ``max_length`` tokens of each."""

    def __init__(self, items: Sequence[str | tuple[str, str]], ids: list[int], tokenizer, max_length: int) -> None:
        self._items, self._ids, self._tokenizer, self._max_length = items, ids, tokenizer, max_length

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> dict:
        return {**self._encoded(i, truncation=True, max_length=self._max_length), "labels": self._ids[i]}

    def tokens(self, i: int) -> list[int]:
        """All tokens of an example, before truncation."""
        return self._encoded(i, verbose=False)["input_ids"]

    def _encoded(self, i: int, **options) -> dict:
        item = self._items[i]
        return self._tokenizer(*([item] if isinstance(item, str) else item), **options)


class Responses(Dataset):
    """Prompts with their responses, an end-of-text token behind each; the loss is on the response alone.

    What is too long loses the beginning of its prompt, and the end of its response where that alone is too long.

    Raises:
        CommandError: texts without the two columns.
    """

    def __init__(self, argument: str, items: Sequence[tuple[str, str]], tokenizer, max_length: int) -> None:
        if isinstance(items[0], str) or len(items[0]) != 2:
            raise CommandError(f"{argument} needs two columns, a prompt and its response, as --text-column names them")
        self._items, self._tokenizer, self._max_length = items, tokenizer, max_length

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        prompt, response = self._parts(i)
        response = response[: self._max_length - 1]
        prompt = prompt[-(self._max_length - len(response)) :]
        tokens = [*prompt, *response]
        labels = [*[IGNORED] * len(prompt), *response]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}

    def tokens(self, i: int) -> list[int]:
        """All tokens of an example, before truncation."""
        prompt, response = self._parts(i)
        return [*prompt, *response]

    def _parts(self, i: int) -> tuple[list[int], list[int]]:
        """The tokens of a prompt and of its response."""
        prompt, response = self._tokenizer(list(self._items[i]), add_special_tokens=False, verbose=False)["input_ids"]
        if self._tokenizer.bos_token_id is not None:
            prompt = [self._tokenizer.bos_token_id, *prompt]
        if self._tokenizer.eos_token_id is not None:
            response = [*response, self._tokenizer.eos_token_id]
        return prompt, response


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
