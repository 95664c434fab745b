"""``goat_linear``: the GOAT layer as a function, and its one autograd formula.

Read it downwards: the public function checks its arguments, :func:`routed_linear` prepares them (autocast, seed,
backend), :class:`_GoatFunction` is the autograd Function over the two operators of ``operators.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from goat_kernels.backends import resolve_backend
from goat_kernels.backends.dropout import draw_seed
from goat_kernels.operators import backward_operator, forward_operator
from goat_kernels.settings import check_dropout, check_number


class GoatOutput(NamedTuple):
    """What :func:`goat_linear` returns.

    Attributes:
        output: [..., M].
        balance_loss: 0-d, float32 (float64 for float64 x): E * sum_i f_i P_i; differentiates.
    """

    output: Tensor
    balance_loss: Tensor


class RoutedOutput(NamedTuple):
    """What :func:`routed_linear` returns: :class:`GoatOutput` and ``load`` [E], the share of tokens per expert."""

    output: Tensor
    balance_loss: Tensor
    load: Tensor


def goat_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor,
    top_k: int,
    dropout_p: float = 0.0,
    training: bool = False,
    residual: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> GoatOutput:
    """A linear layer with E routed LoRA experts (GOAT; paper, Eqs. 1-4 and Thms 3.4-3.5).

        gate = softmax over the K largest entries of x router^T      float32, ties to the lower index
        y = x weight^T + bias + (scaling * expand(gate) * (dropout(x) lora_A^T)) lora_B^T - (x A0^T) B0^T

    Args:
        x: [..., N], float16, bfloat16, float32 or float64; any strides, any number of leading dimensions.
        weight: [M, N], x's dtype (under autocast: cast to it).
        lora_A: [R, N], any of these dtypes; expert i owns rows i*D..(i+1)*D-1, D = R / E.
        lora_B: [M, R]; expert i owns the same columns.
        router: [E, N].
        bias: [M] or None.
        scaling: s, a positive number, or one per expert [E] on x's device; a constant, not trained.
        top_k: K, in 1..E.
        dropout_p: dropout of x in front of lora_A, independent for each expert a token uses; in [0, 1).
        training: whether dropout is on.
        residual: None, or frozen (A0 [R', N], B0 [M, R']) with W_res = B0 A0; no gradient flows to it.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :func:`goat_kernels.available_backends`.

    Returns:
        output [..., M] in x's dtype (the autocast dtype under autocast), and the balance loss
        E * sum_i f_i P_i (f_i the share of tokens that use expert i, P_i its mean probability; f carries no gradient).
        NaN logits count as the largest. Second derivatives raise.

    Raises:
        TypeError: a tensor of an integer dtype, x and weight of different dtypes, a number that is not one.
        ValueError: shapes that do not fit, mixed devices, top_k outside 1..E, R not divisible by E, a scaling that is
            not positive or that requires grad, a dropout outside [0, 1), an unknown backend.
        RuntimeError: the backend asked for cannot run here, and why.
    """
    residual_A, residual_B = _check_residual(residual)
    _check_tensors(x, weight, lora_A, lora_B, router, bias, residual_A, residual_B)
    _check_scalars(x, router, scaling, top_k, dropout_p)
    routed = routed_linear(
        x,
        lora_A,
        lora_B,
        router,
        weight=weight,
        bias=bias,
        scaling=scaling,
        top_k=top_k,
        dropout_p=dropout_p if training else 0.0,
        residual=residual,
        backend=backend,
    )
    return GoatOutput(routed.output, routed.balance_loss)


def routed_linear(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router: Tensor,
    *,
    weight: Tensor | None = None,
    base_output: Tensor | None = None,
    bias: Tensor | None = None,
    scaling: float | Tensor,
    top_k: int,
    dropout_p: float = 0.0,
    residual: tuple[Tensor, Tensor] | None = None,
    balance_coefficient: float = 0.0,
    balance_scale: Tensor | None = None,
    backend: str = "auto",
) -> RoutedOutput:
    """What modules call: :func:`goat_linear` without its argument checks, and with what a layer needs besides.

    Args beyond those of :func:`goat_linear`:
        weight: [M, N], or None where ``base_output`` is given.
        base_output: [..., M], the output of a base layer that ran elsewhere (quantised, hooked, another tuner's);
            the adapter is added onto it, out of place.
        dropout_p: 0 where dropout is off.
        balance_coefficient: times the balance loss, added to the loss in backward without appearing in it.
        balance_scale: 0-d, read in backward: what the trainer scales its loss by. None is 1.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        weight = None if weight is None else weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if base_output is not None and base_output.dtype != x.dtype:
        x = x.to(base_output.dtype)
    residual_A, residual_B = residual if residual is not None else (None, None)
    scaling_E = None
    if isinstance(scaling, Tensor):
        scaling_E = scaling.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        scaling = 1.0
    arguments = (
        x,
        weight,
        base_output,
        bias,
        lora_A,
        lora_B,
        router,
        residual_A,
        residual_B,
        scaling_E,
        draw_seed(x.device) if dropout_p else None,
        balance_scale,
        float(scaling),
        top_k,
        dropout_p,
        balance_coefficient,
        resolve_backend(backend, x.device),
    )
    # A compiler sees the operator, whose autograd is registered below; eager mode skips the dispatcher's wrapper.
    run = forward_operator if torch.compiler.is_compiling() else _GoatFunction.apply
    output, balance_loss, load, *_ = run(*arguments)
    return RoutedOutput(output, balance_loss, load)


# --- the autograd formula -----------------------------------------------------------------------------------------

# Positions of the operator's arguments that can get a gradient, in the order of operators.GRADIENTS, and base_output.
_X, _WEIGHT, _BASE_OUTPUT, _BIAS, _LORA_A, _LORA_B, _ROUTER = range(7)


def _setup_context(ctx, inputs, output) -> None:
    """Save x, h, gate, probs and f, and the parameters that the gradients asked for will need."""
    x, weight, _, bias, lora_A, lora_B, router, residual_A, residual_B, scaling_E, seed, balance_scale = inputs[:12]
    _, _, load, hidden, gate, probs = output
    ctx.mark_non_differentiable(load, hidden, gate, probs)
    ctx.set_materialize_grads(False)
    ctx.options = inputs[12:]
    ctx.has_bias = bias is not None
    ctx.balance_scale = balance_scale  # not saved: the trainer's loss writes it between forward and backward
    needs = ctx.needs_input_grad
    if not (needs[_X] or residual_A is None):
        residual_A = residual_B = None  # the frozen pair acts on the gradient of x alone
    ctx.save_for_backward(
        x,
        weight if needs[_X] else None,
        lora_A,
        lora_B,
        router,
        residual_A,
        residual_B,
        scaling_E,
        seed,
        hidden,
        gate,
        probs,
        load,
    )


def _backward(ctx, grad_y, grad_balance, *_):
    """One call of the backward operator; its gradients go back to the arguments that asked for them."""
    needs = [ctx.needs_input_grad[i] for i in (_X, _WEIGHT, _BIAS, _LORA_A, _LORA_B, _ROUTER)]
    x, weight, lora_A, lora_B, router, residual_A, residual_B, scaling_E, seed, *routing = ctx.saved_tensors
    with torch.no_grad():
        computed = iter(
            backward_operator(
                grad_y,
                grad_balance,
                x,
                weight,
                lora_A,
                lora_B,
                router,
                residual_A,
                residual_B,
                scaling_E,
                seed,
                ctx.balance_scale,
                *routing,
                *ctx.options,
                needs,
            )
        )
    in_order = [next(computed) if needed else None for needed in needs]
    if torch.is_grad_enabled():  # create_graph=True
        sources = (grad_y, grad_balance, x, lora_A, lora_B, router)
        in_order = [None if g is None else _NoSecondDerivative.apply(g, *sources) for g in in_order]
    grad_x, grad_weight, grad_bias, grad_A, grad_B, grad_router = in_order
    grad_base = grad_y if ctx.needs_input_grad[_BASE_OUTPUT] else None
    return (grad_x, grad_weight, grad_base, grad_bias, grad_A, grad_B, grad_router, *([None] * 10))


class _GoatFunction(torch.autograd.Function):
    """The formula for eager mode: the forward operator, with the context and backward shared with the compiler."""

    forward = staticmethod(forward_operator)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


torch.library.register_autograd("goat_kernels::forward", _backward, setup_context=_setup_context)


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient that refuses to be differentiated: the backward kernels have no backward of their own."""

    @staticmethod
    def forward(ctx, gradient, *sources):
        return gradient.clone()

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "goat_linear has no second derivative: its backward is fused. Use goat_kernels.reference.goat_reference "
            "where create_graph=True must be differentiated again"
        )


# --- argument checks ----------------------------------------------------------------------------------------------


def _check_residual(residual) -> tuple[Tensor | None, Tensor | None]:
    if residual is None:
        return None, None
    if not (isinstance(residual, tuple | list) and len(residual) == 2):
        raise TypeError(f"residual must be None or a pair (A0 [R', N], B0 [M, R']), got {type(residual).__name__}")
    return residual[0], residual[1]


def _check_tensors(x, weight, lora_A, lora_B, router, bias, residual_A, residual_B) -> None:
    """Types, dtypes, devices and shapes; the messages name the argument, what came and what is needed."""
    tensors = {
        "x": x,
        "weight": weight,
        "lora_A": lora_A,
        "lora_B": lora_B,
        "router": router,
        "bias": bias,
        "residual[0]": residual_A,
        "residual[1]": residual_B,
    }
    no_residual = residual_A is None and residual_B is None
    for name, tensor in tensors.items():
        if tensor is None and (name == "bias" or (no_residual and name.startswith("residual"))):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; all tensors must share one device")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension [..., N], got a 0-d tensor")

    M, N, R, E = _dimensions(weight, lora_A, router)
    _check_shape("x", x, (*x.shape[:-1], N), "[..., N]")
    _check_shape("lora_A", lora_A, (R, N), "[R, N]")
    _check_shape("lora_B", lora_B, (M, R), "[M, R]")
    _check_shape("router", router, (E, N), "[E, N]")
    if R % E:
        raise ValueError(f"lora_A has R={R} rows, which must be divisible by the E={E} rows of router")
    if bias is not None:
        _check_shape("bias", bias, (M,), "[M]")
    if residual_A is not None:
        R0 = residual_A.shape[0] if residual_A.ndim == 2 else -1
        _check_shape("residual[0]", residual_A, (R0, N), "[R', N]")
        _check_shape("residual[1]", residual_B, (M, R0), "[M, R']")
    if not torch.is_autocast_enabled(x.device.type):
        for name in ("weight", "bias"):
            if tensors[name] is not None and tensors[name].dtype != x.dtype:
                raise TypeError(f"{name} is {tensors[name].dtype} but x is {x.dtype}; cast one, or use autocast")


def _dimensions(weight: Tensor, lora_A: Tensor, router: Tensor) -> tuple[int, int, int, int]:
    """(M, N, R, E), from the matrices whose first dimension defines them."""
    for name, tensor, layout in (
        ("weight", weight, "[M, N]"),
        ("lora_A", lora_A, "[R, N]"),
        ("router", router, "[E, N]"),
    ):
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be a matrix {layout}, got shape {tuple(tensor.shape)}")
        if tensor.shape[0] < 1:
            raise ValueError(f"{name} must have at least one row, got shape {tuple(tensor.shape)}")
    return weight.shape[0], weight.shape[1], lora_A.shape[0], router.shape[0]


def _check_shape(name: str, tensor: Tensor, needed: tuple[int, ...], layout: str) -> None:
    if tuple(tensor.shape) != needed:
        wanted = f"[..., {needed[-1]}]" if layout.startswith("[...") else str(list(needed))
        raise ValueError(f"{name} must be {layout} = {wanted} to fit the other tensors, got {list(tensor.shape)}")


def _check_scalars(x: Tensor, router: Tensor, scaling, top_k, dropout_p) -> None:
    E = router.shape[0]
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be an int, got {top_k!r}")
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k={top_k} must lie in 1..{E}, the number of rows of router")
    check_dropout("dropout_p", dropout_p)
    if not isinstance(scaling, Tensor):
        check_number("scaling", scaling, minimum=0, exclusive=True)
        return
    if scaling.shape != (E,):
        raise ValueError(f"scaling must be a number or a tensor [E] = [{E}], got shape {list(scaling.shape)}")
    if not scaling.is_floating_point():
        raise TypeError(f"scaling must be floating-point, got {scaling.dtype}")
    if scaling.device != x.device:
        raise ValueError(f"scaling is on {scaling.device} but x is on {x.device}; all tensors must share one device")
    if scaling.requires_grad:
        raise ValueError("scaling requires grad, but it is a derived constant (Thm 3.5); pass scaling.detach()")
