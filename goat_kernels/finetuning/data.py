"""Where data comes from (files, tables, a data set on the hub), its texts and classes, and which part is held out.

Every doubt about a cell is an error that names its row, or a line of warning. The files are read here and not by the
``datasets`` library, which takes ``NA`` for nothing and ``01`` for 1, and does not say what is wrong in which row.
"""

from __future__ import annotations

import csv
import io
import json
import operator
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from goat_kernels.command_errors import CommandError, one_line

#: Suffixes of tables, in lower case: with separators, and of JSON.
SEPARATED_SUFFIXES, JSON_SUFFIXES = (".csv", ".tsv"), (".json", ".jsonl", ".ndjson")

#: ID[:CONFIG][@SPLIT] of a data set on the hub.
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")

#: The largest cell of a table that fits a C long everywhere; csv's own limit is 131,072 characters.
_CELL_LIMIT = 2**31 - 1

#: What programs write where a number is not known, in lower case.
_MISSING = ("na", "n/a", "nan", "null", "none", "")

#: Classes that the line about them names, at most.
_NAMED_CLASSES = 20


class Examples(NamedTuple):
    """Inputs (texts, pairs of texts, chats, image files or images), with the class names where there are classes."""

    items: Sequence
    labels: Sequence[str] | None = None


# --- files and folders --------------------------------------------------------------------------------------------


def looks_like_path(text: str) -> bool:
    """Whether ``text`` can only mean a local path: it exists, or no id on the hub is written like that."""
    path = Path(text).expanduser()
    if path.exists() or path.suffix.lower() in (*SEPARATED_SUFFIXES, *JSON_SUFFIXES, ".txt"):
        return True
    return text.startswith((".", "~", "/")) or _HUB_ID.fullmatch(text) is None


def local_path(argument: str, text: str, needs: str) -> Path:
    """The existing path that ``text`` names; ``argument`` and ``needs`` are for the message where it does not exist."""
    path = Path(text).expanduser()
    if not path.exists():
        raise CommandError(f"{argument} {text!r} does not exist; it needs {needs}")
    return path


def files_in(folder: Path) -> list[Path]:
    """The files in ``folder`` and below, sorted; without hidden ones and those that operating systems leave."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(path for path in files if not any(map(hidden, path.relative_to(folder).parts)))


def hidden(name: str) -> bool:
    """Whether a file or folder is not the user's data, by its name: ``._a.png``, ``.ipynb_checkpoints``, ..."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini", "__macosx")


# --- columns ------------------------------------------------------------------------------------------------------


def read_texts(argument: str, source: str, text_column: str, label_column: str | None) -> Examples:
    """Texts, or pairs of texts, from a table, from text files (without classes), or from the hub.

    Args:
        argument, source: an option and its value, a path or an id on the hub.
        text_column: the column of the text; ``"A,B"`` for pairs.
        label_column: the column of the class; None where the task has no classes, and a text may be a chat (a list of
            messages) then, unless it is one of a pair.
    """
    named, needs = f"{argument} {source!r}", "a CSV, TSV, JSON or JSONL file"
    if label_column is None:
        needs = f"a text file, a folder of .txt files, or {needs}"
    wanted = [("--text-column", name.strip()) for name in text_column.split(",")]
    if label_column is not None:
        wanted.append(("--label-column", label_column.strip()))
    if not looks_like_path(source):
        columns = read_hub(argument, source, wanted)
    else:
        path = local_path(argument, source, needs)
        if path.suffix.lower() not in (*SEPARATED_SUFFIXES, *JSON_SUFFIXES):
            if label_column is not None:
                raise CommandError(f"{named} has no columns; it needs {needs}")
            files = [path]
            if path.is_dir():
                files = [file for file in files_in(path) if file.suffix.lower() == ".txt"]
            texts = [text for text in (_read_file(argument, file) for file in files) if text.strip()]
            if not texts:
                raise CommandError(f"{named} holds no text; it needs {needs}")
            return Examples([re.sub(r"\r\n?", "\n", text) for text in texts])
        text = _read_file(argument, path)
        if path.suffix.lower() in JSON_SUFFIXES:
            rows = list(_objects(named, text))
            header = list(dict.fromkeys(name for row in rows for name in row))
        else:
            usual = "\t" if path.suffix.lower() == ".tsv" else ","
            header, rows = _separated(named, text, usual, {name for _, name in wanted})
        _check_columns(named, header, len(rows), wanted)
        columns = [[row.get(name) for row in rows] for _, name in wanted]  # None where a row has no such cell
    cells = [(named, name, values) for (_, name), values in zip(wanted, columns, strict=True)]
    labels = as_labels(*cells.pop()) if label_column is not None else None
    if len(cells) > 1:
        return Examples(list(zip(*(_as_texts(*column) for column in cells), strict=True)), labels)
    return Examples(_as_texts(*cells[0]) if labels is not None else _as_texts_or_chats(*cells[0]), labels)


def read_hub(argument: str, source: str, wanted: Sequence[tuple[str, str]]) -> list[Sequence]:
    """The columns ``wanted``, as (option, name), of a data set ``ID[:CONFIG][@SPLIT]`` on the hub."""
    import datasets

    match = _HUB_ID.fullmatch(source)
    try:
        table = datasets.load_dataset(match["id"], match["config"], split=match["split"] or "train")
    except Exception as error:  # the library raises a dozen types, for a missing id, config, split or network
        raise CommandError(
            f"{argument} {source!r} is not a local path, and no data set of that name could be loaded from the hub; it "
            f"needs an existing path, or ID[:CONFIG][@SPLIT] and a network ({type(error).__name__}: {one_line(error)})"
        ) from None
    _check_columns(f"{argument} {source!r}", table.column_names, len(table), wanted)
    columns = []
    for _, name in wanted:
        feature = table.features[name]
        values = table[name] if isinstance(feature, datasets.Image) else list(table[name])  # images stay undecoded
        classes = getattr(feature, "names", None)
        if classes:  # -1 where the class is kept back, as in test splits
            values = [None if value is None or value < 0 else classes[value] for value in values]
        columns.append(values)
    return columns


def _check_columns(source: str, header: list[str], rows: int, wanted: Sequence[tuple[str, str]]) -> None:
    """Raise CommandError unless a table has rows and each column of ``wanted``, as (option, name), once."""
    if not rows:
        raise CommandError(f"{source} has no rows; it needs at least a few examples")
    for option, name in wanted:
        if header.count(name) != 1:
            found = f"{header.count(name)} columns" if name in header else "not a column"
            raise CommandError(f"{option} {name!r} is {found} of {source}; it has {header!s:.300}")


def _read_file(argument: str, path: Path) -> str:
    """The text of a file, in UTF-8 or, with its byte order mark, UTF-16; line ends as they are."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise CommandError(
            f"{argument} {str(path)!r} is not readable as UTF-8 text ({error}); it needs to be saved as UTF-8"
        ) from None
    if "\0" in text:
        line = _line(text, text.index("\0"))
        raise CommandError(f"{argument} {str(path)!r}, line {line}, has a NUL character; it needs to be plain text")
    return text


def _separated(source: str, text: str, usual: str, wanted: set[str]) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a table whose cells are separated by commas, semicolons, tabs or bars."""
    csv.field_size_limit(_CELL_LIMIT)

    def opened(separator: str, **options):
        # Not text.splitlines(): that splits at U+2028, U+0085 and form feeds too.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, **options)
        return reader, (row for row in reader if any(cell.strip() for cell in row))

    # Spreadsheets write semicolons where the comma is the decimal point.
    all_separators = (usual, *",;\t|")
    separator = next((one for one in all_separators if wanted <= set(map(str.strip, next(opened(one)[1], [])))), usual)
    if separator != usual:
        print(f"{source} separates its cells by {separator!r}")
    reader, lines = opened(separator, strict=True)
    try:
        rows = list(lines)
    except csv.Error as error:
        raise CommandError(
            f"{source}, up to line {reader.line_num}, is not a table ({error}); a cell with a quote, a separator or "
            'a line break in it needs quotes around it, and its own quotes doubled ("")'
        ) from None
    if not rows:
        return [], []
    header = [name.strip() for name in rows[0]]
    if header != rows[0]:
        print(f"warning: {source} has spaces around the names of its columns; they are left out")
    for number, row in enumerate(rows[1:], start=1):
        if any(cell.strip() for cell in row[len(header) :]):
            raise CommandError(
                f"{source}: row {number} has {len(row)} cells, but the header has {len(header)}; "
                "a cell with a separator in it needs quotes around it"
            )
    return header, [dict(zip(header, row, strict=False)) for row in rows[1:]]


def _objects(source: str, text: str) -> Iterator[dict]:
    """The objects of an array, or one after the other, on one line each or on several."""
    decoder, spaces = json.JSONDecoder(), re.compile(r"\s*")
    start = spaces.match(text).end()
    while start < len(text):
        line = _line(text, start)
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            # An object that is cut short is only noticed in the line after it.
            number = error.lineno if text[start] == "[" else line
            raise CommandError(f"{source}, line {number}, is not JSON: {error.msg}") from None
        except (RecursionError, ValueError) as error:  # ValueError: Python's own limit to the digits of an integer
            what = "lists or objects nested too deeply" if isinstance(error, RecursionError) else "a number too long"
            raise CommandError(f"{source}, line {line} or below, has {what} to read") from None
        for row in value if isinstance(value, list) and value else [value]:
            if not isinstance(row, dict):
                raise CommandError(f"{source}, line {line}, must be a JSON object with the columns, or a list of them")
            yield row
        start = spaces.match(text, end).end()


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


# --- what the cells of a column mean: source is the option and the file or id, name the column's ------------------


def _as_texts(source: str, name: str, values: Sequence, kind: str = "a text") -> list[str]:
    """The cells as texts; refuses one with nothing in it, or with a list or an object, such as a chat's messages."""
    if kind == "a text" and any(isinstance(value, list) and _chat(value) for value in values):
        raise CommandError(
            f"{source}: column {name!r} has chat messages, which only --task causal-lm can use, as one column"
        )
    for bad, found in (
        (lambda value: value is None or value != value or not str(value).strip(), "nothing"),
        (lambda value: isinstance(value, list | tuple), "a list"),
        (lambda value: not isinstance(value, str | int | float), "an object"),
    ):
        _refuse(source, values, bad, f"has {found} in column {name!r}; it needs {kind}")
    # JSON does not tell 1.0 from 1.
    texts = [str(int(value) if isinstance(value, float) and value.is_integer() else value) for value in values]
    _refuse_half_characters(source, name, texts)
    return texts


def _as_texts_or_chats(source: str, name: str, values: Sequence) -> list[str] | list[list[dict]]:
    """The cells as texts, or all as chats: lists of messages with ``role`` and ``content``, or that list as JSON in a
    string, as a CSV file has it."""
    chats = [_chat(value) for value in values]
    rows = [i for i, chat in enumerate(chats) if chat is None]
    if len(rows) == len(values):
        return _as_texts(source, name, values)
    if rows:
        raise CommandError(f"{source}: column {name!r} has chat messages in some rows and none in {_rows(rows)}")
    _refuse_half_characters(source, name, ["".join(str(message["content"]) for message in chat) for chat in chats])
    return chats


def _chat(value: object) -> list[dict] | None:
    """The messages in a cell, or None where it has something else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value:
        return None
    messages = (isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    return value if all(messages) else None


def as_labels(source: str, name: str, values: Sequence) -> list[str]:
    """The cells as class names, without the spaces around them; refuses what is none, such as decimal numbers."""
    where = f"{source}: column {name!r}"
    truths = [i for i, value in enumerate(values) if isinstance(value, bool)]
    others = [i for i, value in enumerate(values) if not isinstance(value, bool)]
    if truths and others:
        raise CommandError(
            f"{where} has true and false in {_rows(truths)} but other values in {_rows(others)}; "
            "a class needs one spelling"
        )
    texts = _as_texts(source, name, values, "a class")
    labels = [text.strip() for text in texts]
    if changed := sum(map(operator.ne, texts, labels)):
        print(f"warning: {where} has spaces around the class in {changed} rows; they are left out")
    known = [label for label in labels if label.casefold() not in _MISSING]
    numbers = [_number(label) for label in known]
    decimals = [number for number in numbers if number is not None and number % 1]
    # All are numbers, or a stray word is among them.
    if decimals and (None not in numbers or 2 * len(decimals) > len(known)):
        examples = ", ".join(map(str, sorted(set(decimals))[:3]))
        raise CommandError(
            f"{where} has decimal numbers ({examples}, ...): classification needs classes, and regression is not "
            "supported; if they are classes, write them as words"
        )
    spellings = defaultdict(set)
    for label in set(labels):
        number = _number(label)
        spellings[label.casefold() if number is None else number].add(label)
    for names in sorted(sorted(names) for names in spellings.values() if len(names) > 1):
        print(f"warning: {where} has {' and '.join(map(repr, names))}, which count as different classes")
    return labels


def _refuse(source: str, values: Sequence, bad: Callable[[object], object], problem: str) -> None:
    """Raise CommandError where ``bad`` is true of a value; the message names the first row and counts the others."""
    rows = [i for i, value in enumerate(values) if bad(value)]
    if rows:
        raise CommandError(f"{source}: {_rows(rows)} {problem}")


def _refuse_half_characters(source: str, name: str, texts: Sequence[str]) -> None:
    """Refuse what no encoding can write: JSON has a character beyond 16 bits as two of these."""
    problem = f"has half a character (such as \\ud83d alone) in column {name!r}; it needs whole ones"
    _refuse(source, texts, re.compile(r"[\ud800-\udfff]").search, problem)


def _rows(indices: Sequence[int]) -> str:
    """``row 3``, or ``row 3 (and 12 more rows)``; counted from 1."""
    more = len(indices) - 1
    return f"row {indices[0] + 1}" + (f" (and {more} more row{'s' * (more > 1)})" if more else "")


def _number(text: str) -> float | None:
    """The number that ``text`` is, with a point or, as in half of the world, a comma before its fraction."""
    if not re.fullmatch(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?", text):
        return None
    return float(text.replace(",", "."))


# --- classes and parts --------------------------------------------------------------------------------------------


def describe_classes(names: Sequence[str], train: Sequence[int], held_out: Sequence[int]) -> str:
    """One line with the classes ``names`` and how many examples of each there are, given as indices into ``names``."""
    counts, others = Counter(train), Counter(held_out)
    shown = [f"{name:.40}: {counts[i]} + {others[i]}" for i, name in enumerate(names[:_NAMED_CLASSES])]
    more = f", and {len(names) - _NAMED_CLASSES} more" if len(names) > _NAMED_CLASSES else ""
    return f"{len(names)} classes (training + held out): {', '.join(shown)}{more}"


def split(
    count: int, labels: Sequence | None, fraction: float, seed: int, argument: str
) -> tuple[list[int], list[int]]:
    """Indices (training, held out) of ``count`` examples, both sorted.

    Holds out ``fraction`` of every class, rounded, but always leaves one example of it for training. CommandError where
    nothing is held out.
    """
    groups: dict[object, list[int]] = defaultdict(list)
    for i, label in enumerate(labels or [None] * count):
        groups[label].append(i)
    rng = random.Random(seed)
    held_out: list[int] = []
    for members in groups.values():
        rng.shuffle(members)
        held_out += members[: min(round(fraction * len(members)), len(members) - 1)]
    if not held_out:
        raise CommandError(
            f"{argument} has {count} examples, too few to hold out --eval-fraction {fraction:g} of them; "
            "it needs more of them, or --eval-data"
        )
    chosen = set(held_out)
    return [i for i in range(count) if i not in chosen], sorted(held_out)
