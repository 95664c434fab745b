"""Image classification: the demonstration's ViT, pretrained on the digits 0-5, moves on to three other tasks.

The pretraining and every task's training data come from one half of the digits, validation and test data from the
other. The photographs have tiles that do not overlap, dealt at random.
"""

from __future__ import annotations

import random

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import StackDataset
from transformers import AutoModelForImageClassification, default_data_collator

from bench.quality.data import Data
from goat_kernels.finetuning import pretraining
from goat_kernels.finetuning.models import base_model

#: Training images per class of the rare digits.
_RARE = 15

#: Side of a tile in the photographs, in pixels; halved to the model's 8x8.
_TILE = 16
# Not three: a model with as many classes as the pretrained one would keep that one's classifier.
_BANDS = 4

#: Of the 2080 tiles the first 1200 are to train on, the next 300 to choose on, the rest is the test data.
_TILES_TO_TRAIN, _FIRST_TEST_TILE = 1200, 1500


def turned_digits() -> Data:
    """All ten digits, black and white exchanged and turned by a quarter; pretrained on 0-5 as they are."""
    images, ids = pretraining.digits_data()
    return _task(pretraining.changed_appearance(images), ids)


def rare_digits() -> Data:
    """All ten digits, noisy and partly covered, fifteen examples of each; the same pretrained model.

    The seed draws the training examples. Two columns of eight are covered, another pair in each image.
    """
    images, ids = pretraining.digits_data()
    generator = torch.Generator().manual_seed(0)
    noisy = images + 0.3 * torch.randn(images.shape, generator=generator)
    covered = torch.randint(0, 7, (len(images), 1), generator=generator) + torch.arange(2)  # [count, 2]
    columns = torch.zeros(len(images), 8).scatter_(1, covered, 1.0)[:, None, None, :]
    return _task(noisy.masked_fill(columns > 0, 0.0), ids, per_class=_RARE)


def photo_tiles() -> Data:
    """Which of eight regions of two photographs a tile of 16x16 pixels comes from; the same pretrained model.

    The regions are four horizontal bands of each of scikit-learn's photographs.
    """
    tiles, ids, side = [], [], _TILE // 2
    for number, photograph in enumerate(load_sample_images().images):
        grey = torch.from_numpy(photograph.astype("float32")).mean(dim=2)
        rows, columns = (size // _TILE for size in grey.shape)
        small = avg_pool2d(grey[None, : rows * _TILE, : columns * _TILE], 2)[0] / 127.5 - 1
        tiles.append(small.unfold(0, side, side).unfold(1, side, side).reshape(-1, 1, side, side))
        bands = torch.arange(rows) * _BANDS // rows
        ids.append(number * _BANDS + bands.repeat_interleave(columns))
    order = torch.randperm(sum(map(len, ids)), generator=torch.Generator().manual_seed(0))
    parts = [part.tolist() for part in order.tensor_split([_TILES_TO_TRAIN, _FIRST_TEST_TILE])]
    return _task(torch.cat(tiles), torch.cat(ids), parts)


def _task(images: Tensor, ids: Tensor, parts: list[list[int]] | None = None, per_class: int | None = None) -> Data:
    """Data of the images whose indices are in ``parts`` (training, validation, test).

    Args:
        images, ids: of all examples.
        parts: None takes the digits' halves: a third of the held-out one is the validation data.
        per_class: draw so many training images of each class with the seed, in place of all.
    """
    folder, train, held_out = pretraining.pretrained_digits("auto", pretraining.PRETRAINING)
    if parts is None:
        random.Random(0).shuffle(held_out)
        count = round(len(held_out) / 3)
        parts = [train, held_out[:count], held_out[count:]]
    train, *others = parts
    classes = int(ids.max()) + 1

    def part(indices: list[int]) -> StackDataset:
        return StackDataset(pixel_values=images[indices], labels=ids[indices])

    def training(seed: int) -> StackDataset:
        if per_class is None:
            return part(train)
        rng = random.Random(seed)
        of_classes = [[i for i in train if int(ids[i]) == label] for label in range(classes)]
        return part([i for of_class in of_classes for i in rng.sample(of_class, per_class)])

    return Data(
        training,
        *map(part, others),
        default_data_collator,
        lambda seed: base_model(str(folder), AutoModelForImageClassification, seed, "float32", num_labels=classes),
        pretraining.digest(images, ids, *map(torch.tensor, parts)),
    )
