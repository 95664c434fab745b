"""The methods that a model can be fine-tuned with: one table, and per method its PEFT configuration.

A new method is one function and one entry in ``METHODS``. Imports nothing heavy: help texts are made from the table.

Letters: N in_features, M out_features, E experts, R total rank (``AdapterOptions.rank``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from goat_kernels.finetuning.options import AdapterOptions

if TYPE_CHECKING:
    from peft import PeftConfig

#: (options, the fields that every configuration shares, seed) -> the configuration.
ConfigOf = Callable[[AdapterOptions, dict, int], "PeftConfig"]

#: (N, M, R, E) -> parameters that train in one adapted layer.
SizeOf = Callable[[int, int, int, int], int]


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        meaning: in words, for tables and help texts.
        rates_of: the method whose default learning rates it takes where it has none of its own.
        config: makes the adapter's configuration; None where the model's own weights train.
        size: counts the parameters that train in one adapted layer; None like ``config``.
    """

    meaning: str
    rates_of: str = "lora"
    config: ConfigOf | None = None
    size: SizeOf | None = None


def _alpha(adapter: AdapterOptions) -> float:
    return adapter.lora_alpha or 2 * adapter.rank


def _lora(**changes) -> ConfigOf:
    """PEFT's LoRA with ``changes``."""

    def config(adapter: AdapterOptions, shared: dict, seed: int) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(**{**shared, "lora_alpha": _alpha(adapter), **changes})

    return config


def _pissa(adapter: AdapterOptions, shared: dict, seed: int) -> PeftConfig:
    """The R largest singular triples whole, at s = alpha / R = 1, so that the model starts as it was."""
    return _lora(init_lora_weights="pissa", lora_alpha=adapter.rank)(adapter, shared, seed)


def _goat(adapter: AdapterOptions, shared: dict, seed: int) -> PeftConfig:
    from goat_kernels.peft import GoatConfig

    if adapter.scaling in ("lora", "rslora"):  # the others do not read it
        shared = {**shared, "lora_alpha": _alpha(adapter)}
    fields = ("num_experts", "top_k", "scaling", "eta", "rho", "init", "residual", "balance_coefficient")
    values = {name: getattr(adapter, "experts" if name == "num_experts" else name) for name in fields}
    return GoatConfig(**shared, **values, seed=seed)


def _goat_s(adapter: AdapterOptions, shared: dict, seed: int) -> PeftConfig:
    return _goat(replace(adapter, scaling="goat_s"), shared, seed)


def _milora(adapter: AdapterOptions, shared: dict, seed: int) -> PeftConfig:
    """The R smallest singular triples whole, at s = 1, as one expert that every token uses: no routing."""
    changes = {"experts": 1, "top_k": 1, "init": "milora", "scaling": 1.0, "rho": 1.0, "balance_coefficient": 0.0}
    return _goat(replace(adapter, **changes), shared, seed)


def _zero_experts(init: str) -> ConfigOf:
    """Experts whose B starts at zero, at LoRA's s = alpha / R."""

    def config(adapter: AdapterOptions, shared: dict, seed: int) -> PeftConfig:
        return _goat(replace(adapter, init=init, scaling=_alpha(adapter) / adapter.rank), shared, seed)

    return config


def _lora_size(N: int, M: int, R: int, E: int) -> int:
    return R * (N + M)


def _dora_size(N: int, M: int, R: int, E: int) -> int:
    return R * (N + M) + M


def _experts_size(N: int, M: int, R: int, E: int) -> int:
    return R * (N + M) + E * N


def _hydra_size(N: int, M: int, R: int, E: int) -> int:
    return R // E * N + R * M + E * N


#: Every method, in the order of tables.
METHODS: dict[str, Method] = {
    "head": Method("only a new classifier on the frozen model", "head"),
    "full": Method("full fine-tuning", "full"),
    "lora": Method("PEFT's LoRA", "lora", _lora(), _lora_size),
    "rslora": Method("LoRA at alpha / sqrt(R)", "lora", _lora(use_rslora=True), _lora_size),
    "dora": Method("PEFT's DoRA", "lora", _lora(use_dora=True), _dora_size),
    "pissa": Method("PEFT's PiSSA", "lora", _pissa, _lora_size),
    "milora": Method("MiLoRA", "lora", _milora, _lora_size),
    "molora": Method("LoRA experts from zero (MoLoRA)", "goat", _zero_experts("lora"), _experts_size),
    "hydralora": Method("LoRA experts that share A (HydraLoRA)", "goat", _zero_experts("hydralora"), _hydra_size),
    "goat": Method("GOAT", "goat", _goat, _experts_size),
    "goat_s": Method("GOAT, a scaling per expert", "goat", _goat_s, _experts_size),
}

#: What the demonstration compares.
DEFAULT_METHODS = ("head", "full", "lora", "goat")
