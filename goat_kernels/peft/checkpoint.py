"""An adapter outside any model: read from a folder as tensors and fields, written to a folder at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from goat_kernels.files import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, written_whole
from goat_kernels.peft.integrity import may_unpickle, read_shapes, stamp

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Checkpoint:
    """The fields of ``adapter_config.json`` and the tensors, keyed as in the file."""

    folder: Path
    fields: dict
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class ConvertedAdapter:
    """An adapter to be written: a configuration and the tensors of its file."""

    config: PeftConfig
    tensors: dict[str, Tensor]

    def save(self, folder: str | Path, *, overwrite: bool = False, notes: dict | None = None) -> None:
        """Write an adapter folder, whole or not at all.

        Args:
            folder: where to; must not exist unless ``overwrite``.
            overwrite: replace the adapter's files in an existing folder.
            notes: name -> content of JSON files to write beside.

        Raises:
            FileExistsError: ``folder`` exists and ``overwrite`` is not set.
        """
        folder = Path(folder)
        if folder.exists() and not overwrite:
            raise FileExistsError(f"output folder {str(folder)!r} exists; name a new one, or ask to overwrite it")
        with written_whole(folder) as temporary:
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.tensors.items()}
            save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            self.config.save_pretrained(str(temporary))
            if "GOAT" in str(self.config.peft_type):
                stamp(temporary)
            for name, content in (notes or {}).items():
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_checkpoint(folder: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Read an adapter folder of any kind.

    Raises:
        ValueError: no adapter there, a damaged file, or a pickled one without ``allow_pickle``.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{str(folder)!r} has no {CONFIG_FILE}; a folder with a saved adapter is needed")
    try:
        fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not JSON ({error})") from error
    if (folder / WEIGHTS_FILE).is_file():
        read_shapes(folder / WEIGHTS_FILE)
        return Checkpoint(folder, fields, load_file(folder / WEIGHTS_FILE))
    if not (folder / PICKLE_FILE).is_file():
        raise ValueError(f"{str(folder)!r} has no {WEIGHTS_FILE}")
    if not may_unpickle(allow_pickle):
        raise ValueError(
            f"{folder / PICKLE_FILE} is a pickle, which is not opened unless asked; if you trust the file, pass "
            "allow_pickle=True (--allow-pickle): it is then read with weights_only=True"
        )
    return Checkpoint(folder, fields, torch.load(folder / PICKLE_FILE, map_location="cpu", weights_only=True))


def wide(tensor: Tensor) -> Tensor:
    """As a master weight: float32, or float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
