"""What an adapter's folder holds: is it whole and of one adapter, read as fields and tensors, written at once.

The checks come before a model is touched, and need no configuration object: what they compare with is handed in.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from goat_kernels.files import CONFIG_FILE, PICKLE_FILE, SAVING, WEIGHTS_FILE, written_whole
from goat_kernels.peft.adapter import present_name
from goat_kernels.settings import AdapterSettings

#: How the keys of an adapter's file begin.
PREFIX = "base_model.model."

#: Set to 1, lets adapters load from .bin files in places where no argument reaches.
PICKLE_VARIABLE = "GOAT_KERNELS_ALLOW_PICKLE"

_ADAPTER = ".goat_adapter."

#: What an adapter's tensors may be, as safetensors calls it; torch would cast anything else without a word.
_DTYPES = ("F16", "BF16", "F32", "F64")


def check_pickle_allowed(file: Path, allow_pickle: bool) -> None:
    """Raise unless the caller asked for pickled files, by argument or by ``GOAT_KERNELS_ALLOW_PICKLE=1``."""
    if not allow_pickle and os.environ.get(PICKLE_VARIABLE) != "1":
        raise ValueError(
            f"{file} is a pickle, which is not opened unless asked: save the adapter as safetensors, or, if you trust "
            f"the file, pass allow_pickle=True (--allow-pickle for a command, or set {PICKLE_VARIABLE}=1); it is then "
            "read with weights_only=True"
        )


def has_weights(folder: Path) -> bool:
    """Whether an adapter's weights lie in ``folder``, in either format."""
    return (folder / WEIGHTS_FILE).is_file() or (folder / PICKLE_FILE).is_file()


def check_adapter_folder(
    folder: Path, settings_of: Callable[[str], AdapterSettings], *, weights_sha256: str | None, allow_pickle: bool
) -> dict[str, tuple[int, int]]:
    """Raise unless the weights in ``folder`` are whole and fit the configuration; a folder without weights passes.

    Checked are the file's header and length, its digest where the configuration has ``weights_sha256``, and the dtypes
    and shapes of its tensors against what ``settings_of`` a module's name says. A pickled file needs ``allow_pickle``.

    Returns:
        Module name -> (out_features, in_features) of every adapted module in the file.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        if (folder / PICKLE_FILE).is_file():
            check_pickle_allowed(folder / PICKLE_FILE, allow_pickle)
        return {}
    shapes = read_shapes(file)
    if weights_sha256 is not None and sha256(file) != weights_sha256:
        raise ValueError(
            f"{file} is not the file that was saved with {CONFIG_FILE}: its SHA-256 differs, so it was damaged, "
            "changed or mixed up with another. Get the adapter again; if you changed the file on purpose, remove "
            f"weights_sha256 from {CONFIG_FILE}"
        )
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        module, adapter, tensor = present_name(key).rpartition(_ADAPTER)
        if adapter:
            modules.setdefault(module.removeprefix(PREFIX), {})[tensor] = shape
    found = {}
    for name, tensors in modules.items():
        settings = settings_of(name)
        N = tensors.get("lora_A", (0, None))[-1]
        M = tensors.get("lora_B", (None,))[0]
        needed = settings.shapes(N, M)
        for tensor, shape in tensors.items():
            need = needed.get(tensor, shape)
            if len(shape) != len(need) or any(n not in (None, m) for m, n in zip(shape, need, strict=True)):
                raise ValueError(
                    f"{file}: {name}.{tensor} has shape {list(shape)}, but r={settings.r} and "
                    f"num_experts={settings.num_experts} in {CONFIG_FILE} need {list(need)}; weights and configuration "
                    "are not from the same adapter"
                )
        if M is not None and N is not None:
            found[name] = (M, N)
    if not found:
        raise ValueError(f"{file} holds no GOAT adapter, though {CONFIG_FILE} beside it is that of one")
    return found


def config_of_killed_save(folder: Path, weights_sha256: str | None) -> Path | None:
    """The folder of the configuration that belongs to the weights in ``folder``, where the one beside them does not.

    So it is after a save that was killed between renaming the weights and renaming the configuration; the digest says
    which configuration is the right one. None in every other case.
    """
    place, saves, weights = folder.absolute(), f"{SAVING}*.tmp", folder / WEIGHTS_FILE
    further = f"{saves}/{glob.escape(place.name)}/{CONFIG_FILE}"  # a further adapter's, in a subfolder
    prepared = [*place.glob(f"{saves}/{CONFIG_FILE}"), *place.parent.glob(further)]
    if not prepared or not weights.is_file():
        return None
    digest = sha256(weights)
    if weights_sha256 == digest:
        return None
    for file in prepared:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(file.read_text(encoding="utf-8")).get("weights_sha256") == digest:
                return file.parent
    return None


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape, from the header of a safetensors file; reading it checks that the file has its full length.

    Raises:
        ValueError: the file is damaged, or a tensor of an adapter has another dtype than a floating-point one.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            for key, tensor in slices.items():
                if _ADAPTER in present_name(key) and tensor.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{file}: {key} is of dtype {tensor.get_dtype()}; an adapter's tensors are of one of "
                        f"{', '.join(_DTYPES)}"
                    )
            return {key: tuple(tensor.get_shape()) for key, tensor in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is no complete safetensors file; it was cut short or damaged ({error}). Get the adapter again"
        ) from error


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def stamp(folder: Path) -> None:
    """Write the digest of the weights in ``folder`` into the configuration beside them."""
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if config.is_file() and weights.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        content["weights_sha256"] = sha256(weights)
        config.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


# --- an adapter outside any model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvertedAdapter:
    """An adapter to be written: a configuration and the tensors of its file."""

    config: PeftConfig
    tensors: dict[str, Tensor]

    def save(self, folder: str | Path, *, overwrite: bool = False, notes: dict | None = None) -> None:
        """Write an adapter folder, whole or not at all, with ``notes`` (name -> content) as JSON files beside.

        Raises:
            FileExistsError: ``folder`` exists and ``overwrite``, which replaces its files, is not set.
        """
        check_new(folder, overwrite)
        with written_whole(Path(folder)) as temporary:
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.tensors.items()}
            save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            self.config.save_pretrained(str(temporary))
            if "GOAT" in str(self.config.peft_type):
                stamp(temporary)
            for name, content in (notes or {}).items():
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_new(folder: str | Path, overwrite: bool) -> None:
    """Raise FileExistsError where ``folder`` exists and is not to be overwritten."""
    if Path(folder).exists() and not overwrite:
        raise FileExistsError(f"output folder {str(folder)!r} exists; name a new one, or ask to overwrite it")


def read_checkpoint(folder: str | Path, *, allow_pickle: bool = False) -> tuple[dict, dict[str, Tensor]]:
    """(the fields of ``adapter_config.json``, key -> tensor) of an adapter folder of any kind.

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
        return fields, load_file(folder / WEIGHTS_FILE)
    if not (folder / PICKLE_FILE).is_file():
        raise ValueError(f"{str(folder)!r} has no {WEIGHTS_FILE}")
    check_pickle_allowed(folder / PICKLE_FILE, allow_pickle)
    return fields, torch.load(folder / PICKLE_FILE, map_location="cpu", weights_only=True)
