"""What is learned: data, a base model and a metric; and measuring a trained model on the held-out data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from goat_kernels.finetuning.examples import IGNORED
from goat_kernels.finetuning.models import BaseModel
from goat_kernels.training import router_statistics


@dataclass(frozen=True)
class Task:
    """Everything that the methods share.

    Attributes:
        description: one line for the report.
        train: data set of dicts, for training.
        held_out: the same, for measuring.
        collate: list of dicts -> batch.
        base: the pretrained model.
        metric: ``"accuracy"`` or ``"perplexity"``.
    """

    description: str
    train: Dataset
    held_out: Dataset
    collate: Callable[[list[dict]], dict[str, Tensor]]
    base: BaseModel
    metric: str


@dataclass(frozen=True)
class Evaluation:
    """What the held-out data says.

    Attributes:
        metric: the task's.
        held_out: accuracy in 0..1 (an output that is NaN counts as wrong), or perplexity, which may be NaN or infinite.
        held_out_standard_error: sqrt(p (1 - p) / n) of an accuracy p; of a perplexity, from the spread of the blocks'
            losses; None where there is too little data to tell.
        held_out_examples: n.
        load_by_layer: layer name -> share of the tokens that use each expert (sums to K); empty without routers.
    """

    metric: str
    held_out: float
    held_out_standard_error: float | None
    held_out_examples: int
    load_by_layer: dict[str, list[float]]


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batch_size: int, device: torch.device, description: str) -> Evaluation:
    """Run ``model`` over the held-out data, with a progress bar."""
    model.eval()
    scores: list[Tensor] = []
    load: dict[str, Tensor | float] = defaultdict(float)
    loader = DataLoader(task.held_out, batch_size=batch_size, collate_fn=task.collate)
    for batch in tqdm(loader, desc=description, unit="batch", leave=False):
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits
        scores.append((_correct if task.metric == "accuracy" else _block_losses)(logits, labels).cpu())
        for name, layer in router_statistics(model).items():
            load[name] += torch.tensor(layer.load) * len(labels)
    score = torch.cat(scores).double()
    value, standard_error = (_accuracy if task.metric == "accuracy" else _perplexity)(score)
    shares = {name: (total / len(score)).tolist() for name, total in load.items()}
    return Evaluation(task.metric, value, standard_error, len(score), shares)


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=-1) == labels) & ~logits.isnan().any(dim=-1)


def _block_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of each sequence [batch] over the tokens that have one, in float32."""
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return losses.sum(dim=1) / (labels[:, 1:] != IGNORED).sum(dim=1)


def _accuracy(correct: Tensor) -> tuple[float, float]:
    p = correct.mean().item()
    return p, math.sqrt(p * (1 - p) / len(correct))


def _perplexity(losses: Tensor) -> tuple[float, float | None]:
    """exp of the mean loss, and its standard error: d exp(m) = exp(m) dm."""
    value = losses.mean().exp().item()
    if len(losses) < 2:
        return value, None
    return value, value * losses.std().item() / math.sqrt(len(losses))
