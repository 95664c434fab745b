"""The tasks of the comparison: a task is one entry in the table here, and a function that loads its data and model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class QualityTask:
    """One task.

    Attributes:
        summary: one line.
        load: whether in small (for tests) -> its data and model.
        steps, batch_size: the training of every method.
        domain: as in the paper: image classification, language understanding, generation.
        metric: what the learning rate is chosen by, a key of ``METRICS``.
        rates: the learning rates that every method chooses from.
    """

    summary: str
    load: Callable[[bool], Data]
    steps: int
    batch_size: int
    domain: str
    metric: str
    rates: tuple[float, ...]

    def quick(self) -> QualityTask:
        """In two steps at one rate, for tests."""
        return replace(self, steps=2, rates=self.rates[:1])


_IMAGES = {"domain": "image classification", "metric": "accuracy", "rates": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
_GENERATION = {"domain": "generation", "metric": "perplexity", "rates": (3e-4, 1e-3, 3e-3, 1e-2)}
_TEXTS = {"domain": "language understanding", "metric": "accuracy", "rates": (1e-4, 3e-4, 1e-3, 3e-3)}

#: Cheapest first: the order in which they run.
TASKS: dict[str, QualityTask] = {
    "digits-turned": QualityTask(
        "all ten digits, black and white exchanged and turned by a quarter; pretrained on 0-5 as they are",
        turned_digits,
        steps=200,
        batch_size=32,
        **_IMAGES,
    ),
    "digits-rare": QualityTask(
        "all ten digits, noisy and partly covered, fifteen examples of each; the same pretrained model",
        rare_digits,
        steps=150,
        batch_size=16,
        **_IMAGES,
    ),
    "photo-tiles": QualityTask(
        "which of eight regions of two photographs a tile of 16x16 pixels comes from; the same pretrained model",
        photo_tiles,
        steps=200,
        batch_size=32,
        **_IMAGES,
    ),
    "python-to-cpp": QualityTask(
        "a small Llama pretrained on Python source goes on to C++ headers",
        to_cpp,
        steps=100,
        batch_size=8,
        **_GENERATION,
    ),
    "python-to-prose": QualityTask(
        "the same Llama goes on to the prose of docstrings",
        to_prose,
        steps=100,
        batch_size=8,
        **_GENERATION,
    ),
    "docstring-library": QualityTask(
        "MiniLM: which of eight libraries a docstring comes from",
        library_of_docstring,
        steps=200,
        batch_size=8,
        **_TEXTS,
    ),
    "docstring-signature": QualityTask(
        "MiniLM: whether a docstring is that of a function's signature or of another function in its module",
        signature_matches,
        steps=200,
        batch_size=8,
        **_TEXTS,
    ),
}
