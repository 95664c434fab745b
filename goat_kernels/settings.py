"""The hyper-parameters of one GOAT adapter, validated once, shared by ``GoatLinear`` and the PEFT tuner."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field, fields
from typing import Any

from goat_kernels.rules import INIT_RULES, PER_EXPERT_SCALINGS, SCALING_RULES, SEGMENT_RULES, ZERO_RULES

RESIDUAL_FORMS = ("path", "fold")


def described(default: Any, text: str) -> Any:
    """A dataclass field with a help text; ``default`` is the value, or a function that makes it."""
    made = {"default_factory": default} if callable(default) else {"default": default}
    return field(**made, metadata={"help": text})


def document_fields(cls: type) -> type:
    """Class decorator: append the help text of every dataclass field that has one to the docstring."""
    texts = [(f.name, f.metadata["help"]) for f in fields(cls) if "help" in f.metadata]
    cls.__doc__ = "\n".join(
        [inspect.cleandoc(cls.__doc__ or ""), "", "Fields:", *(f"    {n}: {text}" for n, text in texts)]
    )
    return cls


@document_fields
@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Hyper-parameters of one adapter; a bad value raises as soon as the object is made.

    Every hyper-parameter is declared here alone, with its default and its help text: ``GoatConfig``, the command line
    and the table in docs/peft.md take both from these fields.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument outside its range; the message names it, its value and what it needs.
    """

    r: int = described(32, "Total rank R over all experts; divisible by num_experts.")
    num_experts: int = described(8, "Number of experts E, at least 1.")
    top_k: int = described(2, "Experts K that a token uses, in 1..num_experts.")
    scaling: str | float = described(
        "goat",
        "s: 'goat' sqrt(3 eta N / D) (Thm 3.5), 'goat_s' the same per expert, 'lora' lora_alpha / D, 'rslora' "
        "lora_alpha / sqrt(D), or a positive number. N is in_features, D = r / num_experts.",
    )
    eta: float = described(1.0, "Full fine-tuning learning rate / LoRA learning rate, in the goat scalings; positive.")
    rho: float = described(
        10.0, "Divisor of the adapter's share of the weight: s B0_i A0_i = segment_i / rho; positive."
    )
    lora_alpha: float = described(16, "alpha of the 'lora' and 'rslora' scalings; read by no other.")
    init: str = described(
        "goat",
        "Which singular triples the experts start from: 'goat', 'goat_mini', 'pissa', 'milora', 'pissa_milora', "
        "'random'; or none: 'lora', 'hydralora'.",
    )
    residual: str = described(
        "path",
        "How W_res is subtracted: 'path' as frozen hidden columns beside an untouched weight, 'fold' inside the "
        "weight, which is restored exactly when the adapter is switched off, and which allows one active adapter.",
    )
    residual_coefficient: float | None = described(
        None, "W_res = coefficient * sum_i s_i B0_i A0_i; None is 1 / num_experts (Thm 3.4), 0 is no residual."
    )
    dropout: float = described(0.0, "Probability of dropout on x, independent for each expert a token uses; in [0, 1).")
    balance_coefficient: float = described(
        0.0, "Weight of each layer's load-balancing loss, injected in backward while training; 0 injects nothing."
    )
    svd: str = described("full", "'full', or 'randomized' for init rules that need only the R largest triples.")
    seed: int = described(0, "Seed of the triples that init='random' draws.")

    def __post_init__(self) -> None:
        for name in ("r", "num_experts", "top_k"):
            check_count(name, getattr(self, name))
        if self.r % self.num_experts:
            raise ValueError(
                f"r={self.r} must be divisible by num_experts={self.num_experts}: every expert has rank r / num_experts"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} must lie in 1..num_experts={self.num_experts}")
        check_name("init", self.init, INIT_RULES)
        check_name("residual", self.residual, RESIDUAL_FORMS)
        check_name("svd", self.svd, ("full", "randomized"))
        if isinstance(self.scaling, str):
            check_name("scaling", self.scaling, SCALING_RULES, alternative="a positive number")
        else:
            check_number("scaling", self.scaling, exclusive=True)
        if self.per_expert_scaling and self.init in ZERO_RULES:
            raise ValueError(
                f"scaling={self.scaling!r} needs the singular values of each expert's segment, which "
                f"init={self.init!r} does not take; use init {', '.join(SEGMENT_RULES)}, or another scaling"
            )
        for name in ("eta", "rho", "lora_alpha"):
            check_number(name, getattr(self, name), exclusive=True)
        if self.residual_coefficient is not None:
            check_number("residual_coefficient", self.residual_coefficient)
        check_number("dropout", self.dropout, below=1)
        check_number("balance_coefficient", self.balance_coefficient)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")

    @property
    def expert_rank(self) -> int:
        """D = R / E, the rank of one expert."""
        return self.r // self.num_experts

    @property
    def per_expert_scaling(self) -> bool:
        """Whether s is one number per expert rather than one for all."""
        return self.scaling in PER_EXPERT_SCALINGS

    @property
    def w_res_coefficient(self) -> float:
        """The coefficient of W_res, with the default 1/E filled in (Thm 3.4)."""
        return 1 / self.num_experts if self.residual_coefficient is None else float(self.residual_coefficient)

    @property
    def has_residual(self) -> bool:
        """Whether the adapter carries a frozen pair: not for the zero rules, nor with a coefficient of 0."""
        return self.init not in ZERO_RULES and self.w_res_coefficient != 0

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each tensor of an adapter on a weight [M, N] = [out_features, in_features]."""
        N, M, R, E = in_features, out_features, self.r, self.num_experts
        rows_of_A = self.expert_rank if self.init == "hydralora" else R  # hydralora's experts share one A
        shapes = {"lora_A": (rows_of_A, N), "lora_B": (M, R), "router": (E, N)}
        if self.has_residual:
            shapes |= {"residual_A": (R, N), "residual_B": (M, R)}
        if self.per_expert_scaling:
            shapes["scaling"] = (E,)
        return shapes


def check_count(name: str, value: object) -> None:
    """Raise unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def check_name(name: str, value: object, allowed, alternative: str = "") -> None:
    """Raise unless ``value`` is one of the names in ``allowed``; the message lists them."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, one of {', '.join(allowed)}, got {value!r}")
    if value not in allowed:
        or_else = f", or {alternative}" if alternative else ""
        raise ValueError(f"{name}={value!r} is unknown; it must be one of {', '.join(allowed)}{or_else}")


def check_number(name: str, value: object, *, exclusive: bool = False, below: float = math.inf) -> None:
    """Raise unless ``value`` is a finite number of at least (``exclusive``: above) 0 and under ``below``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < below or (exclusive and value == 0):  # NaN fails too; comparisons can be traced
        least = "above 0" if exclusive else "at least 0"
        needed = f"be a finite number {least}" if below == math.inf else f"lie in [0, {below})"
        raise ValueError(f"{name}={value} must {needed}")
