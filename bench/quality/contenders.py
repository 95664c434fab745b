"""What is compared: the methods at equal trainable parameters, and the variants of GOAT in the ablations."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.options import FinetuneOptions

#: GOAT's settings, the paper's: E 8, K 2, R 8, rho 10, eta 1, balance coefficient 1e-3.
GOAT = FinetuneOptions(rank=8, experts=8, top_k=2, eta=1.0, rho=10.0, balance_coefficient=1e-3)

#: s of the ablations without the paper's scaling: alpha / D with alpha = 2 D, LoRA's usual choice.
_PLAIN_SCALING = 2.0


class Contender(NamedTuple):
    """One method with its settings.

    Attributes:
        name: unique; the method's, or the settings that differ from GOAT's.
        method: a key of ``METHODS``.
        options: the adapter's settings.
    """

    name: str
    method: str
    options: FinetuneOptions


#: Method -> what differs from GOAT's settings: at these ranks it trains as many parameters as GOAT with its routers, as
#: nearly as whole ranks (per expert) allow. HydraLoRA uses all of its few experts.
_CHANGES = {
    **{name: {"rank": 12} for name in ("lora", "rslora", "pissa", "milora")},
    "dora": {"rank": 11},
    "hydralora": {"rank": 16, "experts": 4, "top_k": 4},
}
MAIN = {name: Contender(name, name, replace(GOAT, **_CHANGES.get(name, {}))) for name in METHODS}


def _variant(method: str = "goat", **changes: object) -> Contender:
    """A method with changed settings, named after them; where none differs from GOAT's, the method of ``MAIN``."""
    kept = {name: value for name, value in changes.items() if getattr(GOAT, name) != value}
    words = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in kept.items()]
    return Contender(f"{method}[{','.join(words)}]", method, replace(GOAT, **kept)) if kept else MAIN[method]


#: Segment -> the adapter's ``init``.
_INITS = {
    **{"head": "goat", "tail": "goat_mini", "principal": "pissa", "minor": "milora"},
    **{"random": "random", "zero": "lora"},
}

#: Ablation -> (label of the row -> contender). GOAT itself is a row of each under its own name, and runs once.
ABLATIONS: dict[str, dict[str, Contender]] = {
    "segments": {
        f"{label}, {words}": _variant(init=init, scaling=scaling)
        for label, init in _INITS.items()
        for words, scaling in (("sqrt(3 eta N / D)", "goat"), ("alpha / D = 2", _PLAIN_SCALING))
    },
    "experts": {
        f"E {experts}, K {top_k}": _variant(experts=experts, top_k=top_k)
        for experts, top_k in ((1, 1), (2, 1), (4, 2), (8, 1), (8, 2), (8, 4), (8, 8))
    },
    "rank": {
        **{f"GOAT, R {rank}": _variant(rank=rank) for rank in (8, 16, 32)},
        "LoRA, R 8": Contender("lora[rank=8]", "lora", GOAT),  # "lora" is the one with as many parameters as GOAT
        **{f"LoRA, R {rank}": _variant("lora", rank=rank) for rank in (16, 32)},
    },
    "balance": {f"{value:g}": _variant(balance_coefficient=value) for value in (1e-1, 1e-2, 1e-3, 1e-4, 0.0)},
    "eta": {f"{value:g}": _variant(eta=value) for value in (0.1, 0.3, 1.0, 3.0, 10.0)},
}

#: The task of the ablations: one that runs in seconds.
ABLATION_TASK = "digits-rare"

#: Suite -> (name -> contender).
SUITES = {"main": MAIN, "ablation": {one.name: one for table in ABLATIONS.values() for one in table.values()}}
