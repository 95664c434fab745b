"""What a task of the comparison hands to the runs: its data and its pretrained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from goat_kernels.finetuning.models import BaseModel


class Data(NamedTuple):
    """A task's data and model, loaded.

    Attributes:
        training: seed -> the examples to train on; tasks with rare data draw them.
        validation, test: data sets of dicts: to choose the learning rate on, and to report.
        collate: list of dicts -> batch.
        base: seed -> the pretrained model, its new classifier's weights drawn with the seed.
        digest: of all the data, so that results of other data are told apart.
        questions: "validation" and "test" -> questions, where the task asks any: a text with each of several
            continuations of equal length, tokens [choices, prompt + answer], and the index of its own.
    """

    training: Callable[[int], Dataset]
    validation: Dataset
    test: Dataset
    collate: Callable[[list[dict]], dict[str, Tensor]]
    base: Callable[[int], BaseModel]
    digest: str
    questions: dict[str, Sequence[tuple[Tensor, int]]] | None = None
