"""From a pretrained weight to a GOAT adapter: SVD, segments, scaling, residual (paper, Thms 3.4 and 3.5).

    W0 = U diag(S) Vt                            thin SVD, float32 or better
    B0_i = U_seg sqrt(S_seg / (s_i rho))         expert i's segment of the triples
    A0_i = sqrt(S_seg / (s_i rho)) Vt_seg        so that s_i B0_i A0_i = segment_i / rho, whatever s is
    W_res = c * sum_i s_i B0_i A0_i,  c = 1/E    (Thm 3.4) subtracted from W0, or run as frozen hidden columns

Nothing here touches a module or changes a weight. The rules themselves are in ``rules.py``.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from goat_kernels.rules import SCALING_RULES, SEGMENT_RULES
from goat_kernels.settings import AdapterSettings

#: Randomised SVD: extra columns beyond R, and power iterations. Both above the values Halko et al. (2011) advise.
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6


@dataclass(frozen=True)
class InitialAdapter:
    """The tensors that one adapter starts from.

    Attributes:
        lora_A, lora_B, router: of the shapes that ``AdapterSettings.shapes`` gives.
        scaling: s, a float, or float32 [E] where it differs by expert.
        residual: the frozen pair (A0 [R, N], B0 [M, R]) with W_res = B0 A0 and every factor inside B0; None where
            W_res is zero.
        svd_error: 0 for a full SVD; for the randomised one ||W V - U S||_F / ||S||_F over the triples used.
    """

    lora_A: Tensor
    lora_B: Tensor
    router: Tensor
    scaling: float | Tensor
    residual: tuple[Tensor, Tensor] | None
    svd_error: float = 0.0

    def named(self) -> dict[str, Tensor]:
        """Name -> tensor, of those that there are; as ``AdapterSettings.shapes`` names them."""
        named = {"lora_A": self.lora_A, "lora_B": self.lora_B, "router": self.router}
        if self.residual is not None:
            named["residual_A"], named["residual_B"] = self.residual
        return named | ({"scaling": self.scaling} if isinstance(self.scaling, Tensor) else {})


def initialise_adapter(
    weight: Tensor,
    settings: AdapterSettings,
    *,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    name: str = "weight",
) -> InitialAdapter:
    """The adapter that ``settings`` prescribes for one pretrained weight.

    Args:
        weight: [M, N], any floating dtype; the SVD runs on its device, in float32 (float64 for a float64 weight).
        settings: the hyper-parameters.
        dtype: dtype of the result; by default float32, float64 for a float64 weight.
        generator: CPU generator for every random draw; the global one by default.
        name: how error messages and warnings call the weight.

    Raises:
        TypeError: the weight is not floating-point.
        ValueError: the weight is not a matrix, has non-finite entries, or has too few singular values for the rule.
    """
    weight = weight.detach()
    check_weight(weight, settings, name)
    (M, N), E, D, device = weight.shape, settings.num_experts, settings.expert_rank, weight.device
    wide = torch.promote_types(weight.dtype, torch.float32)
    dtype = dtype or wide
    if settings.init not in SEGMENT_RULES:
        router = draw_uniform((E, N), device, dtype, generator)
        lora_A = draw_uniform(settings.shapes(N, M)["lora_A"], device, dtype, generator)
        lora_B = torch.zeros(M, settings.r, device=device, dtype=dtype)
        return InitialAdapter(lora_A, lora_B, router, adapter_scaling(settings, N), residual=None)

    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name} has entries that are not finite, so it has no singular value decomposition")
    if settings.svd == "randomized":
        U, S, Vt, error = randomized_svd(weight.to(wide), settings.r, generator=generator)
    else:
        (U, S, Vt), error = torch.linalg.svd(weight.to(wide), full_matrices=False), 0.0
    router = draw_uniform((E, N), device, dtype, generator)
    chosen = SEGMENT_RULES[settings.init](min(M, N), E, D, settings.seed)
    index = torch.tensor(chosen, device=device)  # [R]
    S_segments = S[index].reshape(E, D)
    zero = S[0] * max(M, N) * torch.finfo(wide).eps  # to the SVD's precision
    if idle := (S_segments <= zero).all(dim=1).nonzero().flatten().tolist():
        warnings.warn(
            f"{name}: the singular values of the segments of experts {idle} are zero, so these experts start at zero "
            "on both sides and would never learn; use fewer experts, a lower rank, or init='lora'",
            stacklevel=2,
        )
    scaling = adapter_scaling(settings, N, S_segments.sum(dim=1))
    s_E = scaling.to(S_segments) if isinstance(scaling, Tensor) else S_segments.new_full((E,), scaling)
    root = (S_segments / (s_E[:, None] * settings.rho)).sqrt().reshape(-1)  # [R]
    A0 = root[:, None] * Vt[index]
    B0 = U[:, index] * root
    coefficient, residual = settings.w_res_coefficient, None
    if coefficient != 0:
        residual = (A0.to(dtype, copy=True), (coefficient * B0 * s_E.repeat_interleave(D)).to(dtype))
    return InitialAdapter(A0.to(dtype), B0.to(dtype), router, scaling, residual, error)


def check_weight(weight: Tensor, settings: AdapterSettings, name: str = "weight") -> None:
    """Raise unless ``settings`` can initialise an adapter on ``weight``; reads the shape and dtype alone."""
    if not weight.is_floating_point():
        raise TypeError(
            f"{name} must be floating-point to be decomposed, got {weight.dtype}; dequantise a quantised weight first"
        )
    if weight.ndim != 2:
        raise ValueError(f"{name} must be a matrix [out_features, in_features], got shape {tuple(weight.shape)}")
    if settings.init not in SEGMENT_RULES:
        return
    h = min(weight.shape)
    capacity = h // settings.num_experts  # of a chunk; and without chunks R = E*D <= h comes to the same
    if settings.expert_rank > capacity:
        lower_rank = f"lower its rank to at most {capacity * settings.num_experts} (rank_pattern)"
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} has {h} singular values, but init={settings.init!r} with "
            f"r={settings.r} and num_experts={settings.num_experts} needs {settings.num_experts} segments of "
            f"{settings.expert_rank}: {lower_rank if capacity else 'use fewer experts'}, "
            "leave the module out (exclude_modules), or use init='lora'"
        )
    needs_only_largest = settings.init == "pissa" or (settings.init == "goat" and settings.num_experts == 1)
    if settings.svd == "randomized" and not needs_only_largest:
        raise ValueError(
            f"svd='randomized' finds only the largest singular triples, but init={settings.init!r} with "
            f"num_experts={settings.num_experts} needs others too; use svd='full', or init='pissa'"
        )


def randomized_svd(
    matrix: Tensor, rank: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(U [M, rank], S [rank] descending, Vt [rank, N], error): the largest singular triples of ``matrix`` [M, N].

    By subspace iteration (Halko, Martinsson & Tropp 2011, Alg. 4.4 and 5.1), from a start that ``generator`` draws on
    the CPU. The error is that of the subspace, measured: ||W V - U S||_F / ||S||_F. Six power iterations shrink the
    share of direction j > rank + 16 by (S_j / S_rank)^13; on a flat spectrum (a random matrix) single vectors still mix
    with their neighbours, while the subspace's energy is right.
    """
    M, N = matrix.shape
    columns = min(rank + _OVERSAMPLING, M, N)
    start = torch.randn(N, columns, generator=generator, dtype=matrix.dtype).to(matrix.device)
    Q = torch.linalg.qr(matrix @ start).Q
    for _ in range(_POWER_ITERATIONS):
        Q = torch.linalg.qr(matrix.T @ Q).Q
        Q = torch.linalg.qr(matrix @ Q).Q
    U, S, Vt = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    U, S, Vt = (Q @ U)[:, :rank], S[:rank], Vt[:rank]
    # Vt comes from Q^T W, so W^T U = V S holds by construction; the error of the subspace shows on the other side.
    error = torch.linalg.norm(matrix @ Vt.T - U * S) / torch.linalg.norm(S).clamp_min(torch.finfo(S.dtype).tiny)
    return U, S, Vt, float(error)


def adapter_scaling(settings: AdapterSettings, in_features: int, segment_sums: Tensor | None = None) -> float | Tensor:
    """s for an adapter on a layer with ``in_features`` inputs: a float, or float32 [E] for the per-expert rules.

    These alone read ``segment_sums`` [E], of the singular values of each expert's segment.
    """
    if not isinstance(settings.scaling, str):
        return float(settings.scaling)
    rule = SCALING_RULES[settings.scaling]
    scaling = rule(in_features, settings.expert_rank, settings.eta, settings.lora_alpha, segment_sums)
    return scaling.float() if isinstance(scaling, Tensor) else scaling


def draw_uniform(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Tensor:
    """nn.Linear's default weight initialisation, uniform in +-1/sqrt(fan_in), drawn on the CPU in float32 or better."""
    values = torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32), device="cpu")
    torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values.to(device=device, dtype=dtype)
