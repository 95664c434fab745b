"""The methods that a model can be fine-tuned with: one table, and per method its PEFT configuration.

A new method is one entry in ``METHODS``. Imports nothing heavy: help texts are made from the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftConfig

    from goat_kernels.finetuning.options import FinetuneOptions


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        meaning: in words, for tables and help texts.
        rates_of: the method whose default learning rates it takes where it has none of its own.
        colour: in figures; colour-blind safe, after Okabe and Ito.
        config: (options, the fields that every configuration shares) -> the adapter's configuration; None where the
            model's own weights train.
    """

    meaning: str
    rates_of: str
    colour: str
    config: Callable[[FinetuneOptions, dict], PeftConfig] | None = None


def _alpha(options: FinetuneOptions) -> float:
    return options.lora_alpha or 2 * options.rank


def _lora(options: FinetuneOptions, shared: dict, **changes) -> PeftConfig:
    """PEFT's LoRA with ``changes`` to its fields."""
    from peft import LoraConfig

    return LoraConfig(**{**shared, "lora_alpha": _alpha(options), **changes})


def _pissa(options: FinetuneOptions, shared: dict) -> PeftConfig:
    """The R largest singular triples whole, at s = alpha / R = 1, so that the model starts as it was."""
    return _lora(options, shared, init_lora_weights="pissa", lora_alpha=options.rank)


def _goat(options: FinetuneOptions, shared: dict, **changes) -> PeftConfig:
    """This package's adapter with ``changes`` to the options."""
    from goat_kernels.peft import GoatConfig

    options = replace(options, **changes)
    if options.scaling in ("lora", "rslora"):  # the others do not read it
        shared = {**shared, "lora_alpha": _alpha(options)}
    names = ("top_k", "scaling", "eta", "rho", "init", "residual", "balance_coefficient", "seed")
    return GoatConfig(**shared, num_experts=options.experts, **{name: getattr(options, name) for name in names})


def _zero_experts(options: FinetuneOptions, shared: dict, init: str) -> PeftConfig:
    """Experts whose B starts at zero, at LoRA's s = alpha / R."""
    return _goat(options, shared, init=init, scaling=_alpha(options) / options.rank)


#: The R smallest singular triples whole, at s = 1, as one expert that every token uses: no routing.
_milora = partial(_goat, experts=1, top_k=1, init="milora", scaling=1.0, rho=1.0, balance_coefficient=0.0)

_rslora, _dora = partial(_lora, use_rslora=True), partial(_lora, use_dora=True)
_molora, _hydralora = partial(_zero_experts, init="lora"), partial(_zero_experts, init="hydralora")
_goat_s = partial(_goat, scaling="goat_s")


#: Every method, in the order of tables.
METHODS: dict[str, Method] = {
    "head": Method("only a new classifier on the frozen model", "head", "#999999"),
    "full": Method("full fine-tuning", "full", "#0072B2"),
    "lora": Method("PEFT's LoRA", "lora", "#E69F00", _lora),
    "rslora": Method("LoRA at alpha / sqrt(R)", "lora", "#D55E00", _rslora),
    "dora": Method("PEFT's DoRA", "lora", "#F0E442", _dora),
    "pissa": Method("PEFT's PiSSA", "lora", "#CC79A7", _pissa),
    "milora": Method("MiLoRA", "lora", "#882255", _milora),
    "molora": Method("LoRA experts from zero (MoLoRA)", "goat", "#56B4E9", _molora),
    "hydralora": Method("LoRA experts that share A (HydraLoRA)", "goat", "#332288", _hydralora),
    "goat": Method("GOAT", "goat", "#009E73", _goat),
    "goat_s": Method("GOAT, a scaling per expert", "goat", "#000000", _goat_s),
}
