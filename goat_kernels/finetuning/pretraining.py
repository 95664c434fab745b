"""Small models that are pretrained here, once, and cached ($GOAT_KERNELS_CACHE, else ~/.cache/goat-kernels)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, default_data_collator

from goat_kernels.command_errors import CommandError
from goat_kernels.files import write_json, written_whole
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
