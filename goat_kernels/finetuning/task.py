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


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batch_size: int, device: torch.device, description: str) -> dict:
    """Run ``model`` over the held-out data, with a progress bar; returns what ``results`` says of the evaluation."""
    model.eval()
    accuracy = task.metric == "accuracy"
    scores: list[Tensor] = []
    load: dict[str, Tensor | float] = defaultdict(float)
    loader = DataLoader(task.held_out, batch_size=batch_size, collate_fn=task.collate)
    for batch in tqdm(loader, desc=description, unit="batch", leave=False):
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits
        scores.append((_correct if accuracy else _block_losses)(logits, labels).cpu())
        for name, layer in router_statistics(model).items():
            load[name] += torch.tensor(layer.load) * len(labels)
    score = torch.cat(scores).double()
    count, held_out, error = len(score), score.mean().item(), None
    if accuracy:
        error = math.sqrt(held_out * (1 - held_out) / count)
    else:
        held_out = score.mean().exp().item()
        if count > 1:
            error = held_out * score.std().item() / math.sqrt(count)  # d exp(m) = exp(m) dm
    return {
        "metric": task.metric,
        "held_out": held_out,
        "held_out_standard_error": error,
        "held_out_examples": count,
        "load_by_layer": {name: (total / count).tolist() for name, total in load.items()},
    }


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=-1) == labels) & ~logits.isnan().any(dim=-1)


def _block_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of each sequence [batch] over the tokens that have one, in float32."""
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return losses.sum(dim=1) / (labels[:, 1:] != IGNORED).sum(dim=1)
