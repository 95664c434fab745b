"""What is compared: the methods at equal trainable parameters, and the variants of GOAT in the ablations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.models import BaseModel
from goat_kernels.finetuning.options import FinetuneOptions

#: GOAT's settings, the paper's: E 8, K 2, R 8, rho 10, eta 1, balance coefficient 1e-3.
GOAT = FinetuneOptions(rank=8, experts=8, top_k=2, eta=1.0, rho=10.0, balance_coefficient=1e-3)

#: s of the ablations without the paper's scaling: alpha / D with alpha = 2 D, LoRA's usual choice.
_PLAIN_SCALING = 2.0


@dataclass(frozen=True)
class Contender:
    """One method with its settings.

    Attributes:
        name: unique; the method's, or the settings that differ from GOAT's.
        method: a key of ``METHODS``.
        changes: fields of ``FinetuneOptions`` that differ from ``GOAT``.
        equal: whether its rank is chosen so that it trains as many parameters as GOAT.
    """

    name: str
    method: str
    changes: dict[str, object] = field(default_factory=dict)
    equal: bool = False

    def options(self, base: BaseModel) -> FinetuneOptions:
        """The adapter's settings on a model; an equal rank is as close as whole ranks (per expert) allow."""
        adapter, method, layers = replace(GOAT, **self.changes), METHODS[self.method], list(adapted_layers(base))
        if not self.equal:
            return adapter
        budget = sum(METHODS["goat"].size(N, M, GOAT.rank, GOAT.experts) for N, M in layers)

        def distance(rank: int) -> int:
            return abs(sum(method.size(N, M, rank, adapter.experts) for N, M in layers) - budget)

        step = adapter.experts if method.rates_of == "goat" else 1
        return replace(adapter, rank=min(range(step, 8 * GOAT.rank + 1, step), key=distance))


#: HydraLoRA uses all of its few experts; with four, its rank is a multiple of four instead of eight.
MAIN: dict[str, Contender] = {
    name: Contender(
        name,
        name,
        {"experts": 4, "top_k": 4} if name == "hydralora" else {},
        equal=method.config is not None and not name.startswith("goat"),
    )
    for name, method in METHODS.items()
}


def _variant(method: str = "goat", **changes: object) -> Contender:
    """A method with changed settings, named after them; where none differs from GOAT's, the method of ``MAIN``."""
    kept = {name: value for name, value in changes.items() if getattr(GOAT, name) != value}
    words = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in kept.items()]
    return Contender(f"{method}[{','.join(words)}]", method, kept) if kept else MAIN[method]


_INITS = {
    "head": "goat",
    "tail": "goat_mini",
    "principal": "pissa",
    "minor": "milora",
    "random": "random",
    "zero": "lora",
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
        "LoRA, R 8": Contender("lora[rank=8]", "lora"),  # "lora" is the one with as many parameters as GOAT
        **{f"LoRA, R {rank}": _variant("lora", rank=rank) for rank in (16, 32)},
    },
    "balance": {f"{value:g}": _variant(balance_coefficient=value) for value in (1e-1, 1e-2, 1e-3, 1e-4, 0.0)},
    "eta": {f"{value:g}": _variant(eta=value) for value in (0.1, 0.3, 1.0, 3.0, 10.0)},
}

#: The task of the ablations: one that runs in seconds.
ABLATION_TASK = "digits-rare"

#: A second task, for questions that the first leaves open; ``--only`` and ``--methods`` run it.
SECOND_ABLATION_TASK = "python-to-prose"


def contenders(suite: str) -> dict[str, Contender]:
    """Name -> contender, of ``main`` or ``ablation``."""
    if suite == "main":
        return MAIN
    return {contender.name: contender for of_table in ABLATIONS.values() for contender in of_table.values()}


def adapted_layers(base: BaseModel) -> Iterator[tuple[int, int]]:
    """(N, M) of every layer that the adapters go on: all linear layers but the head and the output."""
    model, heads = base.load(), tuple(f"{head}." for head in base.new_modules)
    for name, module in model.named_modules():
        is_output = module is model.get_output_embeddings() or f"{name}.".startswith(heads)
        if isinstance(module, nn.Linear) and not is_output:
            yield module.in_features, module.out_features
