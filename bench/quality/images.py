"""Image classification: the demonstration's ViT, pretrained on the digits 0-5, moves on to three other tasks.

The pretraining and every task's training data come from one half of the digits, validation and test data from the
other. The photographs have tiles that do not overlap, dealt at random.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn.functional import avg_pool2d
from transformers import AutoModelForImageClassification, default_data_collator

from goat_kernels.finetuning import demo
from goat_kernels.finetuning.demo import changed_appearance, digits_data, pretrained_digits
from goat_kernels.finetuning.examples import Tensors
from goat_kernels.finetuning.models import BaseModel, base_model
from goat_kernels.finetuning.pretraining import digest

_QUICK = demo.Pretraining(hidden_size=32, layers=1, heads=2, patch_size=4, steps=3)
_QUICK_EXAMPLES = 24

#: Part of the held-out images that the learning rate is chosen on; the rest is the test data.
_VALIDATION_FRACTION = 1 / 3

#: Training images per class of the rare digits.
_RARE = 15

#: Side of a tile in the photographs, in pixels; halved to the model's 8x8.
_TILE = 16
# Not three: a model with as many classes as the pretrained one would keep that one's classifier.
_BANDS = 4

#: Of the 2080 tiles the first 1200 are to train on, the next 300 to choose on, the rest is the test data.
_TILES_TO_TRAIN, _FIRST_TEST_TILE = 1200, 1500


def turned_digits(quick: bool) -> dict[str, object]:
    """All ten digits, in the demonstration's changed appearance."""
    images, ids = digits_data()
    return _digits_task(changed_appearance(images), ids, None, quick)


def rare_digits(quick: bool) -> dict[str, object]:
    """Noisy digits, two of eight columns covered; ``_RARE`` training images per class, drawn with the seed."""
    images, ids = digits_data()
    generator = torch.Generator().manual_seed(0)
    noisy = images + 0.3 * torch.randn(images.shape, generator=generator)
    # Two columns of eight are covered, another pair in each image.
    covered = torch.randint(0, 7, (len(images), 1), generator=generator) + torch.arange(2)  # [count, 2]
    columns = torch.zeros(len(images), 8).scatter_(1, covered, 1.0)[:, None, None, :]
    return _digits_task(torch.where(columns > 0, torch.tensor(0.0), noisy), ids, _RARE, quick)


def photo_tiles(quick: bool) -> dict[str, object]:
    """Grey tiles [count, 1, 8, 8] of scikit-learn's two photographs; the classes are four horizontal bands of each."""
    tiles, ids = _tiles()
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    train, validation, test = (part.tolist() for part in order.tensor_split([_TILES_TO_TRAIN, _FIRST_TEST_TILE]))
    return _task(tiles, ids, train, validation, test, None, quick)


def _digits_task(images: Tensor, ids: Tensor, per_class: int | None, quick: bool) -> dict[str, object]:
    _, train, held_out = _pretrained(quick)
    random.Random(0).shuffle(held_out)
    count = round(_VALIDATION_FRACTION * len(held_out))
    return _task(images, ids, train, held_out[:count], held_out[count:], per_class, quick)


def _task(
    images: Tensor,
    ids: Tensor,
    train: list[int],
    validation: list[int],
    test: list[int],
    per_class: int | None,
    quick: bool,
) -> dict[str, object]:
    folder, _, _ = _pretrained(quick)
    if quick:
        validation, test = validation[:_QUICK_EXAMPLES], test[:_QUICK_EXAMPLES]

    def part(indices: list[int]) -> Tensors:
        return Tensors(pixel_values=images[indices], labels=ids[indices])

    def training(seed: int) -> Tensors:
        if per_class is None:
            return part(train)
        rng = random.Random(seed)
        chosen = []
        for label in range(int(ids.max()) + 1):
            chosen += rng.sample([i for i in train if int(ids[i]) == label], per_class)
        return part(chosen)

    def base(seed: int) -> BaseModel:
        return base_model(str(folder), AutoModelForImageClassification, seed, "float32", num_labels=int(ids.max()) + 1)

    return {
        "training": training,
        "validation": part(validation),
        "test": part(test),
        "collate": default_data_collator,
        "base": base,
        "digest": digest(images, ids, *map(torch.tensor, (train, validation, test))),
    }


def _pretrained(quick: bool):
    return pretrained_digits("auto", _QUICK if quick else demo.PRETRAINING)


def _tiles() -> tuple[Tensor, Tensor]:
    """Tiles [count, 1, 8, 8] in -1..1, and classes [count]."""
    tiles, ids = [], []
    for number, photograph in enumerate(load_sample_images().images):
        grey = torch.from_numpy(np.asarray(photograph, dtype=np.float32)).mean(dim=2)
        rows, columns = (side // _TILE for side in grey.shape)
        small = avg_pool2d(grey[None, : rows * _TILE, : columns * _TILE], 2)[0] / 127.5 - 1
        side = _TILE // 2
        for row in range(rows):
            for column in range(columns):
                tiles.append(small[row * side : (row + 1) * side, column * side : (column + 1) * side])
                ids.append(number * _BANDS + row * _BANDS // rows)
    return torch.stack(tiles)[:, None].contiguous(), torch.tensor(ids)
