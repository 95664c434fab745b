"""A plain LoRA that approximates a GOAT adapter: every token gets the same gates. An approximation, with its error."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from goat_kernels.numerics import relative_error
from goat_kernels.peft.adapter import GoatAdapter
from goat_kernels.peft.layer import GoatLinearLayer
from goat_kernels.peft.storage import PREFIX, ConvertedAdapter
from goat_kernels.reference import select_top_k

GATES = ("mean", "uniform")

#: Written beside the exported adapter.
REPORT_FILE = "lora_approximation.json"


def approximate_lora(
    model: PeftModel, inputs: Mapping[str, Tensor], *, adapter_name: str = "default", gates: str = "mean"
) -> tuple[ConvertedAdapter, dict]:
    """The LoRA of rank R (+ R for the residual) with fixed gates g: sum_i g_i s_i B_i A_i - W_res. Approximate.

    Args:
        model: with a GOAT adapter. It is unloaded to measure the LoRA in its place: what remains is the base model.
        inputs: keyword arguments of ``model``'s forward; on its device. The error is that on these inputs alone.
        adapter_name: the adapter.
        gates: "mean", each module's mean gate over the tokens of ``inputs`` (padding counts); "uniform", 1/E.

    Returns:
        The adapter, and a report: ``relative_error`` ||LoRA - GOAT|| / ||GOAT|| of the model's first output, and
        ``relative_error_without_adapter``, the same of the base model, which says what there was to approximate.

    Raises:
        ValueError: unknown gates, or an adapter that is not there.
    """
    if gates not in GATES:
        raise ValueError(f"gates={gates!r} is unknown; it must be one of {', '.join(GATES)}")
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is not in the model, which has {', '.join(model.peft_config)}")
    model.eval()
    model.set_adapter(adapter_name)
    layers = {name: module for name, module in model.get_base_model().named_modules() if _has(module, adapter_name)}
    with _mean_gates(layers, adapter_name) as mean:
        exact = _first_output(model, inputs)
    with model.disable_adapter():
        without = _first_output(model, inputs)
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {key: tensor for key, tensor in saved.items() if ".goat_adapter." not in key}
    for name, layer in layers.items():
        gate = mean[name] if gates == "mean" else torch.full_like(mean[name], 1 / len(mean[name]))
        tensors.update(_pair(name, layer.goat_adapter[adapter_name], gate))
    adapter = ConvertedAdapter(_lora_config(model.peft_config[adapter_name]), tensors)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder, overwrite=True)
        lora = PeftModel.from_pretrained(model.unload(), folder).eval()
        approximate = _first_output(lora, inputs)
        lora.unload()
    report = {
        "approximation": "a plain LoRA in place of a GOAT adapter; the error was measured on the given inputs alone",
        "gates": gates,
        "relative_error": relative_error(approximate, exact),
        "relative_error_without_adapter": relative_error(without, exact),
        "inputs": {name: list(value.shape) for name, value in inputs.items()},
    }
    return adapter, report


def export_approximate_lora(
    model: PeftModel, inputs: Mapping[str, Tensor], folder: str | Path, *, overwrite: bool = False, **options
) -> dict:
    """:func:`approximate_lora`, written to ``folder`` with its report beside it (:data:`REPORT_FILE`)."""
    if Path(folder).exists() and not overwrite:
        raise FileExistsError(f"output folder {str(folder)!r} exists; name a new one, or ask to overwrite it")
    adapter, report = approximate_lora(model, inputs, **options)
    adapter.save(folder, overwrite=overwrite, notes={REPORT_FILE: report})
    return report


def _has(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, GoatLinearLayer) and adapter_name in module.goat_adapter


@contextlib.contextmanager
def _mean_gates(layers: dict[str, GoatLinearLayer], adapter_name: str):
    """Collects, for each layer, the mean gate [E] over all tokens that it sees inside the block."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    mean: dict[str, Tensor] = {}

    def watch(name: str, layer: GoatLinearLayer):
        def hook(module, arguments):
            adapter = layer.goat_adapter[adapter_name]
            router = adapter.router.detach()
            logits = arguments[0].detach().reshape(-1, layer.in_features).to(router) @ router.T
            chosen = select_top_k(logits, adapter.settings.top_k)
            gate = torch.softmax(logits.masked_fill(~chosen, float("-inf")), dim=-1)
            sums[name] = sums.get(name, 0) + gate.sum(dim=0)
            tokens[name] = tokens.get(name, 0) + len(gate)

        return layer.register_forward_pre_hook(hook)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield mean
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        E = layer.goat_adapter[adapter_name].settings.num_experts  # a layer that the inputs did not reach gets 1/E
        mean[name] = sums[name] / tokens[name] if tokens.get(name) else torch.full((E,), 1 / E)


def _pair(name: str, adapter: GoatAdapter, gate: Tensor) -> dict[str, Tensor]:
    lora_A, lora_B = adapter.expand(adapter.lora_A.detach()), adapter.lora_B.detach()
    lora_B = lora_B * (adapter.scaling * gate.to(lora_B)).repeat_interleave(adapter.settings.expert_rank)
    if adapter.residual_A is not None:
        lora_A = torch.cat([lora_A, adapter.residual_A.to(lora_A)])
        lora_B = torch.cat([lora_B, -adapter.residual_B.to(lora_B)], dim=1)
    key = f"{PREFIX}{name}"
    return {f"{key}.lora_A.weight": lora_A, f"{key}.lora_B.weight": lora_B}


def _lora_config(config) -> LoraConfig:
    times = 2 if config.settings().has_residual else 1
    ranks = {key: times * r for key, r in config.rank_pattern.items()}
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    names += ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "lora_dropout")
    return LoraConfig(
        r=times * config.r,
        lora_alpha=times * config.r,  # s is in lora_B
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        bias="lora_only" if config.bias == "goat_only" else config.bias,
        **{name: getattr(config, name) for name in names},
    )


@torch.no_grad()
def _first_output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output[0]
