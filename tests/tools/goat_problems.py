"""Random GOAT layers for the tests, and how to run an implementation on one and compare it with the oracle.

Letters as everywhere: T tokens, N in_features, M out_features, R total rank, E experts, K top_k, R0 residual rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from goat_kernels import goat_linear, goat_reference
from goat_kernels.dropout import keep_masks
from goat_kernels.numerics import TOLERANCES, relative_error
from goat_kernels.reference import select_top_k

#: The tensors that can get a gradient.
TRAINABLE = ("x", "weight", "bias", "lora_A", "lora_B", "router")

#: What the balance loss counts in the losses that tests differentiate: enough to matter in every gradient.
BALANCE_SHARE = 0.7


@dataclass(frozen=True)
class Problem:
    """One layer's inputs; ``residual`` is a pair (A0, B0) or None, ``scaling`` a number or a tensor [E]."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    router: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    top_k: int
    residual: tuple[Tensor, Tensor] | None

    @property
    def logits_TE(self) -> Tensor:
        """In float64."""
        return self.x.reshape(-1, self.x.shape[-1]).double() @ self.router.double().t()

    def present(self) -> tuple[str, ...]:
        """The names of TRAINABLE that this problem has."""
        return tuple(name for name in TRAINABLE if getattr(self, name) is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """Every tensor replaced by ``function`` of it."""

        def apply(value):
            if isinstance(value, Tensor):
                return function(value)
            return tuple(function(part) for part in value) if isinstance(value, tuple) else value

        return Problem(**{field.name: apply(getattr(self, field.name)) for field in fields(self)})

    def double(self) -> Problem:
        """The same (rounded) values in float64, for the oracle."""
        return self.map(lambda tensor: tensor.detach().double())

    def leaves(self, needs: Iterable[str]) -> Problem:
        """The same values as fresh leaves; those named in ``needs`` require grad."""
        needs = set(needs)
        copies = {
            name: getattr(self, name).detach().clone(memory_format=torch.preserve_format).requires_grad_(name in needs)
            for name in self.present()
        }
        return replace(self, **copies)


def make_problem(
    T: int = 17,
    N: int = 13,
    M: int = 11,
    R: int = 8,
    E: int = 4,
    K: int = 2,
    *,
    dtype: torch.dtype = torch.float64,
    adapter_dtype: torch.dtype | None = None,
    R0: int | None = None,
    bias: bool = True,
    per_expert: bool = False,
    leading: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Problem:
    """A problem of unit scale: every product has entries of about 1, the gates differ, the logits do not tie."""
    generator = torch.Generator().manual_seed(seed)
    adapter_dtype = adapter_dtype or dtype

    def normal(*shape: int, scale: float = 1.0, to: torch.dtype = adapter_dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(to)

    leading = (T,) if leading is None else leading
    scaling: float | Tensor = 1.7
    if per_expert:
        scaling = (torch.rand(E, generator=generator, dtype=torch.float64) + 0.5).to(torch.float32)
    return Problem(
        x=normal(*leading, N, to=dtype),
        weight=normal(M, N, scale=N**-0.5, to=dtype),
        lora_A=normal(R, N, scale=N**-0.5),
        lora_B=normal(M, R, scale=R**-0.5),
        router=normal(E, N, scale=N**-0.5),
        bias=normal(M, to=dtype) if bias else None,
        scaling=scaling,
        top_k=K,
        residual=None if R0 is None else (normal(R0, N, scale=N**-0.5), normal(M, R0, scale=max(R0, 1) ** -0.5)),
    )


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward gave; ``gradients`` holds None where no gradient came."""

    output: Tensor
    balance_loss: Tensor
    gradients: dict[str, Tensor | None]


def evaluate(
    function: Callable,
    problem: Problem,
    *,
    needs: Iterable[str] | None = None,
    use_output: bool = True,
    balance_share: float = BALANCE_SHARE,
    **options,
) -> Outcome:
    """Run ``function(x, weight, lora_A, lora_B, router, ...)`` and differentiate a loss of both its results.

    Args:
        function: ``goat_linear``, ``goat_reference`` or anything called like them.
        problem: its inputs; copied to fresh leaves.
        needs: names that require grad; by default all present.
        use_output: whether the output is part of the loss.
        balance_share: coefficient of the balance loss in the loss; 0 leaves it out.
        **options: more keywords for ``function``.
    """
    leaves = problem.leaves(problem.present() if needs is None else needs)
    result = function(
        leaves.x,
        leaves.weight,
        leaves.lora_A,
        leaves.lora_B,
        leaves.router,
        bias=leaves.bias,
        scaling=leaves.scaling,
        top_k=leaves.top_k,
        residual=leaves.residual,
        **options,
    )
    loss = torch.zeros((), dtype=torch.float64)
    if use_output:
        loss = loss + (result.output.double() * output_weights(result.output)).sum()
    if balance_share:
        loss = loss + balance_share * result.balance_loss.double()
    if loss.requires_grad:
        loss.backward()
    gradients = {name: getattr(leaves, name).grad for name in problem.present()}
    return Outcome(result.output.detach(), result.balance_loss.detach(), gradients)


def output_weights(output: Tensor) -> Tensor:
    """Fixed numbers of unit scale, exact in every dtype (multiples of 1/4), that a loss multiplies the output by."""
    generator = torch.Generator().manual_seed(output.numel())
    return torch.randint(-7, 8, output.shape, generator=generator).double() / 4


def evaluate_oracle(problem: Problem, **options) -> Outcome:
    """The float64 oracle on the problem's values, as :func:`evaluate` runs it."""
    return evaluate(goat_reference, problem.double(), **options)


def fast_selection(problem: Problem) -> Tensor:
    """bool [T, E], the experts that the fast path chooses, seen from outside.

    The experts' B are replaced by matrices that write into one output each, and everything else is silenced: an output
    that is not zero belongs to a chosen expert. The products with x keep their shapes, so the logits keep their bits.
    """
    E, R = problem.router.shape[0], problem.lora_A.shape[0]
    indicator_ER = torch.eye(E).repeat_interleave(R // E, dim=1)
    residual = problem.residual
    if residual is not None:
        residual = (residual[0], residual[1].new_zeros(E, residual[0].shape[0]))
    with torch.no_grad():
        output = goat_linear(
            problem.x,
            problem.weight.new_zeros(E, problem.weight.shape[1]),
            problem.lora_A,
            indicator_ER.to(problem.lora_B),
            problem.router,
            scaling=1.0,
            top_k=problem.top_k,
            residual=residual,
            backend="torch",
        ).output
    return output.reshape(-1, E) != 0


def assert_close(name: str, result: Tensor, oracle: Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance table's bound for ``dtype``, in shape too."""
    error = relative_error(result.detach(), oracle.detach())
    bound = TOLERANCES[dtype].relative
    assert error <= bound, f"{name}: relative error {error:.3g} above {bound:.3g}"


def assert_outcomes_agree(result: Outcome, oracle: Outcome, dtype: torch.dtype) -> None:
    """Output, balance loss and every gradient within the bounds of the tolerance table.

    The balance loss is held to float32 even for half-precision x, because the router works in float32.
    """
    assert_close("output", result.output, oracle.output, dtype)
    stats = torch.promote_types(dtype, torch.float32)
    assert_close("balance_loss", result.balance_loss, oracle.balance_loss, stats)
    assert result.gradients.keys() == oracle.gradients.keys()
    for name, expected in oracle.gradients.items():
        gradient = result.gradients[name]
        assert (gradient is None) == (expected is None), f"gradient of {name}: {gradient} against {expected}"
        if expected is not None:
            assert_close(f"gradient of {name}", gradient, expected, dtype)


def assert_outcomes_identical(first: Outcome, second: Outcome) -> None:
    """Bit for bit."""
    assert torch.equal(first.output, second.output)
    assert torch.equal(first.balance_loss, second.balance_loss)
    for name, gradient in first.gradients.items():
        other = second.gradients[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name


def run_goat(problem: Problem, **options) -> Outcome:
    """:func:`evaluate` of ``goat_linear`` on the torch backend."""
    return evaluate(goat_linear, problem, backend="torch", **options)


def selection_mismatch(logits: Tensor, selection: Tensor, top_k: int) -> float:
    """The largest relative gap by which ``selection`` misses the exact top K of ``logits``; 0 where it is exact.

    Args:
        logits: [T, E] in high precision.
        selection: bool [T, E] with ``top_k`` True in each row.
        top_k: K.

    Returns:
        max over tokens of (smallest logit that should have been chosen and was not - largest that was chosen and
        should not have been) / max |logit|; compare it with ``goat_kernels.numerics.SELECTION_GAP``.
    """
    exact = select_top_k(logits, top_k)
    missed, wrong = exact & ~selection, selection & ~exact
    rows = missed.any(dim=-1)
    if not bool(rows.any()):
        return 0.0
    lost = logits.masked_fill(~missed, float("-inf")).amax(dim=-1)[rows]
    gained = logits.masked_fill(~wrong, float("inf")).amin(dim=-1)[rows]
    return float(((lost - gained) / logits.abs().amax(dim=-1)[rows]).max())


def keep_mask(seed: Tensor, T: int, N: int, slot: int, dropout_p: float) -> Tensor:
    """The mask of one slot, bool [T, N]; see :func:`goat_kernels.dropout.keep_masks`."""
    return list(keep_masks(seed, T, N, slot + 1, dropout_p))[slot]
