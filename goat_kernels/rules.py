"""The rules a GOAT adapter is initialised and scaled by, each under the name users write in a configuration.

Two tables: ``SEGMENT_RULES`` says which singular triples of the pretrained weight each expert receives, and
``SCALING_RULES`` says how the adapter's scaling s is derived. A new rule is one function and one entry here;
the names are checked, and listed in error messages, from these tables. torch is imported where a rule runs, so that the
names and help texts of a command line need nothing heavy.

Symbols (docs/math.md): N in_features, M out_features, E experts, R total rank, D = R / E, s scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# --- which singular triples an expert gets ------------------------------------------------------------------------
#
# A segment rule maps (h, E, D, generator) to indices [E, D] into the h singular values in descending order.
# It may assume that they fit: D <= h // E has been checked.

SegmentRule = Callable[[int, int, int, "torch.Generator | None"], "torch.Tensor"]


def _chunk_heads(h: int, E: int, D: int, generator: torch.Generator | None) -> torch.Tensor:
    """``goat``: the largest D triples of each of E equal chunks, [i*t, i*t + D) with t = h // E; the paper's rule."""
    import torch

    t = h // E
    return torch.arange(E)[:, None] * t + torch.arange(D)


def _chunk_tails(h: int, E: int, D: int, generator: torch.Generator | None) -> torch.Tensor:
    """``goat_mini``: the smallest D triples of each chunk, [(i+1)*t - D, (i+1)*t)."""
    import torch

    t = h // E
    return (torch.arange(E)[:, None] + 1) * t - D + torch.arange(D)


def _principal(h: int, E: int, D: int, generator: torch.Generator | None) -> torch.Tensor:
    """``pissa``: the R largest triples, D consecutive ones per expert."""
    import torch

    return torch.arange(E * D).reshape(E, D)


def _minor(h: int, E: int, D: int, generator: torch.Generator | None) -> torch.Tensor:
    """``milora``: the R smallest triples, D consecutive ones per expert."""
    import torch

    return (h - E * D + torch.arange(E * D)).reshape(E, D)


def _principal_and_minor(h: int, E: int, D: int, generator: torch.Generator | None) -> torch.Tensor:
    """``pissa_milora``: the ceil(R/2) largest triples, then the floor(R/2) smallest."""
    import torch

    R = E * D
    largest, smallest = R - R // 2, R // 2
    return torch.cat([torch.arange(largest), torch.arange(h - smallest, h)]).reshape(E, D)


def _random(h: int, E: int, D: int, generator: torch.Generator | None) -> torch.Tensor:
    """``random``: R distinct triples drawn without replacement; each expert's triples in descending order."""
    import torch

    drawn = torch.randperm(h, generator=generator)[: E * D].reshape(E, D)
    return drawn.sort(dim=1).values


SEGMENT_RULES: dict[str, SegmentRule] = {
    "goat": _chunk_heads,
    "goat_mini": _chunk_tails,
    "pissa": _principal,
    "milora": _minor,
    "pissa_milora": _principal_and_minor,
    "random": _random,
}

#: Rules that take nothing from the weight: A is Kaiming-uniform, B is zero. ``hydralora`` shares one A among experts.
ZERO_RULES = ("lora", "hydralora")

INIT_RULES: tuple[str, ...] = (*SEGMENT_RULES, *ZERO_RULES)


def needs_only_largest(init: str, num_experts: int) -> bool:
    """Whether rule ``init`` uses just the R largest triples, so that a partial SVD suffices."""
    return init == "pissa" or (init == "goat" and num_experts == 1)


# --- scaling ----------------------------------------------------------------------------------------------------
#
# A scaling rule maps (N, D, eta, lora_alpha, segment_sums) to s: a float, or one number per expert [E].
# segment_sums [E] is the sum of the singular values of each expert's segment, None for the zero rules.

ScalingRule = Callable[[int, int, float, float, "torch.Tensor | None"], "float | torch.Tensor"]


def _theorem(N: int, D: int, eta: float, lora_alpha: float, segment_sums: torch.Tensor | None) -> float:
    """``goat``: s = sqrt(3 * eta * N / D) (paper, Thm 3.5)."""
    return math.sqrt(3 * eta * N / D)


def _theorem_per_expert(
    N: int, D: int, eta: float, lora_alpha: float, segment_sums: torch.Tensor | None
) -> torch.Tensor:
    """``goat_s``: s_i = s_1 * sqrt(sum S of segment 1 / sum S of segment i), with s_1 from ``goat``."""
    if bool((segment_sums <= 0).any()):
        idle = [i for i, total in enumerate(segment_sums.tolist()) if total <= 0]
        raise ValueError(
            f"scaling='goat_s' divides by the sum of each segment's singular values, which is 0 for experts {idle}; "
            "use scaling='goat', or fewer experts"
        )
    return _theorem(N, D, eta, lora_alpha, None) * (segment_sums[0] / segment_sums).sqrt()


def _alpha_over_rank(N: int, D: int, eta: float, lora_alpha: float, segment_sums: torch.Tensor | None) -> float:
    """``lora``: s = alpha / D."""
    return lora_alpha / D


def _alpha_over_sqrt_rank(N: int, D: int, eta: float, lora_alpha: float, segment_sums: torch.Tensor | None) -> float:
    """``rslora``: s = alpha / sqrt(D)."""
    return lora_alpha / math.sqrt(D)


#: Scaling rules that give one number per expert, from singular values; the others give one float.
PER_EXPERT_SCALINGS = ("goat_s",)

SCALING_RULES: dict[str, ScalingRule] = {
    "goat": _theorem,
    "goat_s": _theorem_per_expert,
    "lora": _alpha_over_rank,
    "rslora": _alpha_over_sqrt_rank,
}
