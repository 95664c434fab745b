"""The hyper-parameters of one GOAT adapter, validated once, shared by ``GoatLinear`` and the PEFT tuner."""

from __future__ import annotations

import math
from dataclasses import dataclass

from goat_kernels.rules import INIT_RULES, PER_EXPERT_SCALINGS, SCALING_RULES, SEGMENT_RULES, ZERO_RULES

RESIDUAL_FORMS = ("path", "fold")
SVD_METHODS = ("full", "randomized")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Hyper-parameters of one adapter; a bad value raises as soon as the object is made.

    Attributes:
        r: total rank R over all experts; divisible by ``num_experts``.
        num_experts: number of experts E, at least 1.
        top_k: experts K that a token uses, in 1..E.
        scaling: ``"goat"`` s = sqrt(3 eta N / D) (Thm 3.5), ``"goat_s"`` the same per expert, ``"lora"`` alpha / D,
            ``"rslora"`` alpha / sqrt(D), or a positive number.
        eta: full fine-tuning learning rate / LoRA learning rate, in the ``goat`` scalings; positive.
        rho: divisor of the adapter's share of the weight: s * B0_i A0_i = segment / rho; positive.
        lora_alpha: alpha of the ``lora`` and ``rslora`` scalings; read by no other rule.
        init: which singular triples each expert starts from (``goat_kernels.rules``).
        residual: how W_res is subtracted: ``"path"`` as frozen hidden columns, ``"fold"`` inside the weight.
        residual_coefficient: W_res = coefficient * sum_i s_i B0_i A0_i; None means 1/E (Thm 3.4).
        dropout: probability of an independent dropout per expert on x, in [0, 1).
        balance_coefficient: weight of the balance loss that the layer injects in backward; 0 injects nothing.
        svd: ``"full"``, or ``"randomized"`` for the rules that need only the R largest triples.
        seed: seed of the triples that ``init="random"`` draws.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument outside its range; the message names it, its value and what it needs.
    """

    r: int = 32
    num_experts: int = 8
    top_k: int = 2
    scaling: str | float = "goat"
    eta: float = 1.0
    rho: float = 10.0
    lora_alpha: float = 16
    init: str = "goat"
    residual: str = "path"
    residual_coefficient: float | None = None
    dropout: float = 0.0
    balance_coefficient: float = 0.0
    svd: str = "full"
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("r", self.r)
        check_count("num_experts", self.num_experts)
        check_count("top_k", self.top_k)
        if self.r % self.num_experts:
            raise ValueError(
                f"r={self.r} must be divisible by num_experts={self.num_experts}: every expert has rank r / num_experts"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} must lie in 1..num_experts={self.num_experts}")
        check_name("init", self.init, INIT_RULES)
        check_name("residual", self.residual, RESIDUAL_FORMS)
        check_name("svd", self.svd, SVD_METHODS)
        if isinstance(self.scaling, str):
            check_name("scaling", self.scaling, SCALING_RULES, alternative="a positive number")
        else:
            check_number("scaling", self.scaling, minimum=0, exclusive=True)
        if self.per_expert_scaling and self.init in ZERO_RULES:
            raise ValueError(
                f"scaling={self.scaling!r} needs the singular values of each expert's segment, which "
                f"init={self.init!r} does not take; use init {', '.join(SEGMENT_RULES)}, or another scaling"
            )
        check_number("eta", self.eta, minimum=0, exclusive=True)
        check_number("rho", self.rho, minimum=0, exclusive=True)
        check_number("lora_alpha", self.lora_alpha, minimum=0, exclusive=True)
        if self.residual_coefficient is not None:
            check_number("residual_coefficient", self.residual_coefficient, minimum=0)
        check_dropout("dropout", self.dropout)
        check_number("balance_coefficient", self.balance_coefficient, minimum=0)
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


def check_number(name: str, value: object, *, minimum: float, exclusive: bool = False) -> None:
    """Raise unless ``value`` is a finite number of at least (``exclusive``: above) ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not minimum <= value < math.inf or (exclusive and value == minimum):  # NaN fails too; comparisons can be traced
        bound = f"above {minimum}" if exclusive else f"at least {minimum}"
        raise ValueError(f"{name}={value} must be a finite number {bound}")


def check_dropout(name: str, value: object) -> None:
    """Raise unless ``value`` is a probability in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} must lie in [0, 1)")
