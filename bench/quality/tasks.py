"""The tasks of the comparison: a task is one entry in the table here, and a function that loads its data and model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bench.quality.data import Data
from bench.quality.generation import to_cpp, to_prose
from bench.quality.images import photo_tiles, rare_digits, turned_digits
from bench.quality.texts import library_of_docstring, signature_matches


class Metric(NamedTuple):
    """What a score is: its sign (1: more is better, -1: less is), and in tables its factor, digits and heading."""

    sign: int
    factor: int
    digits: int
    heading: str


METRICS = {"accuracy": Metric(1, 100, 1, "accuracy, %"), "perplexity": Metric(-1, 1, 2, "perplexity")}


class QualityTask(NamedTuple):
    """One task.

    Attributes:
        load: gives its data and model; the first line of its docstring says what the task is.
        steps, batch_size: the training of every method.
        domain: as in the paper: image classification, language understanding, generation.
        metric: what the learning rate is chosen by, a key of ``METRICS``.
        rates: the learning rates that every method chooses from.
    """

    load: Callable[[], Data]
    steps: int
    batch_size: int
    domain: str
    metric: str
    rates: tuple[float, ...]

    @property
    def summary(self) -> str:
        return self.load.__doc__.splitlines()[0].rstrip(".")


_IMAGES = ("image classification", "accuracy", (3e-4, 1e-3, 3e-3, 1e-2, 3e-2))
_GENERATION = ("generation", "perplexity", (3e-4, 1e-3, 3e-3, 1e-2))
_TEXTS = ("language understanding", "accuracy", (1e-4, 3e-4, 1e-3, 3e-3))

#: Cheapest first: the order in which they run.
TASKS: dict[str, QualityTask] = {
    "digits-turned": QualityTask(turned_digits, 200, 32, *_IMAGES),
    "digits-rare": QualityTask(rare_digits, 150, 16, *_IMAGES),
    "photo-tiles": QualityTask(photo_tiles, 200, 32, *_IMAGES),
    "python-to-cpp": QualityTask(to_cpp, 100, 8, *_GENERATION),
    "python-to-prose": QualityTask(to_prose, 100, 8, *_GENERATION),
    "docstring-library": QualityTask(library_of_docstring, 200, 8, *_TEXTS),
    "docstring-signature": QualityTask(signature_matches, 200, 8, *_TEXTS),
}
