"""What the cells of a column mean: texts, chats or classes. Every doubt is an error or a line of warning."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from goat_kernels.command_errors import CommandError

#: What programs write where a number is not known, in lower case.
_MISSING = ("na", "n/a", "nan", "null", "none", "")


#: What no encoding can write: JSON has a character beyond 16 bits as two of these.
_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        source: the option and the file or id, for messages: ``--data 'reviews.csv'``.
        name: the column's.
        values: a cell of each row: a str, or what JSON or a data set on the hub has there; None where it has nothing.
    """

    source: str
    name: str
    values: Sequence

    def texts(self) -> list[str]:
        """The cells as texts.

        Raises:
            CommandError: a cell with nothing in it, or with a list or an object, such as the messages of a chat.
        """
        if any(_is_chat(value) for value in self.values):
            raise CommandError(f"{self._where()} has chat messages, which only --task causal-lm can use, as one column")
        return self._scalars("a text")

    def texts_or_chats(self) -> list[str] | list[list[dict]]:
        """The cells as texts, or all as chats: lists of messages with ``role`` and ``content``, or that list as JSON in
        a string, as a CSV file has it."""
        values = [_parsed_chat(value) for value in self.values]
        rows = [i for i, value in enumerate(values) if not _is_chat(value)]
        if not rows:
            self._check_characters(["".join(str(message["content"]) for message in chat) for chat in values])
            return values
        if len(rows) < len(values):
            raise CommandError(f"{self._where()} has chat messages in some rows and none in {_rows(rows)}")
        return self._scalars("a text")

    def labels(self) -> list[str]:
        """The cells as class names, without the spaces around them.

        Raises:
            CommandError: a cell with nothing in it or with a list or an object; true and false beside other values;
                decimal numbers.
        """
        truths = [i for i, value in enumerate(self.values) if isinstance(value, bool)]
        if truths and len(truths) < len(self.values):
            others = sorted(set(range(len(self.values))) - set(truths))
            raise CommandError(
                f"{self._where()} has true and false in {_rows(truths)} but other values in {_rows(others)}; "
                "a class needs one spelling"
            )
        texts = self._scalars("a class")
        labels = [text.strip() for text in texts]
        changed = sum(text != label for text, label in zip(texts, labels, strict=True))
        if changed:
            print(f"warning: {self._where()} has spaces around the class in {changed} rows; they are left out")
        self._check_numbers(labels)
        self._warn_of_spellings(labels)
        return labels

    def _where(self) -> str:
        return f"{self.source}: column {self.name!r}"

    def _scalars(self, kind: str) -> list[str]:
        empty = [i for i, value in enumerate(self.values) if _is_empty(value)]
        if empty:
            raise CommandError(f"{self.source}: {_rows(empty)} has nothing in column {self.name!r}; it needs {kind}")
        nested = [i for i, value in enumerate(self.values) if not isinstance(value, str | int | float)]
        if nested:
            found = "a list" if isinstance(self.values[nested[0]], list | tuple) else "an object"
            raise CommandError(f"{self.source}: {_rows(nested)} has {found} in column {self.name!r}; it needs {kind}")
        texts = [_plain(value) for value in self.values]
        self._check_characters(texts)
        return texts

    def _check_characters(self, texts: Sequence[str]) -> None:
        halves = [i for i, text in enumerate(texts) if _HALF_CHARACTER.search(text)]
        if halves:
            raise CommandError(
                f"{self.source}: {_rows(halves)} has half a character (such as \\ud83d alone) in column {self.name!r}; "
                "it needs whole ones, as text that is not cut in the middle of one"
            )

    def _check_numbers(self, labels: list[str]) -> None:
        told = [label for label in labels if label.casefold() not in _MISSING]
        numbers = [_number(label) for label in told]
        fractions = [number for number in numbers if number is not None and number % 1]
        # All are numbers, or a stray word is among them.
        if fractions and (None not in numbers or 2 * len(fractions) > len(told)):
            examples = ", ".join(map(str, sorted(set(fractions))[:3]))
            raise CommandError(
                f"{self._where()} has decimal numbers ({examples}, ...): classification "
                "needs classes, and regression is not offered; if they are classes, write them as words"
            )

    def _warn_of_spellings(self, labels: list[str]) -> None:
        spellings = defaultdict(set)
        for label in set(labels):
            number = _number(label)
            spellings[label.casefold() if number is None else number].add(label)
        for names in sorted(sorted(names) for names in spellings.values() if len(names) > 1):
            print(f"warning: {self._where()} has {' and '.join(map(repr, names))}, which count as different classes")


def describe_classes(names: Sequence[str], train: Sequence[int], held_out: Sequence[int]) -> str:
    """One line with the classes and how many examples of each there are, for training and held out.

    Args:
        names: of the classes.
        train, held_out: the class of each example, as an index into ``names``.
    """
    counts, others = Counter(train), Counter(held_out)
    shown = [f"{name:.40}: {counts[i]} + {others[i]}" for i, name in enumerate(names[:20])]
    more = f", and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{len(names)} classes (training + held out): {', '.join(shown)}{more}"


def _is_empty(value: object) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    )


def _parsed_chat(value: object) -> object:
    """The chat that a string has as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        chat = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return chat if _is_chat(chat) else value


def _plain(value: str | int | float) -> str:
    """As text; 1.0 as 1, which JSON does not tell apart."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _number(text: str) -> float | None:
    """The number that ``text`` is, with a point or, as in half of the world, a comma before its fraction."""
    if not re.fullmatch(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?", text):
        return None
    return float(text.replace(",", "."))


def _rows(indices: Sequence[int]) -> str:
    """``row 3``, or ``row 3 (and 12 more rows)``; counted from 1."""
    more = len(indices) - 1
    return f"row {indices[0] + 1}" + (f" (and {more} more row{'s' * (more > 1)})" if more else "")
