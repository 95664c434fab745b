"""Is the adapter's file whole, and is it what its configuration says? Asked before a model is touched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from goat_kernels.files import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, prepared_config_files
from goat_kernels.peft.adapter import present_name

if TYPE_CHECKING:
    from goat_kernels.peft.config import GoatConfig

#: Set to 1, lets adapters load from .bin files in places where no argument reaches.
PICKLE_VARIABLE = "GOAT_KERNELS_ALLOW_PICKLE"

_PREFIX = "base_model.model."
_ADAPTER = ".goat_adapter."

#: What an adapter's tensors may be, as safetensors calls it; torch would cast anything else without a word.
_DTYPES = ("F16", "BF16", "F32", "F64")


def may_unpickle(allow_pickle: bool) -> bool:
    """Whether the caller asked for pickled files, by argument or by ``GOAT_KERNELS_ALLOW_PICKLE=1``."""
    return allow_pickle or os.environ.get(PICKLE_VARIABLE) == "1"


def has_weights(folder: Path) -> bool:
    """Whether an adapter's weights lie in ``folder``, in either format."""
    return (folder / WEIGHTS_FILE).is_file() or (folder / PICKLE_FILE).is_file()


def check_adapter_folder(folder: Path, config: GoatConfig) -> dict[str, tuple[int, int]]:
    """Raise unless the weights in ``folder`` are whole and fit ``config``; a folder without weights passes.

    Checked are the file's header and length, its SHA-256 where the configuration has it (every adapter saved through
    PEFT's ``save_pretrained`` does), and the dtypes and shapes of its tensors against r, num_experts and the patterns.

    Returns:
        Module name -> (out_features, in_features) of every adapted module in the file.

    Raises:
        ValueError: a damaged or changed file, one that does not fit the configuration, or a pickled one that nobody
            asked for.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        if (folder / PICKLE_FILE).is_file() and not may_unpickle(config.allow_pickle):
            raise ValueError(
                f"{folder / PICKLE_FILE} is a pickle, which is not opened unless asked: save the adapter as "
                f"safetensors, or, if you trust the file, pass allow_pickle=True (or set {PICKLE_VARIABLE}=1); "
                "it is then read with weights_only=True"
            )
        return {}
    shapes = read_shapes(file)
    if config.weights_sha256 is not None and sha256(file) != config.weights_sha256:
        raise ValueError(
            f"{file} is not the file that was saved with {CONFIG_FILE}: its SHA-256 differs, so it was damaged, "
            "changed or mixed up with another. Get the adapter again; if you changed the file on purpose, remove "
            f"weights_sha256 from {CONFIG_FILE}"
        )
    return _check_shapes(file, shapes, config)


def config_of_killed_save(folder: Path, config: GoatConfig) -> Path | None:
    """The folder of the configuration that belongs to the weights in ``folder``, where ``config`` does not.

    So it is after a save that was killed between renaming the weights and renaming the configuration; the digest says
    which configuration is the right one. None in every other case.
    """
    prepared, weights = prepared_config_files(folder), folder / WEIGHTS_FILE
    if not prepared or not weights.is_file():
        return None
    digest = sha256(weights)
    if config.weights_sha256 == digest:
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


def _check_shapes(file: Path, shapes: dict[str, tuple[int, ...]], config: GoatConfig) -> dict[str, tuple[int, int]]:
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        module, adapter, tensor = present_name(key).rpartition(_ADAPTER)
        if adapter:
            modules.setdefault(module.removeprefix(_PREFIX), {})[tensor] = shape
    found = {}
    for name, tensors in modules.items():
        settings = config.settings(name)
        R, E = settings.r, settings.num_experts
        N = tensors.get("lora_A", (0, None))[-1]
        M = tensors.get("lora_B", (None,))[0]
        needed = {
            "lora_A": (settings.expert_rank if settings.init == "hydralora" else R, N),
            "lora_B": (M, R),
            "router": (E, N),
            "residual_A": (R, N),
            "residual_B": (M, R),
            "scaling": (E,),
        }
        for tensor, shape in tensors.items():
            need = needed.get(tensor, shape)
            if len(shape) != len(need) or any(n not in (None, m) for m, n in zip(shape, need, strict=True)):
                raise ValueError(
                    f"{file}: {name}.{tensor} has shape {list(shape)}, but r={R} and num_experts={E} in {CONFIG_FILE} "
                    f"need {list(need)}; weights and configuration are not from the same adapter"
                )
        if M is not None and N is not None:
            found[name] = (M, N)
    if not found:
        raise ValueError(f"{file} holds no GOAT adapter, though {CONFIG_FILE} beside it is that of one")
    return found


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
