"""The built-in task: scikit-learn's digits, and a small ViT pretrained on a part of them.

Real images that every installation of scikit-learn has, real transformers code, and a task on which adaptation is
needed. The model is pretrained on the digits 0-5 as they are; the task is all ten digits, white exchanged with black
and turned by a quarter: four classes the model has never seen, in an appearance it has never seen. A new
classifier on the frozen model therefore stays far below any method that changes the model. Half of the images are held
out before anything is trained, so neither stage has seen them in either appearance.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import sklearn
import torch
import transformers
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, default_data_collator

from goat_kernels.cli.data import split
from goat_kernels.cli.errors import CommandError
from goat_kernels.cli.files import atomic_path, write_json
from goat_kernels.cli.models import base_model
from goat_kernels.cli.options import FinetuneOptions, TrainingOptions
from goat_kernels.cli.tasks import Task
from goat_kernels.cli.train import train

#: Names the cache folder.
CACHE_VARIABLE = "GOAT_KERNELS_CACHE"

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
    images, ids = _digits()
    # The split does not depend on --seed: the cached model was pretrained on this training half.
    train_part, held_out_part = split(len(ids), ids.tolist(), _HELD_OUT_FRACTION, PRETRAINING.seed, "the digits")
    folder = _pretrained_model(images[train_part], ids[train_part], options.training.device)
    changed = _changed_appearance(images)
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
        classes=tuple(str(i) for i in range(10)),
    )


def cache_folder() -> Path:
    """$GOAT_KERNELS_CACHE, else goat-kernels in $XDG_CACHE_HOME, else in ~/.cache."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "goat-kernels"


def _digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in -1..1, and classes [1797]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(digits.target, dtype=torch.long)


def _changed_appearance(images: Tensor) -> Tensor:
    return torch.rot90(-images, 1, (2, 3)).contiguous()


def _model_config() -> ViTConfig:
    return ViTConfig(
        image_size=8,
        patch_size=PRETRAINING.patch_size,
        num_channels=1,
        hidden_size=PRETRAINING.hidden_size,
        num_hidden_layers=PRETRAINING.layers,
        num_attention_heads=PRETRAINING.heads,
        intermediate_size=4 * PRETRAINING.hidden_size,
        num_labels=_PRETRAINING_CLASSES,
    )


def _cache_key(images: Tensor, ids: Tensor) -> str:
    """A hash of everything that determines the pretrained weights."""
    config = {name: value for name, value in _model_config().to_dict().items() if name != "transformers_version"}
    content = {
        "data": hashlib.sha256(images.numpy().tobytes() + ids.numpy().tobytes()).hexdigest(),
        "config": config,
        "pretraining": asdict(PRETRAINING),
        "versions": [torch.__version__, transformers.__version__, sklearn.__version__],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _pretrained_model(images: Tensor, ids: Tensor, device: str) -> Path:
    """Folder of the model pretrained on the first classes among ``images``; trains it where the cache has none."""
    known = ids < _PRETRAINING_CLASSES
    images, ids = images[known], ids[known]
    folder = cache_folder() / f"digits-vit-{_cache_key(images, ids)}"
    if (folder / "config.json").is_file():
        print(f"pretrained model: {folder} (cached)")
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"the cache folder {str(folder.parent)!r} cannot be made ({error.strerror}); "
            f"{CACHE_VARIABLE} needs to name one that can"
        ) from None
    plan = TrainingOptions(
        learning_rates={},
        epochs=0,
        max_steps=PRETRAINING.steps,
        batch_size=PRETRAINING.batch_size,
        seed=PRETRAINING.seed,
        device=device,
    )

    def build() -> ViTForImageClassification:
        torch.manual_seed(PRETRAINING.seed)
        return ViTForImageClassification(_model_config())

    with TemporaryDirectory() as scratch:
        model, record = train(
            build,
            Digits(images, ids),
            default_data_collator,
            plan,
            PRETRAINING.learning_rate,
            Path(scratch),
            description="pretraining",
        )
    with atomic_path(folder) as temporary:
        model.cpu().save_pretrained(temporary)
        write_json(temporary / "pretraining.json", {**asdict(PRETRAINING), "final_loss": record.losses[-1]})
    print(f"pretrained model: {folder} (new)")
    return folder
