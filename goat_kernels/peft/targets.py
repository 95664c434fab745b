"""Which layers are adapted: those that ``target_modules`` match, checked before the model is touched.

A layer that the user named and GOAT cannot adapt is refused. Where "all-linear" or PEFT's default for the architecture
named it, it is left out, with one warning that lists all of them. Then ``target_modules`` become the names of what is
adapted, so that a saved adapter is loaded onto the same layers by PEFT's own rules.

transformers 5 keeps the experts of a layer in stacked parameters, such as ``mlp.experts.gate_up_proj`` of shape
[experts, 2 * intermediate, hidden]; GOAT adapts linear layers alone, and names the experts where it leaves them out.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from goat_kernels.initialisation import check_weight
from goat_kernels.peft.base_layer import check_base_layer, check_foldable, features, is_meta, modules_outside_adapters
from goat_kernels.peft.config import GoatConfig
from goat_kernels.peft.weight_readers import weight_readers

#: An adapter of so many numbers for each of its weight, and of more than a gigabyte, is a mistake or an attack.
_MOST_PER_WEIGHT = 64
_ALWAYS_ALLOWED = 2**28


def choose_targets(config: GoatConfig, model: nn.Module, asked: object) -> dict[str, nn.Module]:
    """Name -> base layer of every module that PEFT will replace.

    Args:
        config: its ``target_modules`` are filled in, and may be "all-linear"; they become a set of names where they
            are, or where layers are left out.
        model: the model that is to be adapted; it is not changed.
        asked: the ``target_modules`` that the user gave, None for PEFT's default.

    Raises:
        TypeError, ValueError: a layer that the user named, by target_modules or rank_pattern, cannot be adapted; or
            none of the others can; or a setting fits no layer.
    """
    all_linear = isinstance(asked, str) and asked.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    if not config.initialised:
        _warn_about_experts(config, model, all_linear=all_linear)
    _maybe_include_all_linear_layers(config, model)
    targets = matched_layers(config, model)
    problems = _problems(config, targets, model)
    for name, problem in problems.items():
        ranked = get_pattern_key(config.rank_pattern.keys(), name) in config.rank_pattern
        if ranked or not (all_linear or asked is None):
            raise problem
    if problems:
        if len(problems) == len(targets):
            raise next(iter(problems.values()))
        targets = {name: base for name, base in targets.items() if name not in problems}
        config.target_modules = set(targets)
        if matched_layers(config, model).keys() != targets.keys():  # a name may be the end of another
            config.target_modules = "|".join(map(re.escape, sorted(targets)))
        if not config.initialised:
            asked_for = "'all-linear'" if all_linear else "PEFT's default for this architecture"
            _warn_about_left_out(problems, targets, asked_for)
    for name, base in targets.items():
        _check_settings(config, name, base, model)
    return targets


def matched_layers(config: GoatConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Name -> base layer of the modules that ``config`` matches, by PEFT's rules."""
    found = {}
    for name, module in modules_outside_adapters(model):
        matched = bool(name) and check_target_module_exists(config, name)
        if matched and not isinstance(matched, _ExcludedModule):
            found[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return found


def _problems(config: GoatConfig, targets: dict[str, nn.Module], model: nn.Module) -> dict[str, Exception]:
    """Name -> why GOAT cannot adapt the layer, of those that it cannot."""
    problems: dict[str, Exception] = {}
    modules = {name: model.get_submodule(name) for name in targets}
    readers = weight_readers(model, modules.values())
    for name, base in targets.items():
        try:
            check_base_layer(base, name)
            if id(modules[name]) in readers:
                _refuse_read_layer(config, name, *readers[id(modules[name])])
            if config.init_weights:
                N, M = features(base)
                check_weight(torch.empty(M, N, device="meta"), config.settings(name), name)  # the shape decides
        except (TypeError, ValueError) as problem:
            problems[name] = problem
    return problems


def _refuse_read_layer(config: GoatConfig, name: str, place: str, certain: bool) -> None:
    if certain and not config.initialised:
        raise ValueError(
            f"{place} computes with the weight of {name} without calling it, so an adapter there has no effect; "
            "name other modules in target_modules, or leave this one out with exclude_modules"
        )
    # Loaded adapters were made before this was refused; on some paths the layer may have been called, and trained.
    certainly = "computes" if certain else "seems to compute"
    warnings.warn(
        f"{place} {certainly} with the weight of {name} without calling it; where it does, an adapter there has "
        "no effect: see whether its parameters get gradients, or leave the layer out (exclude_modules)",
        stacklevel=2,
    )


def _warn_about_left_out(problems: dict[str, Exception], adapted: Iterable[str], asked: str) -> None:
    groups: dict[str, list[str]] = {}
    for name in problems:
        groups.setdefault(_patterns([name])[0], []).append(name)
    lines = [
        f"{pattern}{f' ({len(names)} layers)' if len(names) > 1 else ''}: {problems[names[0]]}"
        for pattern, names in groups.items()
    ]
    warnings.warn(
        f"{asked} stands for layers that GOAT cannot adapt as configured. Left out and frozen ({len(problems)}), with "
        "the reason and what would include them:\n  " + "\n  ".join(lines) + "\n"
        f"exclude_modules={sorted({_own_name(name, adapted) for name in problems})} says that this is meant, without "
        "this warning",
        stacklevel=2,
    )


def _own_name(name: str, adapted: Iterable[str]) -> str:
    """The shortest end of ``name``, from a dot on, that excludes none of the adapted layers."""
    parts = name.split(".")
    ends = (".".join(parts[-length:]) for length in range(1, len(parts)))
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in adapted)), name)


def _check_settings(config: GoatConfig, name: str, base: nn.Module, model: nn.Module) -> None:
    N, M = features(base)
    settings = config.settings(name)
    numbers = settings.r * (N + M) + settings.num_experts * N
    if numbers > max(_MOST_PER_WEIGHT * N * M, _ALWAYS_ALLOWED):
        raise ValueError(
            f"r={settings.r} and num_experts={settings.num_experts} give {name}, a weight of shape [{M}, {N}], an "
            f"adapter of {numbers:,} numbers, {numbers // max(N * M, 1):,} times its own; that is no adapter any more, "
            "and was not made"
        )
    if settings.residual == "fold" and settings.has_residual and not is_meta(base):
        check_foldable(base, name)
        sharing = [n for n, p in model.named_parameters(remove_duplicate=False) if p is base.weight]
        if len(sharing) > 1:
            raise ValueError(
                f"residual='fold' would change a weight that is shared by {', '.join(sharing)}; use residual='path', "
                f"or leave {name} out (exclude_modules)"
            )


# --- experts --------------------------------------------------------------------------------------------------------


def _warn_about_experts(config: GoatConfig, model: nn.Module, *, all_linear: bool) -> None:
    """Warn once, naming the experts' weights that ``config`` asks for and GOAT leaves out, and their share.

    ``target_modules`` are still what the user asked for; ``all_linear`` says whether that was "all-linear".
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
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    around = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is head]
    outside = {id(p) for module in around for p in module.parameters()}
    body = sum(_numbers(p) for p in model.parameters() if id(p) not in outside)
    share = sum(map(_numbers, left_out.values())) / max(body, 1)
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    asked = "'all-linear'" if all_linear else f"target_modules={targets!r}"
    containers = sorted({_container(name) for name in left_out})
    warnings.warn(
        f"{asked} does not reach the experts of this model: they are stacked parameters, not linear layers, and GOAT "
        f"adapts linear layers alone. Left frozen: {', '.join(_patterns(left_out))} ({len(left_out)} parameters), "
        f"{share:.0%} of the model's parameters without embeddings and output layer. Experts cannot be adapted yet: "
        f"choose other modules beside them. exclude_modules={containers} says that this is meant, and silences this",
        stacklevel=2,
    )


def _patterns(names) -> list[str]:
    """The names with ``*`` for each number in them, every pattern once, in order."""
    return list(dict.fromkeys(re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name) for name in names))


def _experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of everything called an expert that is a parameter of its own; quantised weights included."""
    found = {}
    for owner_name, owner in modules_outside_adapters(model):
        own = isinstance(owner, BaseTunerLayer | nn.Linear | nn.Embedding)  # quantised linear layers are subclasses
        called = f"{owner_name} {type(owner).__name__}".lower()
        if own or type(owner).__module__.startswith("torch.nn.") or "expert" not in called:
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
    conversions = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else None
    for conversion in conversions or ():
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


def _numbers(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds, also where ZeRO-3 has partitioned it or bitsandbytes packed two in a byte."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes' 4-bit weights
    return packed.shape.numel() if packed is not None else parameter.numel()
