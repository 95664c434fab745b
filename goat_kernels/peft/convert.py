"""Adapters of others as adapters of this package, and a plain LoRA that approximates one of this package.

In come the GOAT-PEFT repository's adapters, and PEFT's LoRA and PiSSA as E = 1. What their training subtracted from
W0 is in neither file; it becomes the frozen residual pair here, and where it cannot be known, conversion is refused.
Out goes a LoRA in which every token gets the same gates: an approximation, with its error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from goat_kernels.initialisation import adapter_scaling, initialise_adapter
from goat_kernels.numerics import relative_error
from goat_kernels.peft.adapter import GoatAdapter
from goat_kernels.peft.base_check import fingerprint
from goat_kernels.peft.base_layer import check_base_layer, pretrained_weight
from goat_kernels.peft.config import GoatConfig
from goat_kernels.peft.layer import GoatLinearLayer, layers_with
from goat_kernels.peft.storage import PREFIX, ConvertedAdapter, check_new, read_checkpoint
from goat_kernels.reference import select_top_k
from goat_kernels.settings import AdapterSettings, check_name

#: Written beside the exported LoRA.
REPORT_FILE = "lora_approximation.json"

#: init_type of GOAT-PEFT -> init here, for those that change the base weight.
_CHANGING = {name: name for name in ("goat", "goat_mini", "pissa", "milora", "pissa_milora")} | {"pissa_scale": "pissa"}

#: init_lora_weights of PEFT that leave the base weight as it is.
_HARMLESS = (True, False, "gaussian", "eva", "orthogonal")

_TARGETING = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_COMMON = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "lora_dropout")
_GOAT_PEFT_TENSOR = r"((?:moe_layer\.experts\.\d+\.)?lora_[AB](?:\.\d+)?|lora_gating)\.weight"
_LORA_PAIR = r"(lora_[AB])\.weight"
_LORA_FIELDS = {
    *("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "fan_in_fan_out"),
    *("init_lora_weights", "peft_type", "peft_version", "runtime_config", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "megatron_core", "ensure_weight_tying", *_TARGETING, *_COMMON),
}


def from_goat_peft(
    folder: str | Path,
    *,
    base_model: nn.Module | None = None,
    scaling: str | float | None = None,
    eta: float = 1.0,
    rho: float = 10.0,
    allow_pickle: bool = False,
) -> ConvertedAdapter:
    """An adapter of the public code (github.com/Facico/GOAT-PEFT), whose folder lacks part of what it computes with.

    Its file has ``lora_A.<i>.weight`` [D, N], ``lora_B.<i>.weight`` [M, D] and ``lora_gating.weight`` [E, N] for each
    module, and the experts once more below ``moe_layer``. The SVD of W0 behind what was subtracted is run again here.

    Args:
        folder: the adapter.
        base_model: the pretrained model, unchanged; needed for every init_type with an SVD.
        scaling: s, if the code's environment or version set it: "lora", "rslora", "goat" or a number. Needed for
            init_type goat and goat_mini, whose rule was alpha / D at commit ef4d21a and Thm 3.5's at a later one.
        eta: ETA of the training's environment, in the "goat" scaling.
        rho: of the training; 10 in the public code.
        allow_pickle: read an ``adapter_model.bin``.

    Raises:
        ValueError: something is missing, of another layout, or of a kind that the public code cannot run.
    """
    fields, saved = read_checkpoint(folder, allow_pickle=allow_pickle)
    if fields.get("peft_type") != "GOAT" or "init_type" not in fields:
        raise ValueError(f"{str(folder)!r} is no adapter of GOAT-PEFT: its configuration has no init_type")
    E, init_type, r = fields["num_experts"], fields["init_type"], fields["r"]
    modules, others = _grouped(folder, saved, _GOAT_PEFT_TENSOR)
    adapters = {name: _experts(name, parts, E) for name, parts in modules.items()}
    changing = _CHANGING.get(init_type)
    if changing is None and any(word in init_type for word in ("pissa", "milora", "goat", "svd", "hydralora")):
        raise ValueError(f"init_type={init_type!r} is not one that the public code can run; no file can come from it")
    D = r // E
    if (r % E and changing in ("pissa", "milora", "pissa_milora")) or (changing == "pissa_milora" and r % 2):
        raise ValueError(f"r={r} with init_type={init_type!r} and num_experts={E} subtracts other ranks than it trains")
    if changing is not None and base_model is None:
        raise ValueError(f"base_model is needed: init_type={init_type!r} subtracted singular triples of W0 from it")
    config = GoatConfig(
        r=E * D,
        num_experts=E,
        top_k=fields["top_k"],
        **_official_scaling(fields, scaling, eta),
        rho=rho,
        init=changing or "lora",
        residual_coefficient=fields["init_cof"] if changing else None,
        bias=fields.get("bias", "none"),
        target_modules=sorted(modules),  # it skips modules smaller than r in silence
        modules_to_save=fields.get("modules_to_save"),
        **{name: fields[name] for name in _COMMON if name in fields},
    )
    for name, adapter in adapters.items():
        rows = adapter["lora_A"].shape[0]
        if rows != E * D:
            raise ValueError(f"{name}: lora_A has {rows} rows, but r={r} and num_experts={E} give {E * D}")
        if changing is not None:
            adapter |= _subtracted(base_model, name, adapter, config.settings(name))
    return _converted(config, adapters, others, base_model)


def from_lora(
    folder: str | Path,
    *,
    base_model: nn.Module | None = None,
    initial_adapter: str | Path | None = None,
    on_residual_base: bool = False,
    allow_pickle: bool = False,
) -> ConvertedAdapter:
    """A LoRA adapter of PEFT as E = 1, K = 1: alpha, rslora, the patterns, targets and modules_to_save are kept.

    An adapter whose initialisation changed the base (PiSSA and its like, saved without PEFT's conversion) needs one of
    the last three arguments; W_res = s B0 A0 becomes the frozen pair.

    Args:
        folder: the adapter.
        base_model: W0. With PiSSA's full SVD the initial pair is computed from it once more.
        initial_adapter: the adapter as it was saved before training: exact, and the only way for a randomised SVD.
        on_residual_base: the adapter will be used on the changed base itself, so nothing is subtracted.
        allow_pickle: read an ``adapter_model.bin``.

    Raises:
        ValueError: not a LoRA, a variant that computes something else (DoRA, ...), or missing information.
    """
    fields, saved = read_checkpoint(folder, allow_pickle=allow_pickle)
    lora = _lora_config(folder, fields, saved)
    modules, others = _grouped(folder, saved, _LORA_PAIR)
    initial = lora.init_lora_weights
    changed = initial not in _HARMLESS and not on_residual_base
    if changed and initial_adapter is None and (initial != "pissa" or base_model is None):
        exact = "base_model (W0), " if initial == "pissa" else ""
        raise ValueError(
            f"init_lora_weights={initial!r} changed the base weights, and the file does not say by how much. Needed is "
            f"one of: {exact}initial_adapter (the adapter saved before training), or on_residual_base=True "
            "(--residual-base) if it is to run on the changed base itself"
        )
    before = None
    if initial_adapter:
        _, initial_tensors = read_checkpoint(initial_adapter, allow_pickle=allow_pickle)
        before, _ = _grouped(initial_adapter, initial_tensors, _LORA_PAIR)
    has_residual = changed or before is not None
    config = GoatConfig(
        r=lora.r,
        num_experts=1,
        top_k=1,
        scaling="rslora" if lora.use_rslora else "lora",
        lora_alpha=lora.lora_alpha,
        init="pissa" if has_residual else "lora",
        rho=1.0,
        residual_coefficient=1.0 if has_residual else None,
        balance_coefficient=0.0,
        bias=lora.bias,
        target_modules=lora.target_modules,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        **{name: getattr(lora, name) for name in (*_TARGETING, *_COMMON)},
    )
    for name, adapter in modules.items():
        if adapter.keys() != {"lora_A", "lora_B"}:
            raise ValueError(f"{name} has {', '.join(sorted(adapter))} alone; lora_A and lora_B are needed")
        lora_A, lora_B = adapter["lora_A"], adapter["lora_B"]
        settings = config.settings(name)
        if lora_A.ndim != 2 or lora_A.shape[0] != settings.r or lora_B.shape[1:] != (settings.r,):
            raise ValueError(
                f"{name}: lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)} do not have the rank "
                f"{settings.r} that r and rank_pattern give; GOAT adapts linear layers alone"
            )
        adapter["router"] = lora_A.new_zeros(1, lora_A.shape[1])
        if before is not None:
            A0, B0 = (before.get(name, {}).get(part) for part in ("lora_A", "lora_B"))
            if A0 is None or B0 is None or A0.shape != lora_A.shape:
                raise ValueError(
                    f"initial_adapter has no lora_A and lora_B of rank {settings.r} for {name}; the adapter saved "
                    "before this training is needed"
                )
            adapter |= {"residual_A": A0, "residual_B": adapter_scaling(settings, lora_A.shape[1]) * B0}
        elif changed:
            adapter |= _subtracted(base_model, name, adapter, settings)
    # A fingerprint of W0 would be wrong beside an adapter that wants the changed base.
    return _converted(config, modules, others, None if on_residual_base else base_model)


def _lora_config(folder: str | Path, fields: dict, tensors: dict[str, Tensor]) -> LoraConfig:
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{str(folder)!r} is a {fields.get('peft_type')!r} adapter; a LORA one is needed")
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    default = LoraConfig()
    for name, value in fields.items():
        changed = bool(value) if name not in names else value != getattr(default, name)
        if name not in _LORA_FIELDS and changed:
            raise ValueError(
                f"{name}={value!r} makes the adapter compute what a plain LoRA does not; it cannot be converted"
            )
    lora = LoraConfig(**{name: value for name, value in fields.items() if name in names - {"runtime_config"}})
    for key in tensors:
        if ".lora_A." in key and not check_target_module_exists(lora, key.removeprefix(PREFIX).split(".lora_A.")[0]):
            raise ValueError(f"{key} is in the file, but target_modules={lora.target_modules!r} do not name its module")
    return lora


def _grouped(
    folder: str | Path, tensors: dict[str, Tensor], pattern: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(module -> name -> tensor of the low-rank pair in float32 or float64, all others: biases, modules_to_save)."""
    modules, others = {}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+?)\.{pattern}", key)
        if match:
            modules.setdefault(match[1], {})[match[2]] = tensor if tensor.dtype == torch.float64 else tensor.float()
        elif "lora_" in key:
            raise ValueError(f"{key} is not part of a plain low-rank pair of a linear layer; it cannot be converted")
        else:
            others[key] = tensor
    if not modules:
        raise ValueError(f"{str(folder)!r} has no low-rank pair whose key begins with {PREFIX!r}")
    return modules, others


def _experts(name: str, parts: dict[str, Tensor], E: int) -> dict[str, Tensor]:
    """lora_A [R, N], lora_B [M, R] and router [E, N] of one module of GOAT-PEFT, by expert or stacked in its file."""
    for i in range(E):
        for letter in "AB":
            copy = parts.pop(f"moe_layer.experts.{i}.lora_{letter}", None)
            if copy is not None and not torch.equal(copy, parts.setdefault(f"lora_{letter}.{i}", copy)):
                raise ValueError(f"{name}: lora_{letter}.{i} and its copy below moe_layer differ; the file was changed")
    names_A, names_B = ([f"lora_{letter}.{i}" for i in range(E)] for letter in "AB")
    if parts.keys() == {"lora_gating", "lora_A", "lora_B"}:
        names_A, names_B = ["lora_A"], ["lora_B"]
    if odd := parts.keys() ^ {"lora_gating", *names_A, *names_B}:
        raise ValueError(
            f"{name}: num_experts={E} needs lora_A.<i>, lora_B.<i> and lora_gating; missing or unknown: "
            f"{', '.join(sorted(odd))}"
        )
    return {
        "lora_A": torch.cat([parts[name] for name in names_A]),
        "lora_B": torch.cat([parts[name] for name in names_B], dim=1),
        "router": parts["lora_gating"],
    }


def _official_scaling(fields: dict, scaling: str | float | None, eta: float) -> dict:
    init_type = fields["init_type"]
    if scaling is None:
        if init_type in ("goat", "goat_mini"):
            raise ValueError(
                f"scaling is needed: the file does not say it, and for init_type={init_type!r} it was alpha / D at "
                "commit ef4d21a of the public code ('lora') and sqrt(3 eta N / D) at a later one ('goat')"
            )
        scaling = "goat" if "scale" in init_type else 2.0 if init_type == "pissa" else "lora"
        scaling = "rslora" if scaling == "lora" and "rs" in init_type else scaling
    if scaling in ("lora", "rslora"):
        return {"scaling": scaling, "lora_alpha": fields["lora_alpha"]}
    return {"scaling": scaling, "eta": eta} if scaling == "goat" else {"scaling": scaling}


def _subtracted(
    base_model: nn.Module, name: str, adapter: dict[str, Tensor], settings: AdapterSettings
) -> dict[str, Tensor]:
    """The pair that the initialisation subtracted from the module's W0, computed once more."""
    try:
        base = base_model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"base_model ({type(base_model).__name__}) has no module {name}, which the adapter adapts"
        ) from None
    check_base_layer(base, name)
    weight, needed = pretrained_weight(base, name), [adapter["lora_B"].shape[0], adapter["lora_A"].shape[1]]
    if list(weight.shape) != needed:
        raise ValueError(f"base_model: the weight of {name} is {list(weight.shape)}, and the adapter needs {needed}")
    A0, B0 = initialise_adapter(weight, settings, name=name).residual
    return {"residual_A": A0, "residual_B": B0}


def _converted(
    config: GoatConfig, adapters: dict[str, dict[str, Tensor]], others: dict, base_model: nn.Module | None
) -> ConvertedAdapter:
    if base_model is not None:
        config.base_weights = fingerprint({name: base_model.get_submodule(name) for name in adapters})
    tensors = {
        f"{PREFIX}{name}.goat_adapter.{key}": tensor
        for name, adapter in adapters.items()
        for key, tensor in adapter.items()
    }
    return ConvertedAdapter(config, others | tensors)


# --- out: a LoRA that approximates ----------------------------------------------------------------------------------


def export_approximate_lora(
    model: PeftModel,
    inputs: Mapping[str, Tensor],
    folder: str | Path,
    *,
    adapter_name: str = "default",
    gates: str = "mean",
    overwrite: bool = False,
) -> dict:
    """Write the LoRA of rank R (+ R for the residual) with fixed gates g: sum_i g_i s_i B_i A_i - W_res. Approximate.

    Args:
        model: with the GOAT adapter ``adapter_name``. It is unloaded to measure the LoRA in its place.
        inputs: keyword arguments of ``model``'s forward; on its device. The error is that on these inputs alone.
        folder: where to; if it exists, FileExistsError, or with ``overwrite`` its files are replaced.
        gates: "mean", each module's mean gate over the tokens of ``inputs`` (padding counts); "uniform", 1/E.

    Returns:
        The report, which is written beside the adapter (:data:`REPORT_FILE`): ``relative_error`` ||LoRA - GOAT|| /
        ||GOAT|| of the model's first output, and ``relative_error_without_adapter``, the same of the base model.
    """
    check_new(folder, overwrite)
    check_name("gates", gates, ("mean", "uniform"))
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is not in the model, which has {', '.join(model.peft_config)}")
    model.eval()
    model.set_adapter(adapter_name)
    layers = layers_with(model.get_base_model(), adapter_name)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hook = functools.partial(_note_gates, layer.goat_adapter[adapter_name], seen[name])
            hooks.enter_context(layer.register_forward_pre_hook(hook))
        exact = _first_output(model, inputs)
    with model.disable_adapter():
        without = _first_output(model, inputs)
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {key: tensor for key, tensor in saved.items() if ".goat_adapter." not in key}
    for name, layer in layers.items():
        E = layer.goat_adapter[adapter_name].settings.num_experts
        used = gates == "mean" and sum(map(len, seen[name])) > 0  # the inputs may not reach a layer
        gate = torch.cat(seen[name]).mean(dim=0) if used else torch.full((E,), 1 / E)
        tensors |= _pair(name, layer.goat_adapter[adapter_name], gate)
    lora = ConvertedAdapter(_approximating_config(model.peft_config[adapter_name]), tensors)
    with tempfile.TemporaryDirectory() as temporary:
        lora.save(temporary, overwrite=True)
        measured = PeftModel.from_pretrained(model.unload(), temporary).eval()
        approximate = _first_output(measured, inputs)
        measured.unload()
    report = {
        "approximation": "a plain LoRA in place of a GOAT adapter; the error was measured on the given inputs alone",
        "gates": gates,
        "relative_error": relative_error(approximate, exact),
        "relative_error_without_adapter": relative_error(without, exact),
        "inputs": {name: list(value.shape) for name, value in inputs.items()},
    }
    lora.save(folder, overwrite=overwrite, notes={REPORT_FILE: report})
    return report


def _note_gates(adapter: GoatAdapter, found: list[Tensor], layer: GoatLinearLayer, arguments: tuple) -> None:
    """Add the gates [tokens, E] of one call to ``found``."""
    router = adapter.router.detach()
    logits = arguments[0].detach().reshape(-1, layer.in_features).to(router) @ router.T
    chosen = select_top_k(logits, adapter.settings.top_k)
    found.append(torch.softmax(logits.masked_fill(~chosen, float("-inf")), dim=-1))


def _pair(name: str, adapter: GoatAdapter, gate: Tensor) -> dict[str, Tensor]:
    lora_A, lora_B = adapter.expand(adapter.lora_A.detach()), adapter.lora_B.detach()
    lora_B = lora_B * (adapter.scaling * gate.to(lora_B)).repeat_interleave(adapter.settings.expert_rank)
    if adapter.residual_A is not None:
        lora_A = torch.cat([lora_A, adapter.residual_A.to(lora_A)])
        lora_B = torch.cat([lora_B, -adapter.residual_B.to(lora_B)], dim=1)
    return {f"{PREFIX}{name}.lora_A.weight": lora_A, f"{PREFIX}{name}.lora_B.weight": lora_B}


def _approximating_config(config: GoatConfig) -> LoraConfig:
    times = 2 if config.settings().has_residual else 1
    ranks = {key: times * r for key, r in config.rank_pattern.items()}
    return LoraConfig(
        r=times * config.r,
        lora_alpha=times * config.r,  # s is in lora_B
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        bias="lora_only" if config.bias == "goat_only" else config.bias,
        **{name: getattr(config, name) for name in ("target_modules", *_TARGETING, *_COMMON)},
    )


@torch.no_grad()
def _first_output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    return output[0] if getattr(output, "logits", None) is None else output.logits
