"""Text that every machine with this package has: the source of Python's library and of the packages it depends on.

What is read off the sources is cached beside the pretrained models, by the packages' versions. Files are taken in the
order of a hash of their names, so that a limit on their number picks a mixture.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm

from goat_kernels.files import write_json
from goat_kernels.finetuning.pretraining import cache_folder

#: Raised when something else is read off the same sources, so that what is cached counts as out of date.
_READING = 1

#: Distribution -> the module that is imported; "python" is the standard library.
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


@dataclass(frozen=True)
class Function:
    """A documented function.

    Attributes:
        library: a key of ``LIBRARIES``.
        file: its path below the library.
        signature: as written, without annotations and defaults.
        docstring: whole, with its indentation removed.
    """

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


def functions(files_per_library: int) -> list[Function]:
    """Documented functions of all libraries, at most one with the same signature or the same first paragraph."""
    found = _cached("functions", files_per_library, lambda: [asdict(one) for one in _read_functions(files_per_library)])
    return [Function(**one) for one in found]


def python_files(count: int) -> dict[str, str]:
    """Path -> text of files of Python's library."""
    return _cached("python", count, lambda: dict(_texts("python", "*.py", count)))


def cpp_files(count: int) -> dict[str, str]:
    """Path -> text of torch's C++ headers."""
    return _cached("cpp", count, lambda: dict(_texts("torch", "include/**/*.h", count)))


def version(library: str) -> str:
    """The installed version."""
    return platform.python_version() if library == "python" else importlib.metadata.version(library)


def _root(library: str) -> Path:
    module = LIBRARIES[library]
    if module is None:
        return Path(sysconfig.get_paths()["stdlib"])
    return Path(importlib.util.find_spec(module).origin).parent


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _cached(name: str, count: int, read: Callable[[], object]):
    versions = {library: version(library) for library in LIBRARIES}
    identity = json.dumps([_READING, name, count, versions], sort_keys=True)
    path = cache_folder() / f"text-{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, read())
    return json.loads(path.read_text(encoding="utf-8"))


def _texts(library: str, pattern: str, count: int) -> Iterator[tuple[str, str]]:
    """Files of a library, without tests and without those whose text came before."""
    root, seen = _root(library), set()
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


def _read_functions(files_per_library: int) -> Iterator[Function]:
    seen: set[str] = set()
    for library in tqdm(LIBRARIES, desc="reading docstrings", unit="library"):
        for name, text in _texts(library, "*.py", files_per_library):
            try:
                tree = ast.parse(text)
            except SyntaxError:
                continue
            for node in ast.walk(tree):
                if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)):
                    continue
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                signature = f"{node.name}({', '.join(one.arg for one in arguments if one.arg != 'self')})"
                function = Function(library, name, signature, inspect.cleandoc(docstring))
                keys = {function.signature, function.summary.lower()}
                if len(function.summary) >= 20 and not keys & seen:
                    seen |= keys
                    yield function
