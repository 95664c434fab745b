"""Reading and splitting the user's data: image folders, CSV, JSONL, text files and hub data sets.

Local files are read with the standard library; only ids on the hub need the ``datasets`` extra.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from goat_kernels.command_errors import CommandError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TABLE_SUFFIXES = (".csv", ".jsonl")

#: ID[:CONFIG][@SPLIT] of a data set on the hub.
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")


@dataclass(frozen=True)
class Examples:
    """Inputs with their classes.

    Attributes:
        items: texts, pairs of texts, image files, or images that a hub data set decodes when they are asked for.
        labels: the class name of each item; None where the task has no classes.
    """

    items: Sequence
    labels: Sequence[str] | None = None


def looks_like_path(text: str) -> bool:
    """Whether ``text`` can only mean a local path: it exists, or no id on the hub is written like that."""
    path = Path(text).expanduser()
    return (
        path.exists()
        or text.startswith((".", "~", "/"))
        or "\\" in text
        or path.suffix in (*TABLE_SUFFIXES, ".txt", ".json")
        or _HUB_ID.fullmatch(text) is None
    )


def local_path(argument: str, text: str, needs: str) -> Path:
    """The existing path that ``text`` names; ``argument`` and ``needs`` are for the message where it does not exist."""
    path = Path(text).expanduser()
    if not path.exists():
        raise CommandError(f"{argument} {text!r} does not exist; it needs {needs}")
    return path


def read_texts(argument: str, source: str, text_column: str, label_column: str | None) -> Examples:
    """Texts, or pairs of texts, from CSV or JSONL, from text files (without classes), or from the hub.

    Args:
        argument: the option that named the source, for messages.
        source: a path or an id on the hub.
        text_column: the column of the text; ``"A,B"`` for pairs.
        label_column: the column of the class; None where the task has no classes.
    """
    needs = "a CSV or JSONL file" if label_column else "a text file, a folder of .txt files, a CSV or a JSONL file"
    if not looks_like_path(source):
        return _read_hub(argument, source, text_column.split(","), "--text-column", label_column)
    path = local_path(argument, source, needs)
    if path.suffix in TABLE_SUFFIXES:
        rows = _read_table(argument, path)
        texts = _paired([_column(argument, path, rows, "--text-column", name) for name in text_column.split(",")])
        labels = _column(argument, path, rows, "--label-column", label_column) if label_column else None
        return Examples(texts, labels)
    if label_column:
        raise CommandError(f"{argument} {source!r} has no columns; it needs {needs}")
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    texts = [text for text in (_read_file(argument, file) for file in files) if text.strip()]
    if not texts:
        raise CommandError(f"{argument} {source!r} holds no text; it needs {needs}")
    return Examples(texts)


def read_images(argument: str, source: str, image_column: str, label_column: str) -> Examples:
    """Images from a folder with one subfolder per class, or from the hub."""
    needs = "a folder with one subfolder of images per class"
    if not looks_like_path(source):
        return _read_hub(argument, source, [image_column], "--image-column", label_column)
    path = local_path(argument, source, needs)
    if not path.is_dir():
        raise CommandError(f"{argument} {source!r} is a file; it needs {needs}")
    items, labels = [], []
    for folder in sorted(child for child in path.iterdir() if child.is_dir()):
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        items += files
        labels += [folder.name] * len(files)
    if not items:
        raise CommandError(f"{argument} {source!r} holds no class subfolders with images; it needs {needs}")
    return Examples(items, labels)


def class_names(argument: str, labels: Sequence[str]) -> list[str]:
    """The classes, sorted (numbers by value); raises unless there are at least two."""
    distinct = set(labels)
    numeric = all(re.fullmatch(r"-?\d+", label) for label in distinct)
    names = sorted(distinct, key=(lambda label: (int(label), label)) if numeric else None)
    if len(names) < 2:
        raise CommandError(f"{argument} has one class, {names[0]!r}; classification needs at least two")
    return names


def class_ids(argument: str, labels: Sequence[str], names: list[str]) -> list[int]:
    """The index in ``names`` of each label; raises on a class that is not among them."""
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted({label for label in labels if label not in index})
    if unknown:
        raise CommandError(f"{argument} has the classes {unknown[:5]}, which the training data lacks: {names[:20]}")
    return [index[label] for label in labels]


def split(
    count: int, labels: Sequence | None, fraction: float, seed: int, argument: str
) -> tuple[list[int], list[int]]:
    """Indices (training, held out) of ``count`` examples, both sorted.

    Holds out ``fraction`` of every class, rounded, but always leaves one example of it for training.

    Raises:
        CommandError: one of the two parts would be empty.
    """
    groups: dict[object, list[int]] = defaultdict(list)
    for i in range(count):
        groups[labels[i] if labels is not None else None].append(i)
    rng = random.Random(seed)
    held_out: list[int] = []
    for _, members in sorted(groups.items(), key=lambda group: group[1][0]):
        rng.shuffle(members)
        held_out += members[: min(round(fraction * len(members)), len(members) - 1)]
    if not held_out:
        raise CommandError(
            f"{argument} has {count} examples, too few to hold out --eval-fraction {fraction:g} of them; "
            "it needs more of them, or --eval-data"
        )
    chosen = set(held_out)
    return [i for i in range(count) if i not in chosen], sorted(held_out)


def _read_file(argument: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise CommandError(f"{argument} {str(path)!r} is not readable as UTF-8 text: {error}") from None


def _read_table(argument: str, path: Path) -> list[dict]:
    text = _read_file(argument, path)
    if path.suffix == ".csv":
        # Lines keep their ends, so that a line break inside a quoted cell stays in it.
        rows = list(csv.DictReader(text.splitlines(keepends=True)))
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CommandError(f"{argument} {str(path)!r}, line {number}, is not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise CommandError(f"{argument} {str(path)!r}, line {number}, must be a JSON object with the columns")
            rows.append(row)
    if not rows:
        raise CommandError(f"{argument} {str(path)!r} has no rows; it needs at least a few examples")
    return rows


def _column(argument: str, path: Path, rows: list[dict], option: str, name: str) -> list[str]:
    columns = [column for column in rows[0] if column is not None]
    if name not in columns:
        raise CommandError(f"{option} {name!r} is not a column of {argument} {str(path)!r}; it has {columns}")
    for number, row in enumerate(rows, start=1):
        if row.get(name) in (None, ""):
            raise CommandError(f"{argument} {str(path)!r}: row {number} has nothing in column {name!r}")
    return [str(row[name]) for row in rows]


def _paired(columns: list[Sequence]) -> Sequence:
    """The items of one column, or tuples across several."""
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def _read_hub(argument: str, source: str, columns: list[str], option: str, label_column: str | None) -> Examples:
    try:
        import datasets
    except ImportError:
        raise CommandError(
            f"{argument} {source!r} is not a local path, and data from the hub needs the datasets library: "
            "pip install 'goat-kernels[data]'"
        ) from None
    match = _HUB_ID.fullmatch(source)
    try:
        table = datasets.load_dataset(match["id"], match["config"], split=match["split"] or "train")
    except Exception as error:  # the library raises a dozen types, for a missing id, config, split or network
        reason = " ".join(str(error).split())
        raise CommandError(
            f"{argument} {source!r} is not a local path, and no data set of that name could be loaded from the hub; "
            f"it needs an existing path, or ID[:CONFIG][@SPLIT] and a network ({type(error).__name__}: {reason:.200})"
        ) from None
    for name, of in (*((column, option) for column in columns), (label_column, "--label-column")):
        if name is not None and name not in table.column_names:
            raise CommandError(f"{of} {name!r} is not a column of {argument} {source!r}; it has {table.column_names}")
    if not len(table):
        raise CommandError(f"{argument} {source!r} has no rows; it needs at least a few examples")
    items = _paired([table[column] for column in columns])
    if label_column is None:
        return Examples(items)
    names = getattr(table.features[label_column], "names", None)
    labels = [names[label] if names else str(label) for label in table[label_column]]
    return Examples(items, labels)
