"""Mutation check: does some test notice when a line is wrong?

Mutants are data, in the TOML files beside this one. A table ``[tests]`` shortens test ids, and each ``[[mutant]]`` has

    name     unique
    file     below goat_kernels/
    old      text that occurs exactly once in the file, within one line
    new      what stands there instead
    breaks   what is then wrong
    tests    pytest ids that must notice, the quickest first; one that begins with a name of ``[tests]`` is lengthened

Each is applied to a copy of the package in a temporary folder, never to the checkout, and its tests run there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

#: A mutant may make a loop endless.
TIMEOUT_S = 300

CAUGHT, SURVIVED, BROKEN = "caught", "survived", "broken"


@dataclass(frozen=True)
class Mutant:
    """One deliberate fault; the fields are explained above."""

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    def apply(self, source: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: ``old`` does not occur exactly once, or is more than a line.
        """
        found = source.count(self.old)
        if found != 1 or "\n" in self.old + self.new or self.old == self.new:
            raise ValueError(
                f"mutant {self.name}: goat_kernels/{self.file} has {found} places with {self.old!r}; it needs one, of "
                "one line, and another text in its place. Where the line was rewritten, rewrite the mutant"
            )
        return source.replace(self.old, self.new)


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        mutant: which.
        status: CAUGHT, SURVIVED, or BROKEN where its tests could not run at all.
        test: the test that failed, where caught.
        seconds: wall time of its tests.
        output: the end of what pytest wrote.
    """

    mutant: Mutant
    status: str
    test: str
    seconds: float
    output: str


def read_mutants(paths: Iterable[Path] | None = None) -> list[Mutant]:
    """The mutants of ``paths``, by default of every TOML file here."""
    mutants = []
    for path in sorted(HERE.glob("*.toml")) if paths is None else paths:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for fields in content["mutant"]:
            tests = tuple(_lengthened(test, content["tests"]) for test in fields.pop("tests"))
            mutants.append(Mutant(**fields, tests=tests))
    return mutants


def _lengthened(test: str, names: dict[str, str]) -> str:
    name = re.match(r"\w*", test)[0]
    return names[name] + test[len(name) :] if name in names else test


class Copy:
    """A copy of the package and its tests, whose interpreter sees nothing of the checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        for name in ("goat_kernels", "bench", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)

    def pytest(self, *arguments: str) -> tuple[int, str]:
        """(exit code, output) of pytest in the copy; -1 where it took too long."""
        # Compiled files are keyed by time and size, which a mutant may share with what it replaces.
        environment = os.environ | {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "",  # the long tests too
            "-x",
            "-q",
            "--tb=line",
            "-rfE",
            "-p",
            "no:cacheprovider",
            *arguments,
        ]
        options = {"cwd": self.folder, "env": environment, "text": True, "stdin": subprocess.DEVNULL}
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_S, **options
            )
        except subprocess.TimeoutExpired as expired:
            return -1, str(expired.stdout)
        return done.returncode, done.stdout

    def judge(self, mutant: Mutant) -> Verdict:
        """Put the fault in, run its tests, and take it out again."""
        file = self.folder / "goat_kernels" / mutant.file
        before = file.read_text(encoding="utf-8")
        file.write_text(mutant.apply(before), encoding="utf-8")
        start = time.perf_counter()
        try:
            code, output = self.pytest(*mutant.tests)
        finally:
            file.write_text(before, encoding="utf-8")
        seconds = time.perf_counter() - start
        failed = re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", output, re.M)
        if code == -1 or code < -1:  # endless, or a crash of the interpreter: nobody would overlook that
            status, test = CAUGHT, "(timeout)" if code == -1 else f"(signal {-code})"
        elif code == 0:
            status, test = SURVIVED, ""
        else:
            status, test = (CAUGHT, failed[1]) if code == 1 and failed else (BROKEN, "")
        return Verdict(mutant, status, test, seconds, output[-2000:])


def check(mutants: Iterable[Mutant], folder: Path, *, with_baseline: bool = True) -> Iterator[Verdict]:
    """Judge the mutants one by one in a copy below ``folder``.

    Raises:
        ValueError: a mutant that cannot be applied, or a test that fails without any mutant.
    """
    mutants = list(mutants)
    for mutant in mutants:
        mutant.apply((ROOT / "goat_kernels" / mutant.file).read_text(encoding="utf-8"))
    copy = Copy(folder / "copy")
    if with_baseline:
        code, output = copy.pytest(*sorted({test for mutant in mutants for test in mutant.tests}))
        if code != 0:
            raise ValueError(f"the tests do not pass on the code as it is:\n{output[-4000:]}")
    for mutant in mutants:
        yield copy.judge(mutant)
