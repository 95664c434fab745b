"""The built-in task: scikit-learn's digits, and a small ViT pretrained on a part of them.

Real images that every installation of scikit-learn has, real transformers code, and a task on which adaptation is
needed. The model is pretrained on the digits 0-5 as they are; the task is all ten digits, white exchanged with black
and turned by a quarter: four classes the model has never seen, in an appearance it has never seen. A new
classifier on the frozen model therefore stays far below any method that changes the model. Half of the images are held
out before anything is trained, so neither stage has seen them in either appearance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import sklearn
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, default_data_collator

from goat_kernels.finetuning.columns import describe_classes
from goat_kernels.finetuning.data import split
from goat_kernels.finetuning.models import base_model
from goat_kernels.finetuning.options import FinetuneOptions, TrainingOptions
from goat_kernels.finetuning.pretraining import digest, pretrained
from goat_kernels.finetuning.tasks import Task

_HELD_OUT_FRACTION = 0.5
_PRETRAINING_CLASSES = 6


@dataclass(frozen=True)
class Pretraining:
    """The model and how it is pretrained; part of the cache's key."""

    hidden_size: int = 64
    layers: int = 4
    heads: int = 4
    patch_size: int = 2
    learning_rate: float = 1e-3
    batch_size: int = 32
    steps: int = 400
    seed: int = 0

    def plan(self, device: str) -> TrainingOptions:
        """As the training takes it."""
        return TrainingOptions(
            learning_rates={},
            epochs=0,
            max_steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            device=device,
        )


#: A module constant so that tests can put a quicker one in its place.
PRETRAINING = Pretraining()


class Digits(Dataset):
    """Images [count, 1, 8, 8] with class ids, in memory."""

    def __init__(self, images: Tensor, ids: Tensor) -> None:
        self._images, self._ids = images, ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> dict:
        return {"pixel_values": self._images[i], "labels": int(self._ids[i])}


def digits_task(options: FinetuneOptions) -> Task:
    """The demonstration's task, its model pretrained now or taken from the cache."""
    images, ids = digits_data()
    folder, train_part, held_out_part = pretrained_digits(options.training.device, PRETRAINING)
    changed = changed_appearance(images)
    classes = tuple(str(i) for i in range(10))
    print(describe_classes(classes, ids[train_part].tolist(), ids[held_out_part].tolist()))
    return Task(
        description=(
            f"digits: ViT pretrained on 0-{_PRETRAINING_CLASSES - 1} as they are -> all ten, inverted and rotated; "
            f"{len(train_part)} images to train on, {len(held_out_part)} held out"
        ),
        train=Digits(changed[train_part], ids[train_part]),
        held_out=Digits(changed[held_out_part], ids[held_out_part]),
        collate=default_data_collator,
        base=base_model(
            str(folder),
            AutoModelForImageClassification,
            options.training.seed,
            options.training.dtype,
            num_labels=10,
            id2label={i: str(i) for i in range(10)},
            label2id={str(i): i for i in range(10)},
        ),
        metric="accuracy",
        classes=classes,
    )


def digits_data() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in -1..1, and classes [1797]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(digits.target, dtype=torch.long)


def changed_appearance(images: Tensor) -> Tensor:
    """Black and white exchanged, and a quarter turn."""
    return torch.rot90(-images, 1, (2, 3)).contiguous()


def _model_config(pretraining: Pretraining) -> ViTConfig:
    return ViTConfig(
        image_size=8,
        patch_size=pretraining.patch_size,
        num_channels=1,
        hidden_size=pretraining.hidden_size,
        num_hidden_layers=pretraining.layers,
        num_attention_heads=pretraining.heads,
        intermediate_size=4 * pretraining.hidden_size,
        num_labels=_PRETRAINING_CLASSES,
    )


def pretrained_digits(device: str, pretraining: Pretraining) -> tuple[Path, list[int], list[int]]:
    """Folder of the model pretrained on the first classes, and the indices of the images (training, held out).

    The split depends on the pretraining's seed alone: the model has seen its training half.
    """
    images, ids = digits_data()
    train_part, held_out_part = split(len(ids), ids.tolist(), _HELD_OUT_FRACTION, pretraining.seed, "the digits")
    images, ids = images[train_part], ids[train_part]
    known = ids < _PRETRAINING_CLASSES
    images, ids = images[known], ids[known]
    config = _model_config(pretraining)

    def build() -> ViTForImageClassification:
        torch.manual_seed(pretraining.seed)
        return ViTForImageClassification(config)

    folder = pretrained(
        "digits-vit",
        build,
        Digits(images, ids),
        default_data_collator,
        pretraining.plan(device),
        pretraining.learning_rate,
        identity={"data": digest(images, ids), "pretraining": asdict(pretraining), "sklearn": sklearn.__version__},
        config=config,
    )
    return folder, train_part, held_out_part
