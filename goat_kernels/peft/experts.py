"""Experts of mixture-of-experts models are parameters rather than linear layers: say so where they are left out.

transformers 5 keeps the experts of a layer in stacked parameters, such as ``mlp.experts.gate_up_proj`` of shape
[experts, 2 * intermediate, hidden]. PEFT's LoRA adapts them through ``target_parameters``, and turns names such as
``gate_proj`` into these; GOAT adapts modules alone.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

if TYPE_CHECKING:
    from goat_kernels.peft.config import GoatConfig


def warn_about_experts(config: GoatConfig, model: nn.Module, *, all_linear: bool) -> None:
    """Warn once, naming the experts' weights that ``config`` asks for and GOAT leaves out, and their share.

    Args:
        config: whose ``target_modules`` are still what the user asked for.
        model: the model that is to be adapted.
        all_linear: whether that was "all-linear".
    """
    experts = _experts(model)
    if not experts:
        return
    if all_linear:
        config = copy.copy(config)
        config.target_modules = ".*"
    former = _former_names(model)
    left_out = {name: p for name, p in experts.items() if _asked_for(config, name, former)}
    if not left_out:
        return
    share = sum(map(_numbers, left_out.values())) / max(_numbers_of_body(model), 1)
    asked = "'all-linear'" if all_linear else f"target_modules={_short(config.target_modules)}"
    containers = sorted({_container(name) for name in left_out})
    warnings.warn(
        f"{asked} does not reach the experts of this model: they are stacked parameters, not linear layers, and GOAT "
        f"adapts linear layers alone. Left frozen: {', '.join(patterns(left_out))} ({len(left_out)} parameters), "
        f"{share:.0%} of the model's parameters without embeddings and output layer. Experts cannot be adapted yet: "
        f"choose other modules beside them. exclude_modules={containers} says that this is meant, and silences this",
        stacklevel=2,
    )


def patterns(names) -> list[str]:
    """The names with ``*`` for each number in them, every pattern once, in order."""
    return list(dict.fromkeys(re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name) for name in names))


def _experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of everything called an expert that is a parameter of its own; quantised weights included."""
    found, adapted = {}, ()
    for owner_name, owner in model.named_modules():
        if isinstance(owner, BaseTunerLayer):
            adapted = (*adapted, owner_name + ".")
        if owner_name.startswith(adapted) or isinstance(owner, BaseTunerLayer):
            continue
        if type(owner).__module__.startswith("torch.nn."):
            continue
        if "expert" not in owner_name.lower() and "expert" not in type(owner).__name__.lower():
            continue
        if isinstance(owner, nn.Linear | nn.Embedding):  # subclasses, quantised ones
            continue
        for leaf, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim >= 2 and not re.search("bias|scale|norm", leaf):
                found[f"{owner_name}.{leaf}" if owner_name else leaf] = parameter
    return found


def _asked_for(config: GoatConfig, name: str, former: dict[str, set[str]]) -> bool:
    """Whether ``target_modules`` match the parameter, or a linear layer that it was before experts were stacked."""
    owner, _, leaf = name.rpartition(".")
    names = [name]
    for old in sorted(former.get(leaf, ())):
        names += [f"{owner}.{old}", f"{owner}.0.{old}"]
    path = owner.split(".")
    around = [".".join(path[:length]) for length in range(1, len(path) + 1)]
    if any(isinstance(check_target_module_exists(config, n), _ExcludedModule) for n in [*around, *names]):
        return False
    return any(check_target_module_exists(config, n) for n in names)


def _former_names(model: nn.Module) -> dict[str, set[str]]:
    """A stacked parameter's last name -> those of the linear layers that checkpoints have in its place."""
    former = {"gate_up_proj": {"gate_proj", "up_proj"}}
    if not isinstance(model, PreTrainedModel):
        return former
    for conversion in get_model_conversion_mapping(model) or ():
        if isinstance(conversion, WeightConverter):
            for target in conversion.target_patterns:
                former.setdefault(_last_name(target), set()).update(map(_last_name, conversion.source_patterns))
    return former


def _last_name(pattern: str) -> str:
    """``gate_proj`` of ``experts.*.gate_proj.weight``."""
    words = [word for word in re.findall(r"[A-Za-z_]\w*", pattern) if word != "weight"]
    return words[-1] if words else pattern


def _container(name: str) -> str:
    """What to exclude: the module that is called after its experts, or else the parameter's own."""
    path = name.split(".")[:-1]
    return next((part for part in path if "expert" in part.lower()), path[-1] if path else name)


def _numbers_of_body(model: nn.Module) -> int:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    around = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is head]
    outside = {id(p) for module in around for p in module.parameters()}
    return sum(_numbers(p) for p in model.parameters() if id(p) not in outside)


def _numbers(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds, also where ZeRO-3 has partitioned it or bitsandbytes packed two in a byte."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes' 4-bit weights
    return packed.shape.numel() if packed is not None else parameter.numel()


def _short(target_modules) -> str:
    return repr(target_modules) if isinstance(target_modules, str) else repr(sorted(target_modules))
