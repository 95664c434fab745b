"""Where data comes from (a local path, or a data set on the hub), its classes, and which part is held out."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from goat_kernels.command_errors import CommandError, one_line

#: Suffixes of tables, in lower case: with separators, and of JSON.
SEPARATED_SUFFIXES, JSON_SUFFIXES = (".csv", ".tsv"), (".json", ".jsonl", ".ndjson")

#: ID[:CONFIG][@SPLIT] of a data set on the hub.
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")

#: Classes that the line about them names, at most.
_NAMED_CLASSES = 20


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
        or path.suffix.lower() in (*SEPARATED_SUFFIXES, *JSON_SUFFIXES, ".txt")
        or _HUB_ID.fullmatch(text) is None
    )


def local_path(argument: str, text: str, needs: str) -> Path:
    """The existing path that ``text`` names; ``argument`` and ``needs`` are for the message where it does not exist."""
    path = Path(text).expanduser()
    if not path.exists():
        raise CommandError(f"{argument} {text!r} does not exist; it needs {needs}")
    return path


def visible_files(folder: Path) -> list[Path]:
    """The files in ``folder`` and below, sorted; without hidden ones and those that operating systems leave."""
    return sorted(
        path
        for path in folder.rglob("*")
        if not path.is_dir() and not any(map(is_hidden, path.relative_to(folder).parts))
    )


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not the user's data, by its name: ``._a.png``, ``.ipynb_checkpoints``, ..."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini", "__macosx")


def read_hub(argument: str, source: str, wanted: Sequence[tuple[str, str]]) -> list[Sequence]:
    """Columns of a data set on the hub.

    Args:
        argument: the option that named the source, for messages.
        source: ``ID[:CONFIG][@SPLIT]``.
        wanted: (option, name) of each column.
    """
    import datasets

    match = _HUB_ID.fullmatch(source)
    try:
        table = datasets.load_dataset(match["id"], match["config"], split=match["split"] or "train")
    except Exception as error:  # the library raises a dozen types, for a missing id, config, split or network
        raise CommandError(
            f"{argument} {source!r} is not a local path, and no data set of that name could be loaded from the hub; it "
            f"needs an existing path, or ID[:CONFIG][@SPLIT] and a network ({type(error).__name__}: {one_line(error)})"
        ) from None
    check_columns(f"{argument} {source!r}", table.column_names, len(table), wanted)
    columns = []
    for _, name in wanted:
        feature = table.features[name]
        values = table[name] if isinstance(feature, datasets.Image) else list(table[name])  # images stay undecoded
        classes = getattr(feature, "names", None)
        if classes:  # -1 where the class is kept back, as in test splits
            values = [None if value is None or value < 0 else classes[value] for value in values]
        columns.append(values)
    return columns


def check_columns(source: str, header: list[str], rows: int, wanted: Sequence[tuple[str, str]]) -> None:
    """Raise CommandError unless a table has rows and each column of ``wanted``, as (option, name), once."""
    if not rows:
        raise CommandError(f"{source} has no rows; it needs at least a few examples")
    for option, name in wanted:
        if header.count(name) != 1:
            found = f"{header.count(name)} columns" if name in header else "not a column"
            raise CommandError(f"{option} {name!r} is {found} of {source}; it has {header!s:.300}")


def describe_classes(names: Sequence[str], train: Sequence[int], held_out: Sequence[int]) -> str:
    """One line with the classes and how many examples of each there are, for training and held out.

    Args:
        names: of the classes.
        train, held_out: the class of each example, as an index into ``names``.
    """
    counts, others = Counter(train), Counter(held_out)
    shown = [f"{name:.40}: {counts[i]} + {others[i]}" for i, name in enumerate(names[:_NAMED_CLASSES])]
    more = f", and {len(names) - _NAMED_CLASSES} more" if len(names) > _NAMED_CLASSES else ""
    return f"{len(names)} classes (training + held out): {', '.join(shown)}{more}"


def split(
    count: int, labels: Sequence | None, fraction: float, seed: int, argument: str
) -> tuple[list[int], list[int]]:
    """Indices (training, held out) of ``count`` examples, both sorted.

    Holds out ``fraction`` of every class, rounded, but always leaves one example of it for training.

    Raises:
        CommandError: one of the two parts would be empty.
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
