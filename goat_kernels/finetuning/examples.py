"""Data sets of dicts, as models take them: images, texts with classes, blocks of text, prompts with responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from goat_kernels.command_errors import CommandError

#: The label of a token that the loss leaves out, in torch and transformers.
IGNORED = -100

#: Texts that are tokenised in one call, where all are.
_CHUNK = 1000


class Selection(Sequence):
    """The items of a sequence at some indices, fetched when asked for."""

    def __init__(self, items: Sequence, indices: list[int]) -> None:
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int):
        return self._items[self._indices[i]]


class Images(Dataset):
    """Images with class ids; ``read`` makes an RGB image of an item, and ``transform`` the model's input of that."""

    def __init__(
        self,
        items: Sequence,
        ids: list[int],
        read: Callable[[object], Image.Image],
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        self._items, self._ids, self._read, self._transform = items, ids, read, transform

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> dict:
        item = self._items[i]
        try:
            image = self._read(item)
        except OSError as error:  # it was there and whole when it was checked
            raise CommandError(f"the image {str(item)!r} can no longer be read: {error}") from None
        return {"pixel_values": self._transform(image), "labels": self._ids[i]}


class Texts(Dataset):
    """Texts, or pairs of texts, with class ids, tokenised when asked for."""

    def __init__(self, items: Sequence[str | tuple[str, str]], ids: list[int], tokenizer, max_length: int) -> None:
        self._items, self._ids, self._tokenizer, self._max_length = items, ids, tokenizer, max_length

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> dict:
        item = self._items[i]
        texts = (item,) if isinstance(item, str) else item
        encoded = self._tokenizer(*texts, truncation=True, max_length=self._max_length)
        return {**encoded, "labels": self._ids[i]}

    def count_cut(self) -> tuple[int, int]:
        """How many are longer than ``max_length``, and the highest token; looks at all, with a progress bar."""
        count = highest = 0
        for start in tqdm(range(0, len(self), _CHUNK), desc="counting tokens", unit_scale=_CHUNK, leave=False):
            items = [self._items[i] for i in range(start, min(start + _CHUNK, len(self)))]
            columns = [items] if isinstance(items[0], str) else [list(column) for column in zip(*items, strict=True)]
            tokens = self._tokenizer(*columns, verbose=False)["input_ids"]
            count += sum(len(ids) > self._max_length for ids in tokens)
            highest = max(highest, *(max(ids, default=0) for ids in tokens))
        return count, highest


class Blocks(Dataset):
    """Blocks of tokens [count, block]; the model shifts the labels itself."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self._tokens[i], "labels": self._tokens[i]}


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

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        prompt, response = self._whole(i)
        response = response[: self._max_length - 1]
        prompt = prompt[-(self._max_length - len(response)) :]
        labels = torch.tensor([*[IGNORED] * len(prompt), *response])
        return {"input_ids": torch.tensor([*prompt, *response]), "labels": labels}

    def count_cut(self) -> tuple[int, int]:
        """How many are longer than ``max_length``, and the highest token; looks at all, with a progress bar."""
        count = highest = 0
        for i in tqdm(range(len(self)), desc="counting tokens", leave=False):
            tokens = [token for part in self._whole(i) for token in part]
            count += len(tokens) > self._max_length
            highest = max(highest, max(tokens, default=0))
        return count, highest

    def _whole(self, i: int) -> tuple[list[int], list[int]]:
        """The tokens of a prompt and of its response."""
        prompt, response = (
            self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in self._items[i]
        )
        if self._tokenizer.bos_token_id is not None:
            prompt = [self._tokenizer.bos_token_id, *prompt]
        if self._tokenizer.eos_token_id is not None:
            response = [*response, self._tokenizer.eos_token_id]
        return prompt, response


class PadRight:
    """Collates token sequences of different lengths."""

    def __init__(self, pad_token_id: int) -> None:
        self._fill = {"input_ids": pad_token_id, "labels": IGNORED, "attention_mask": 0}

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        examples = [{**one, "attention_mask": torch.ones_like(one["input_ids"])} for one in examples]
        return {
            name: nn.utils.rnn.pad_sequence([one[name] for one in examples], batch_first=True, padding_value=fill)
            for name, fill in self._fill.items()
        }


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
            reason = " ".join(str(error).split())
            raise CommandError(
                f"{argument}: row {number} does not fit the tokenizer's chat template ({reason:.200})"
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
