"""Small models that are pretrained here, once, and cached; the digits.

The built-in task is scikit-learn's digits, with a small ViT pretrained on a part of them: real images that every
installation of scikit-learn has, real transformers code, and a task on which adaptation is needed. The model is
pretrained on the digits 0-5 as they are; the task is all ten digits, white exchanged with black and turned by a
quarter. A new classifier on the frozen model therefore stays far below any method that changes the model. Half of the
images are held out before anything is trained, so neither stage has seen them in either appearance.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import sklearn
import torch
import transformers
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset, StackDataset
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig, ViTForImageClassification, default_data_collator

from goat_kernels.command_errors import CommandError
from goat_kernels.files import write_json, written_whole
from goat_kernels.finetuning.data import split
from goat_kernels.finetuning.options import FinetuneOptions
from goat_kernels.finetuning.train import train

#: Names the cache folder.
CACHE_VARIABLE = "GOAT_KERNELS_CACHE"


def cache_folder() -> Path:
    """$GOAT_KERNELS_CACHE, else goat-kernels in $XDG_CACHE_HOME, else in ~/.cache."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "goat-kernels"


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' values."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def pretrained(
    name: str,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dataset: Dataset,
    options: FinetuneOptions,
    learning_rate: float,
    *,
    identity: dict[str, object],
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """Folder of a pretrained model; trains it where the cache has none.

    Args:
        name: the folder's name begins with it.
        model_class, config: of the model; its random weights come from the options' seed.
        dataset, options, learning_rate: see ``train.train``.
        identity: with ``config`` and the versions of torch and transformers everything that determines the weights.
        beside: writes what belongs into the folder beside the model, such as a tokenizer.

    Raises:
        CommandError: the cache folder cannot be made, or the training diverged.
    """

    def build() -> PreTrainedModel:
        torch.manual_seed(options.seed)
        return model_class(config)

    fields = {field: value for field, value in config.to_dict().items() if field != "transformers_version"}
    content = {"identity": identity, "config": fields, "versions": [torch.__version__, transformers.__version__]}
    key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{name}-{key}"
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
    with TemporaryDirectory() as scratch:
        description = f"pretraining {name}"
        model, record = train(
            build, dataset, default_data_collator, options, learning_rate, Path(scratch), description=description
        )
    if record["diverged_at_step"] is not None:
        raise CommandError(
            f"the pretraining of {name} diverged at step {record['diverged_at_step']}; nothing is cached"
        )
    with written_whole(folder) as temporary:
        model.cpu().save_pretrained(temporary)
        if beside is not None:
            beside(temporary)
        write_json(temporary / "pretraining.json", {**identity, "final_loss": record["losses"][-1]})
    print(f"pretrained model: {folder} (new)")
    return folder


# --- the digits ---------------------------------------------------------------------------------------------------

CLASSES = 6


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
    train_part, held_out_part = split(len(ids), ids.tolist(), 0.5, pretraining.seed, "the digits")
    known = [i for i in train_part if ids[i] < CLASSES]
    images, ids = images[known], ids[known]
    config = ViTConfig(
        image_size=8,
        patch_size=pretraining.patch_size,
        num_channels=1,
        hidden_size=pretraining.hidden_size,
        num_hidden_layers=pretraining.layers,
        num_attention_heads=pretraining.heads,
        intermediate_size=4 * pretraining.hidden_size,
        num_labels=CLASSES,
    )
    folder = pretrained(
        "digits-vit",
        ViTForImageClassification,
        config,
        StackDataset(pixel_values=images, labels=ids),
        FinetuneOptions(
            max_steps=pretraining.steps, batch_size=pretraining.batch_size, seed=pretraining.seed, device=device
        ),
        pretraining.learning_rate,
        identity={"data": digest(images, ids), "pretraining": asdict(pretraining), "sklearn": sklearn.__version__},
    )
    return folder, train_part, held_out_part
