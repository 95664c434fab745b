"""Text that every machine with this package has: the source of Python's library and of the packages it depends on.

Files are taken in the order of a hash of their names, so that a limit on their number picks a mixture.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

#: Library -> the module that is imported; "python" is the standard library.
LIBRARIES = {
    "python": None,
    "torch": "torch",
    "transformers": "transformers",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "numpy": "numpy",
    "matplotlib": "matplotlib",
    "peft": "peft",
}

#: Shares of the files, by a hash of their names.
PARTS = {"train": 0.6, "validation": 0.15, "test": 0.25}


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
    for part, share in PARTS.items():
        if place < share:
            return part
        place -= share
    return "test"


def texts(library: str, pattern: str, count: int) -> Iterator[tuple[str, str]]:
    """(path, text) of at most ``count`` files of a library, without its tests and without equal texts."""
    module, seen = LIBRARIES[library], set()
    root = Path(importlib.util.find_spec(module).origin).parent if module else Path(sysconfig.get_path("stdlib"))
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
    for library in tqdm(LIBRARIES, desc="reading docstrings", unit="library"):
        for name, text in texts(library, "*.py", files_per_library):
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
                keys = {function.signature, function.summary.lower()}
                if len(function.summary) >= 20 and not keys & seen:
                    seen |= keys
                    found.append(function)
    return found


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
