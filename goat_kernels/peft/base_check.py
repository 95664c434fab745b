"""Is this the base model that the adapter was made on? A fingerprint of the adapted weights, saved with the adapter.

Of each adapted weight W0 [M, N] the configuration keeps ``"MxN dtype hex"``: eight entries, evenly spread over the
flattened weight, as float32. The same model is loaded in other dtypes, so entries of two float weights must agree to
the rounding of the coarser dtype. Where one of the two is quantised, all dequantised entries together must agree to
half of their norm: 4-bit rounding moves them by about a tenth, an unrelated model by 1.4 times their norm.

Not looked at, because reading them costs a transfer or a collective call: weights on the meta device, offloaded or
sharded ones; nor those whose quantisation cannot be undone.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from goat_kernels.peft.base_layer import features, has_plain_weight, is_meta, is_remote, pretrained_weight
from goat_kernels.peft.config import GoatConfig

_SAMPLES = 8
_QUANTISED = "quantised"

#: Two roundings, in units of the coarser dtype's eps; and float16 rounds small entries to multiples of 6e-8.
_ROUNDINGS = 2.0
_SMALLEST = {"float16": 6e-8}

#: Distance of dequantised samples, relative to their norm.
_QUANTISED_DISTANCE = 0.5


def fingerprint(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Module name -> ``"MxN dtype hex"`` of the base layers ``modules``; those that cannot be read are left out."""
    found = {}
    for name, base in modules.items():
        sampled = _sample(base, name)
        if sampled is not None:
            N, M = features(base)
            dtype, values = sampled
            found[name] = f"{M}x{N} {dtype} {struct.pack(f'<{_SAMPLES}f', *values).hex()}"
    return found


def _sample(base: nn.Module, name: str) -> tuple[str, list[float]] | None:
    """(dtype, entries) of W0 at the fixed places; None where it is not at hand."""
    weight = getattr(base, "weight", None)
    if weight is None or is_meta(base) or is_remote(base) or hasattr(weight, "full_tensor"):
        return None
    if has_plain_weight(base):
        W0 = base.weight.detach()
        W0, dtype = W0.T if isinstance(base, Conv1D) else W0, str(W0.dtype).removeprefix("torch.")
    else:
        try:
            W0, dtype = pretrained_weight(base, name), _QUANTISED
        except TypeError:
            return None
    if W0.ndim != 2 or W0.numel() == 0:
        return None
    places = torch.tensor([(2 * k + 1) * W0.numel() // (2 * _SAMPLES) for k in range(_SAMPLES)], device=W0.device)
    return dtype, W0[places // W0.shape[1], places % W0.shape[1]].float().tolist()


def check_base(config: GoatConfig, modules: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Raise unless ``model`` is the base model of the loaded adapter; warn instead where ``other_base="warn"``.

    ``modules`` are the base layers of every targeted module, by name. Without a fingerprint only shapes are compared,
    if the adapter's file was seen. Shapes that differ raise ValueError in any case.
    """
    saved = {name: text.split(" ") for name, text in (config.base_weights or {}).items()}
    shapes = {name: tuple(map(int, size.split("x"))) for name, (size, _, _) in saved.items()} | config.shapes_in_file
    kind, name = (config.auto_mapping or {}).get("base_model_class") or "a model", config.base_model_name_or_path
    made_on = f"{kind} {name!r}" if name else f"{kind} (without a name)"
    name = getattr(model, "name_or_path", None)
    loaded_onto = type(model).__name__ + (f" {name!r}" if isinstance(name, str) and name else " (which has no name)")
    for name, (M, N) in shapes.items():
        n, m = features(modules[name]) if name in modules else (N, M)
        if (m, n) != (M, N):
            raise ValueError(
                f"the adapter does not fit: it was made on {made_on}, whose {name} has a weight of shape [{M}, {N}], "
                f"and in {loaded_onto} that is [{m}, {n}]; load it onto the model it was made on"
            )
    problem = _other_modules(shapes, modules, model, config.shapes_in_file) or _other_weights(saved, modules)
    if problem is None:
        return
    message = f"the adapter was made on {made_on}, and this is another base model, {loaded_onto}: {problem}"
    if config.other_base == "warn":
        warnings.warn(f"{message}. Loaded all the same, because other_base='warn'", stacklevel=2)
        return
    raise ValueError(
        f"{message}. Load it onto {made_on}; or, if that is what you want, with PeftModel.from_pretrained(model, path, "
        "other_base='warn')"
    )


def _other_modules(shapes: dict, modules: Mapping[str, nn.Module], model: nn.Module, in_file: dict) -> str | None:
    if getattr(model, "_checkpoint_conversion_mapping", None):  # transformers renames, PEFT follows
        return None
    missing = [name for name in shapes if name not in modules]
    if missing:
        return (
            f"it has no {missing[0]} for the adapter, which has {len(shapes)} modules, {len(missing)} of them not there"
        )
    without = [name for name in modules if name not in in_file] if in_file else []
    return f"the adapter's file has nothing for its {without[0]}, which the configuration targets" if without else None


def _other_weights(saved: dict[str, list[str]], modules: Mapping[str, nn.Module]) -> str | None:
    squares, distance = 0.0, 0.0
    for name, (_, dtype, text) in saved.items():
        sampled = _sample(modules[name], name) if name in modules else None
        if sampled is None:
            continue
        then, now = struct.unpack(f"<{_SAMPLES}f", bytes.fromhex(text)), sampled[1]
        if _QUANTISED in (dtype, sampled[0]):
            scale = math.sqrt(sum(value**2 for value in then)) or 1.0
            distance += sum((a - b) ** 2 for a, b in zip(then, now, strict=True)) / scale**2
            squares += 1.0
            continue
        dtypes = (dtype, sampled[0], "float32")
        eps = _ROUNDINGS * max(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes)
        smallest = max(_SMALLEST.get(dtype, 0.0) for dtype in dtypes)
        if any(abs(a - b) > eps * max(abs(a), abs(b)) + smallest for a, b in zip(then, now, strict=True)):
            return f"the weight of {name} is another; sampled entries were {_short(then)} and are {_short(now)}"
    if squares and distance / squares > _QUANTISED_DISTANCE**2:
        return "its dequantised weights are others"
    return None


def _short(values) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in values[:3]) + ", ...]"
