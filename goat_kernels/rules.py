"""The rules a GOAT adapter is initialised and scaled by, each under the name users write in a configuration.

A new rule is one entry in a table here; the names are checked, and listed in error messages, from these tables. torch
is imported where a rule needs it, so that the names and help texts of a command line need nothing heavy.

Symbols (docs/math.md): N in_features, M out_features, E experts, R total rank, D = R / E, s scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _random(h: int, E: int, D: int, seed: int) -> list[int]:
    import torch

    drawn = torch.randperm(h, generator=torch.Generator().manual_seed(seed))[: E * D].reshape(E, D)
    return drawn.sort(dim=1).values.flatten().tolist()


#: Name -> (h, E, D, seed) -> R indices into the h singular values in descending order, D for each expert in turn: the
#: triples that it starts from. A rule may assume that they fit: D <= h // E has been checked.
SEGMENT_RULES: dict[str, Callable[[int, int, int, int], Sequence[int]]] = {
    # The paper's rule: the largest D triples of each of E equal chunks.
    "goat": lambda h, E, D, seed: [i * (h // E) + j for i in range(E) for j in range(D)],
    # The smallest D triples of each chunk.
    "goat_mini": lambda h, E, D, seed: [(i + 1) * (h // E) - D + j for i in range(E) for j in range(D)],
    # The R largest triples.
    "pissa": lambda h, E, D, seed: range(E * D),
    # The R smallest triples.
    "milora": lambda h, E, D, seed: range(h - E * D, h),
    # The ceil(R/2) largest triples, then the floor(R/2) smallest.
    "pissa_milora": lambda h, E, D, seed: [*range(E * D - E * D // 2), *range(h - E * D // 2, h)],
    # R distinct triples, drawn without replacement; each expert's in descending order.
    "random": _random,
}

#: Rules that take nothing from the weight: A is Kaiming-uniform, B is zero. ``hydralora`` shares one A among experts.
ZERO_RULES = ("lora", "hydralora")

INIT_RULES: tuple[str, ...] = (*SEGMENT_RULES, *ZERO_RULES)


def _per_expert(N: int, D: int, eta: float, lora_alpha: float, segment_sums: torch.Tensor) -> torch.Tensor:
    if bool((segment_sums <= 0).any()):
        idle = [i for i, total in enumerate(segment_sums.tolist()) if total <= 0]
        raise ValueError(
            f"scaling='goat_s' divides by the sum of each segment's singular values, which is 0 for experts {idle}; "
            "use scaling='goat', or fewer experts"
        )
    return math.sqrt(3 * eta * N / D) * (segment_sums[0] / segment_sums).sqrt()


#: Name -> (N, D, eta, lora_alpha, segment_sums) -> s: a float, or one number per expert [E]. segment_sums [E] is the
#: sum of the singular values of each expert's segment, None for the zero rules.
SCALING_RULES: dict[str, Callable[[int, int, float, float, torch.Tensor | None], float | torch.Tensor]] = {
    # The paper's Thm 3.5.
    "goat": lambda N, D, eta, lora_alpha, segment_sums: math.sqrt(3 * eta * N / D),
    # s_i = s_1 * sqrt(sum S of segment 1 / sum S of segment i), with s_1 from "goat".
    "goat_s": _per_expert,
    "lora": lambda N, D, eta, lora_alpha, segment_sums: lora_alpha / D,
    "rslora": lambda N, D, eta, lora_alpha, segment_sums: lora_alpha / math.sqrt(D),
}

#: Scaling rules that give one number per expert, from singular values; the others give one float.
PER_EXPERT_SCALINGS = ("goat_s",)
