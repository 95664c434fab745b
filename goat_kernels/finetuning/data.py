"""Where the user's data comes from and how it is split: text files, tables and data sets on the hub; for images see
``image_folders.py``.

Local files are read with the standard library; only ids on the hub need the ``datasets`` extra.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning.columns import Column
from goat_kernels.finetuning.tables import TABLE_SUFFIXES, read_columns, read_file

#: ID[:CONFIG][@SPLIT] of a data set on the hub.
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")


@dataclass(frozen=True)
class Examples:
    """Inputs with their classes.

    Attributes:
        items: texts, pairs of texts, chats, image files, or images that a hub data set decodes when asked for.
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
        or path.suffix.lower() in (*TABLE_SUFFIXES, ".txt")
        or _HUB_ID.fullmatch(text) is None
    )


def local_path(argument: str, text: str, needs: str) -> Path:
    """The existing path that ``text`` names; ``argument`` and ``needs`` are for the message where it does not exist."""
    path = Path(text).expanduser()
    if not path.exists():
        raise CommandError(f"{argument} {text!r} does not exist; it needs {needs}")
    return path


def read_texts(argument: str, source: str, text_column: str, label_column: str | None) -> Examples:
    """Texts, or pairs of texts, from a table, from text files (without classes), or from the hub.

    Args:
        argument: the option that named the source, for messages.
        source: a path or an id on the hub.
        text_column: the column of the text; ``"A,B"`` for pairs.
        label_column: the column of the class; None where the task has no classes, and a text may be a chat (a list of
            messages) then, unless it is one of a pair.
    """
    needs = "a CSV, TSV, JSON or JSONL file"
    if label_column is None:
        needs = f"a text file, a folder of .txt files, or {needs}"
    wanted = [("--text-column", name.strip()) for name in text_column.split(",")]
    if label_column is not None:
        wanted.append(("--label-column", label_column.strip()))
    if not looks_like_path(source):
        columns = read_hub(argument, source, wanted)
    else:
        path = local_path(argument, source, needs)
        if path.suffix.lower() not in TABLE_SUFFIXES:
            if label_column is not None:
                raise CommandError(f"{argument} {source!r} has no columns; it needs {needs}")
            return _read_text_files(argument, source, path, needs)
        columns = read_columns(argument, path, wanted)
    labels = columns.pop().labels() if label_column is not None else None
    if len(columns) > 1:
        return Examples(list(zip(*(column.texts() for column in columns), strict=True)), labels)
    return Examples(columns[0].texts() if labels is not None else columns[0].texts_or_chats(), labels)


def _read_text_files(argument: str, source: str, path: Path, needs: str) -> Examples:
    files = [path]
    if path.is_dir():
        files = [file for file in visible_files(path) if file.suffix.lower() == ".txt"]
    texts = [text for text in (read_file(argument, file) for file in files) if text.strip()]
    if not texts:
        raise CommandError(f"{argument} {source!r} holds no text; it needs {needs}")
    return Examples([re.sub(r"\r\n?", "\n", text) for text in texts])


def visible_files(folder: Path) -> list[Path]:
    """The files in ``folder`` and below, sorted; without hidden ones, and those that systems put into every folder."""
    return sorted(
        path
        for path in folder.rglob("*")
        if not path.is_dir() and not any(map(is_hidden, path.relative_to(folder).parts))
    )


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's data: ``._a.png``, ``.ipynb_checkpoints``, ..."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini", "__macosx")


def class_names(argument: str, labels: Sequence[str]) -> list[str]:
    """The classes, sorted (numbers by value); raises unless there are at least two."""
    distinct = set(labels)
    numeric = all(re.fullmatch(r"-?\d+", label) for label in distinct)
    names = sorted(distinct, key=(lambda label: (int(label), label)) if numeric else None)
    if len(names) < 2:
        raise CommandError(f"{argument} has one class, {names[0]!r:.80}; classification needs at least two")
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


def read_hub(argument: str, source: str, wanted: Sequence[tuple[str, str]]) -> list[Column]:
    """Columns of a data set on the hub, their cells read when they are asked for.

    Args:
        argument: the option that named the source, for messages.
        source: ``ID[:CONFIG][@SPLIT]``.
        wanted: (option, name) of each column.
    """
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
    for option, name in wanted:
        if name not in table.column_names:
            raise CommandError(
                f"{option} {name!r} is not a column of {argument} {source!r}; it has {table.column_names}"
            )
    if not len(table):
        raise CommandError(f"{argument} {source!r} has no rows; it needs at least a few examples")
    columns = []
    for _, name in wanted:
        feature = table.features[name]
        values = table[name] if isinstance(feature, datasets.Image) else list(table[name])  # images stay undecoded
        classes = getattr(feature, "names", None)
        if classes:  # -1 is a class that is not told, as in test splits
            values = [None if value is None or value < 0 else classes[value] for value in values]
        columns.append(Column(f"{argument} {source!r}", name, values))
    return columns
