"""What is compared: the methods at equal trainable parameters, and the variants of GOAT that the ablations ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from goat_kernels.finetuning.methods import METHODS, SizeOf
from goat_kernels.finetuning.models import BaseModel
from goat_kernels.finetuning.options import FinetuneOptions

#: GOAT's settings, the paper's: E 8, K 2, R 8, rho 10, eta 1, balance coefficient 1e-3.
GOAT = FinetuneOptions(rank=8, experts=8, top_k=2, eta=1.0, rho=10.0, balance_coefficient=1e-3)

#: HydraLoRA weighs all of its few experts; its ranks are then fine enough for an equal number of parameters.
_HYDRALORA = {"experts": 4, "top_k": 4}

#: s of the ablations without the paper's scaling: alpha / D with alpha = 2 D, LoRA's usual choice.
_PLAIN_SCALING = 2.0


@dataclass(frozen=True)
class Contender:
    """One method with its settings.

    Attributes:
        name: unique; the method's, or the settings that differ from GOAT's.
        method: a key of ``METHODS``.
        changes: fields of ``FinetuneOptions`` that differ from ``GOAT``.
        equal: whether its rank is chosen so that as many parameters train as with GOAT; else it is ``GOAT``'s, changed.
    """

    name: str
    method: str
    changes: dict[str, object] = field(default_factory=dict)
    equal: bool = False

    def options(self, base: BaseModel) -> FinetuneOptions:
        """The adapter's settings on a model."""
        adapter = replace(GOAT, **self.changes)
        return replace(adapter, rank=equal_rank(self.method, adapter, base)) if self.equal else adapter


MAIN: dict[str, Contender] = {
    name: Contender(
        name,
        name,
        _HYDRALORA if name == "hydralora" else {},
        equal=method.config is not None and not name.startswith("goat"),
    )
    for name, method in METHODS.items()
}

_INITS = {
    "head": "goat",
    "tail": "goat_mini",
    "principal": "pissa",
    "minor": "milora",
    "random": "random",
    "zero": "lora",
}


def _variant(**changes: object) -> Contender:
    kept = {name: value for name, value in changes.items() if getattr(GOAT, name) != value}
    name = ",".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in kept.items())
    return Contender(f"goat[{name}]", "goat", kept) if kept else MAIN["goat"]


#: Ablation -> (row's label -> contender). GOAT itself stands among them under its own name, and is not run twice.
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
        **{
            f"LoRA, R {rank}": Contender(f"lora[rank={rank}]", "lora", {"rank": rank} if rank != GOAT.rank else {})
            for rank in (8, 16, 32)
        },
    },
    "balance": {f"{value:g}": _variant(balance_coefficient=value) for value in (1e-1, 1e-2, 1e-3, 1e-4, 0.0)},
    "eta": {f"{value:g}": _variant(eta=value) for value in (0.1, 0.3, 1.0, 3.0, 10.0)},
}

#: The task of the ablations: one that runs in seconds.
ABLATION_TASK = "digits-rare"

#: A second one, for the ablations that the first raises a question about; ``--only`` and ``--methods`` run it.
SECOND_ABLATION_TASK = "python-to-prose"


def contenders(suite: str) -> dict[str, Contender]:
    """Name -> contender, of ``main`` or ``ablation``."""
    if suite == "main":
        return MAIN
    return {contender.name: contender for of_table in ABLATIONS.values() for contender in of_table.values()}


def adapted_layers(base: BaseModel) -> Iterator[tuple[int, int]]:
    """(N, M) of every layer that the adapters go on: all linear layers but the head and the output."""
    model = base.load()
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        new = any(name == head or name.startswith(f"{head}.") for head in base.new_modules)
        if isinstance(module, nn.Linear) and module is not output and not new:
            yield module.in_features, module.out_features


def equal_rank(method: str, adapter: FinetuneOptions, base: BaseModel) -> int:
    """The rank at which a method trains as many parameters as GOAT, as closely as whole ranks (per expert) allow."""
    layers = list(adapted_layers(base))
    budget = _size(METHODS["goat"].size, layers, GOAT.rank, GOAT.experts)
    step = adapter.experts if METHODS[method].rates_of == "goat" else 1
    ranks = range(step, 8 * GOAT.rank + 1, step)
    return min(ranks, key=lambda rank: abs(_size(METHODS[method].size, layers, rank, adapter.experts) - budget))


def _size(size: SizeOf, layers: list[tuple[int, int]], rank: int, experts: int) -> int:
    return sum(size(N, M, rank, experts) for N, M in layers)
