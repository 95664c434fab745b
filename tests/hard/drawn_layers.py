"""Layers for property tests: any shape, dtype, stride, scaling, residual, dropout and set of gradients, both backends.

:func:`layers` is the strategy; :func:`run` computes a drawn layer on a backend, :func:`oracle_of` in float64 on the
selection that the backend made and with the masks that it drew, :func:`scales_of` says how large each result would be
without cancellation. Letters as everywhere: T tokens, N in_features, M out_features, R rank, E experts, K top_k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from goat_problems import (
    TRAINABLE,
    Outcome,
    Problem,
    evaluate,
    evaluate_oracle,
    make_problem,
    output_weights,
    selection_mismatch,
)
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import MANY_PROCESSORS, ONE_PROCESSOR, Recorder, audited, expert_masks, goat_on, onto_base_output

from goat_kernels.backends import get_backend
from goat_kernels.dropout import keep_scale
from goat_kernels.functional import GoatOutput
from goat_kernels.kernels.launch import observed
from goat_kernels.numerics import SELECTION_GAP, TOLERANCES
from goat_kernels.passes import Routing
from goat_kernels.reference import select_top_k

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

#: For tests that run several layers an example, and for those that run on a backend that costs next to nothing.
few = settings(max_examples=settings().max_examples // 4)
many = settings(max_examples=settings().max_examples * 4)

#: How a tensor lies in memory: functions that autograd sees through and that change no value.
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t,
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}

#: The GPU that tiles are chosen for: the one at hand, one that a few tokens fill, one that nothing fills.
TARGETS = {"here": None, "fused": ONE_PROCESSOR, "staged": MANY_PROCESSORS}


@dataclass(frozen=True)
class Layer:
    """A problem and how it is called."""

    backend: str
    target: str
    shape: dict
    needs: tuple[str, ...]
    use_output: bool
    balance_share: float
    dropout_p: float
    seed: tuple[int, int]
    onto_base: bool
    x_layout: str
    parameter_layout: str
    gradient_layout: str
    problem: Problem = field(repr=False)


@st.composite
def layers(draw, backend: str) -> Layer:
    """Any layer that ``backend`` computes."""
    dtype = draw(st.sampled_from((F32, BF16, F16) if backend == "triton" else (F64, F32, BF16, F16)))
    E = draw(st.integers(1, 17))
    R = E * draw(st.integers(1, 5))
    leading = draw(
        st.one_of(
            st.tuples(st.sampled_from((1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 66, 97))),
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
        )
    )
    shape = {
        "leading": leading,
        "N": draw(st.integers(1, 70)),
        "M": draw(st.integers(1, 70)),
        "R": R,
        "E": E,
        "K": draw(st.integers(1, E)),
        "R0": draw(st.none() | st.integers(0, R + 3)),
        "dtype": dtype,
        "adapter_dtype": draw(st.sampled_from((dtype, F32, F64) if backend == "torch" else (dtype, F32, F16, BF16))),
        "bias": draw(st.booleans()),
        "per_expert": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }
    problem = make_problem(**shape)
    use_output = draw(st.booleans()) or draw(st.booleans())
    word = st.integers(-(2**31), 2**31 - 1)
    return Layer(
        backend=backend,
        target=draw(st.sampled_from(sorted(TARGETS))) if backend == "triton" else "here",
        shape=shape,
        needs=tuple(name for name in problem.present() if draw(st.booleans())),
        use_output=use_output,
        balance_share=draw(st.sampled_from((0.0, 0.7))) if use_output else 0.7,
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.1, 0.5, 0.95))),
        seed=(draw(word), draw(word)),
        onto_base=draw(st.booleans()),
        x_layout=draw(st.sampled_from(sorted(LAYOUTS))),
        parameter_layout=draw(st.sampled_from(sorted(LAYOUTS))),
        gradient_layout=draw(st.sampled_from(sorted(LAYOUTS))),
        problem=problem,
    )


# --- running one --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def observed_routing(backend: str) -> Iterator[list[Routing]]:
    """The routing of every prefill inside; launches are observed, because a replay calls no prefill."""
    passes, kept = get_backend(backend), []
    original = passes.prefill

    def prefill(*arguments):
        y0, balance_loss, routing = original(*arguments)
        kept.append(routing)
        return y0, balance_loss, routing

    with mock.patch.object(passes, "prefill", prefill), observed(lambda launch: launch.run()):
        yield kept


def selection_of(routing: Routing, problem: Problem) -> Tensor:
    """bool [T, E]: what a prefill selected, which is exact but for near ties; a tiny gate may have underflowed."""
    logits = problem.logits_TE
    chosen, exact = routing.gate_ET.t().cpu() > 0, select_top_k(logits, problem.top_k)
    selection = torch.where(chosen.sum(dim=1, keepdim=True) == problem.top_k, chosen, exact)
    stats = torch.promote_types(problem.x.dtype, F32)
    assert selection_mismatch(logits, selection, problem.top_k) <= SELECTION_GAP[stats]
    return selection


def _called(layer: Layer, device: torch.device):
    """``goat_linear`` on the layer's backend, of tensors that lie in memory as the layer says."""
    function = (onto_base_output if layer.onto_base else goat_on)(device, layer.backend)
    lay_x, lay_parameter, lay_gradient = (
        LAYOUTS[name] for name in (layer.x_layout, layer.parameter_layout, layer.gradient_layout)
    )

    def run(x, weight, *adapter, bias, residual, **options) -> GoatOutput:
        parameters = [lay_parameter(tensor) for tensor in (weight, *adapter)]
        bias = None if bias is None else lay_parameter(bias)
        residual = None if residual is None else tuple(lay_parameter(part) for part in residual)
        result = function(lay_x(x), *parameters, bias=bias, residual=residual, **options)
        # The same values, whose gradient arrives with the strides of the layout.
        return GoatOutput(_GradientLaidOut.apply(result.output, lay_gradient), result.balance_loss)

    return run


class _GradientLaidOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, layout):
        ctx.layout = layout
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.layout(gradient), None


def run(layer: Layer, device: torch.device) -> tuple[Outcome, Tensor]:
    """(forward and backward of the layer on its backend, the experts it selected, bool [T, E])."""
    options = {"dropout_p": layer.dropout_p, "needs": layer.needs, **_loss_of(layer)}
    seed = torch.tensor(layer.seed, dtype=torch.int32)
    with (
        audited(TARGETS[layer.target], Recorder()),
        observed_routing(layer.backend) as routings,
        mock.patch("goat_kernels.functional.draw_seed", lambda device: seed.to(device)),
    ):
        outcome = evaluate(_called(layer, device), layer.problem, training=True, **options)
    (routing,) = routings
    return outcome, selection_of(routing, layer.problem)


def _loss_of(layer: Layer) -> dict:
    return {"use_output": layer.use_output, "balance_share": layer.balance_share}


def masks_of(layer: Layer, selection: Tensor) -> Tensor | None:
    """[E, T, N]: what x is multiplied by in front of each expert; None without dropout."""
    if not layer.dropout_p:
        return None
    seed = torch.tensor(layer.seed, dtype=torch.int32)
    return expert_masks(selection, layer.problem.x.shape[-1], seed, layer.dropout_p)


def oracle_of(layer: Layer, selection: Tensor) -> Outcome:
    """The float64 oracle of the layer, on ``selection`` and with the masks of its seed."""
    masks = masks_of(layer, selection)
    return evaluate_oracle(
        layer.problem, needs=layer.needs, selection=selection, dropout_masks=masks, **_loss_of(layer)
    )


# --- comparing ----------------------------------------------------------------------------------------------------


def scales_of(layer: Layer, selection: Tensor) -> dict[str, float]:
    """The norm of each result with its terms added as squares: its size wherever they do not cancel by chance.

    An error cannot be expected to be small against a sum that happens to vanish, as sums in tiny layers do. The
    formulas are those of docs/math.md with every term squared.
    """
    p = layer.problem.double()
    E, R = p.router.shape[0], p.lora_A.shape[0]
    x = p.x.reshape(-1, p.x.shape[-1])
    T = x.shape[0]
    logits = x @ p.router.t()
    gate, probs = (torch.softmax(values, dim=1) for values in (logits.masked_fill(~selection, -torch.inf), logits))
    s = p.scaling if isinstance(p.scaling, Tensor) else torch.full((E,), p.scaling, dtype=F64)
    factor = (gate * s).repeat_interleave(R // E, dim=1) ** 2
    kept = keep_scale(layer.dropout_p) if layer.dropout_p else 1.0  # the mean square of what dropout multiplies x by
    x, W, A, B, G = (tensor**2 for tensor in (x, p.weight, p.lora_A, p.lora_B, p.router))
    A0, B0 = (part**2 for part in p.residual) if p.residual is not None else (A[:0], B[:, :0])

    weighted = factor * (x @ A.t()) * kept
    y = x @ W.t() + weighted @ B.t() + (x @ A0.t()) @ B0.t() + (0.0 if p.bias is None else p.bias**2)
    dy = output_weights(y) ** 2 if layer.use_output else torch.zeros_like(y)
    d_weighted = dy @ B
    q = (weighted * d_weighted).view(T, E, R // E).sum(dim=2)
    c = layer.balance_share * E / max(T, 1) * selection.double().mean(dim=0) if T else torch.zeros(E, dtype=F64)
    d_logits = q + gate**2 * q.sum(dim=1, keepdim=True) + probs**2 * (c**2 + (probs * c).sum(dim=1, keepdim=True) ** 2)
    d_hidden = factor * d_weighted * kept
    squares = {
        "output": y,
        "x": dy @ W + d_hidden @ A + d_logits @ G + (dy @ B0) @ A0,
        "weight": dy.t() @ x,
        "bias": dy.sum(dim=0),
        "lora_A": d_hidden.t() @ x,
        "lora_B": dy.t() @ weighted,
        "router": d_logits.t() @ x,
    }
    return {name: float(square.sum().sqrt()) for name, square in squares.items()}


def assert_within_the_table(layer: Layer, outcome: Outcome, oracle: Outcome, scales: dict[str, float]) -> None:
    """Every result is there, has its dtype and shape, and errs by no more than the tolerance table's bound.

    The balance loss is held to float32 even for half-precision x, because the router works in float32.
    """
    dtype = layer.problem.x.dtype
    stats = torch.promote_types(dtype, F32)
    assert outcome.output.dtype == dtype and outcome.balance_loss.dtype == stats
    found = {"output": outcome.output, "balance_loss": outcome.balance_loss} | outcome.gradients
    meant = {"output": oracle.output, "balance_loss": oracle.balance_loss} | oracle.gradients
    for name, expected in meant.items():
        result = found[name]
        if name in TRAINABLE and name not in layer.needs:
            assert result is None, f"nobody asked for the gradient of {name}"
            continue
        if expected is None or result is None:  # the loss does not depend on it: no gradient, or zeros
            assert all(part is None or not bool(part.any()) for part in (expected, result)), name
            continue
        assert result.shape == expected.shape, name
        if name in TRAINABLE:
            assert result.dtype == getattr(layer.problem, name).dtype, name
        error = float((result.double() - expected).norm())
        dtypes = (stats,) if name == "balance_loss" else (dtype, result.dtype)  # an adapter may be narrower than x
        bound = max(TOLERANCES[each].relative for each in dtypes)
        allowed = bound * max(float(expected.norm()), scales.get(name, 0.0))
        assert error <= allowed, f"{name}: error {error:.3g} above {allowed:.3g}"
