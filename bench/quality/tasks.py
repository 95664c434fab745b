"""The tasks of the comparison: a task is one entry in the table here, and a function that loads its data and model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset

from bench.quality.generation import Question, to_cpp, to_prose
from bench.quality.images import photo_tiles, rare_digits, turned_digits
from bench.quality.texts import library_of_docstring, signature_matches
from goat_kernels.finetuning.models import BaseModel

#: What a score is called -> whether more of it is better.
METRICS = {"accuracy": True, "perplexity": False}


@dataclass(frozen=True)
class Data:
    """A task's data and model, loaded.

    Attributes:
        training: seed -> the examples to train on; tasks with rare data draw them.
        validation, test: data sets of dicts; the learning rate is chosen on the one, and the other reported.
        collate: list of dicts -> batch.
        base: seed -> the pretrained model, its new classifier's weights drawn with the seed.
        digest: of all the data, so that results of other data are told apart.
        questions: of the validation and of the test data, where the task asks any (``generation.Question``).
    """

    training: Callable[[int], Dataset]
    validation: Dataset
    test: Dataset
    collate: Callable[[list[dict]], dict[str, Tensor]]
    base: Callable[[int], BaseModel]
    digest: str
    questions: tuple[Sequence[Question], Sequence[Question]] | None = None


@dataclass(frozen=True)
class QualityTask:
    """One task.

    Attributes:
        domain: as in the paper: image classification, language understanding, generation.
        summary: one line.
        metric: what the learning rate is chosen by, a key of ``METRICS``.
        load: whether in small (for tests) -> fields of ``Data``.
        steps, batch_size: the training of every method.
        rates: the learning rates that every method chooses from.
    """

    domain: str
    summary: str
    metric: str
    load: Callable[[bool], dict[str, object]]
    steps: int
    batch_size: int
    rates: tuple[float, ...]


_VIT_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_LLAMA_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_MINILM_RATES = (1e-4, 3e-4, 1e-3, 3e-3)

#: Cheapest first: the order in which they run.
TASKS: dict[str, QualityTask] = {
    "digits-turned": QualityTask(
        "image classification",
        "all ten digits, black and white exchanged and turned by a quarter; pretrained on 0-5 as they are",
        "accuracy",
        turned_digits,
        steps=200,
        batch_size=32,
        rates=_VIT_RATES,
    ),
    "digits-rare": QualityTask(
        "image classification",
        "all ten digits, noisy and partly covered, fifteen examples of each; the same pretrained model",
        "accuracy",
        rare_digits,
        steps=150,
        batch_size=16,
        rates=_VIT_RATES,
    ),
    "photo-tiles": QualityTask(
        "image classification",
        "which of eight regions of two photographs a tile of 16x16 pixels comes from; the same pretrained model",
        "accuracy",
        photo_tiles,
        steps=200,
        batch_size=32,
        rates=_VIT_RATES,
    ),
    "python-to-cpp": QualityTask(
        "generation",
        "a small Llama pretrained on Python source goes on to C++ headers",
        "perplexity",
        to_cpp,
        steps=100,
        batch_size=8,
        rates=_LLAMA_RATES,
    ),
    "python-to-prose": QualityTask(
        "generation",
        "the same Llama goes on to the prose of docstrings",
        "perplexity",
        to_prose,
        steps=100,
        batch_size=8,
        rates=_LLAMA_RATES,
    ),
    "docstring-library": QualityTask(
        "language understanding",
        "MiniLM: which of eight libraries a docstring comes from",
        "accuracy",
        library_of_docstring,
        steps=200,
        batch_size=8,
        rates=_MINILM_RATES,
    ),
    "docstring-signature": QualityTask(
        "language understanding",
        "MiniLM: whether a docstring is that of a function's signature or of another function in its module",
        "accuracy",
        signature_matches,
        steps=200,
        batch_size=8,
        rates=_MINILM_RATES,
    ),
}


def load(name: str, quick: bool) -> Data:
    """A task's data and model; ``quick`` in small, for tests."""
    return Data(**TASKS[name].load(quick))
