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
from transformers import ViTConfig, ViTForImageClassification

from goat_kernels.finetuning.data import split
from goat_kernels.finetuning.examples import Tensors
from goat_kernels.finetuning.options import FinetuneOptions
from goat_kernels.finetuning.pretraining import digest, pretrained

_HELD_OUT_FRACTION = 0.5
PRETRAINING_CLASSES = 6


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


#: A module constant so that tests can put a quicker one in its place.
PRETRAINING = Pretraining()


def digits_data() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in -1..1, and classes [1797]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(digits.target, dtype=torch.long)


def changed_appearance(images: Tensor) -> Tensor:
    """Black and white exchanged, and a quarter turn."""
    return torch.rot90(-images, 1, (2, 3)).contiguous()


def pretrained_digits(device: str, pretraining: Pretraining) -> tuple[Path, list[int], list[int]]:
    """Folder of the model pretrained on the first classes, and the indices of the images (training, held out).

    The split depends on the pretraining's seed alone: the model has seen its training half.
    """
    images, ids = digits_data()
    train_part, held_out_part = split(len(ids), ids.tolist(), _HELD_OUT_FRACTION, pretraining.seed, "the digits")
    known = [i for i in train_part if ids[i] < PRETRAINING_CLASSES]
    images, ids = images[known], ids[known]
    config = ViTConfig(
        image_size=8,
        patch_size=pretraining.patch_size,
        num_channels=1,
        hidden_size=pretraining.hidden_size,
        num_hidden_layers=pretraining.layers,
        num_attention_heads=pretraining.heads,
        intermediate_size=4 * pretraining.hidden_size,
        num_labels=PRETRAINING_CLASSES,
    )
    folder = pretrained(
        "digits-vit",
        ViTForImageClassification,
        config,
        Tensors(pixel_values=images, labels=ids),
        FinetuneOptions(
            max_steps=pretraining.steps, batch_size=pretraining.batch_size, seed=pretraining.seed, device=device
        ),
        pretraining.learning_rate,
        identity={"data": digest(images, ids), "pretraining": asdict(pretraining), "sklearn": sklearn.__version__},
    )
    return folder, train_part, held_out_part
