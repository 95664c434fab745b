"""``goat_linear``: the GOAT layer as a function, and its one autograd formula.

Read it downwards: the public function checks its arguments, :func:`routed_linear` prepares them (autocast, seed,
backend), :class:`_GoatFunction` is the autograd Function over the forward and backward of ``operators.py``.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import _get_proxies

from goat_kernels.argument_checks import check_scalars, check_tensors, unpack_residual
from goat_kernels.autocast import autocast_dtype
from goat_kernels.backends import resolve_backend
from goat_kernels.dropout import draw_seed
from goat_kernels.operators import backward_operator, forward_operator, run_backward, run_forward
from goat_kernels.plain import is_transformed, plain_forward


class GoatOutput(NamedTuple):
    """What :func:`goat_linear` returns.

    Attributes:
        output: [..., M].
        balance_loss: 0-d, float32 (float64 for float64 x): E * sum_i f_i P_i; differentiates.
    """

    output: Tensor
    balance_loss: Tensor


class RoutedOutput(NamedTuple):
    """What :func:`routed_linear` returns: :class:`GoatOutput` and ``load`` [E], the share of tokens per expert.

    ``load`` is None in a function transform or an exporter, whose tensors mean nothing once the call is over.
    """

    output: Tensor
    balance_loss: Tensor
    load: Tensor | None


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
    """A linear layer with E routed LoRA experts (GOAT, arXiv 2502.16894; Thms 3.4-3.5).

        gate = softmax over the K largest entries of x router^T      float32, ties to the lower index
        y = x weight^T + bias + (scaling * expand(gate) * (dropout(x) lora_A^T)) lora_B^T - (x A0^T) B0^T

    Args:
        x: [..., N], float16, bfloat16, float32 or float64; any strides, any number of leading dimensions.
        weight: [M, N], x's dtype (under autocast: cast to it).
        lora_A: [R, N], any of these dtypes; expert i owns rows i*D..(i+1)*D-1, D = R / E.
        lora_B: [M, R]; expert i owns the same columns.
        router: [E, N].
        bias: [M] or None.
        scaling: s, a positive number, or one positive number per expert [E] on x's device (its values are not checked,
            which would synchronise); a constant, not trained.
        top_k: K, in 1..E.
        dropout_p: dropout of x in front of lora_A, independent for each expert a token uses; in [0, 1).
        training: whether dropout is on.
        residual: None, or frozen (A0 [R', N], B0 [M, R']) with W_res = B0 A0; no gradient flows to it.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :func:`goat_kernels.available_backends`.

    Returns:
        output [..., M] in x's dtype (the autocast dtype under autocast), and the balance loss
        E * sum_i f_i P_i (f_i the share of tokens that use expert i, P_i its mean probability; f carries no gradient).
        NaN logits count as the largest. Second derivatives raise, except within the transforms of torch.func.

    Raises:
        TypeError: a tensor of an integer dtype, x and weight of different dtypes, a number that is not one.
        ValueError: shapes that do not fit, mixed devices, top_k outside 1..E, R not divisible by E, a scaling that is
            not a positive number or is a tensor that requires grad, a dropout outside [0, 1), an unknown backend.
        RuntimeError: the backend asked for cannot run here, and why.
    """
    residual_A, residual_B = unpack_residual(residual)
    check_tensors(x, weight, lora_A, lora_B, router, bias, residual_A, residual_B)
    check_scalars(x, router, scaling, top_k, dropout_p)
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
    dtype = autocast_dtype(x)
    compute = base_output.dtype if base_output is not None else dtype or x.dtype
    backend = resolve_backend(backend, x.device, compute)  # may raise: before anything else happens
    if dtype is not None:
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
        backend,
    )
    is_compiling = torch.compiler.is_compiling()
    if is_transformed(is_compiling):
        return RoutedOutput(*plain_forward(*arguments), None)
    # A compiler sees the operator, whose autograd is registered below; both run the same code.
    run = forward_operator if is_compiling else _GoatFunction.apply
    output, balance_loss, load, *_ = run(*arguments)
    return RoutedOutput(output, balance_loss, load)


# --- the autograd formula -----------------------------------------------------------------------------------------

# Positions of the operator's arguments that can get a gradient, in the order of operators.GRADIENTS, and base_output.
_X, _WEIGHT, _BASE_OUTPUT, _BIAS, _LORA_A, _LORA_B, _ROUTER = range(7)


def _setup_context(ctx, inputs, output) -> None:
    """Keep x, h~, gate, probs, f and the packed adapter, and the parameters that the gradients asked for will need.

    ``output`` is the operator's; its last four tensors are internal and not the caller's to see.
    """
    x, weight, _, _, lora_A, lora_B, router, residual_A, residual_B, scaling_E, seed, balance_scale = inputs[:12]
    _, _, load, weighted, gate, probs, packed = output
    ctx.set_materialize_grads(False)
    ctx.options = inputs[12:]
    ctx.balance_scale = balance_scale  # not saved: the trainer's loss writes it between forward and backward
    needs = ctx.needs_input_grad
    if residual_A is not None and not torch.compiler.is_compiling():
        # Constants, kept without a version check: DDP writes the same values into its buffers at every forward.
        residual_A, residual_B = residual_A.data, residual_B.data
    if not (needs[_WEIGHT] or needs[_LORA_A] or needs[_ROUTER]):
        x = x.new_empty(()).expand(x.shape)  # only its shape and dtype are wanted: let go of the memory
    if not needs[_X]:
        weight = residual_A = residual_B = None  # they act on the gradient of x alone
    ctx.save_for_backward(
        x, weight, lora_A, lora_B, router, residual_A, residual_B, scaling_E, seed, weighted, gate, probs, load, packed
    )


def _setup_context_of_operator(ctx, inputs, output) -> None:
    _setup_context(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[2:])
    if ctx.balance_scale is not None and torch.compiler.is_compiling():
        # AOTAutograd saves it, and would refuse what another graph of the same model writes to it before the backward.
        # This is how it knows a tensor that is not saved but lies on ctx.
        for proxy in _get_proxies(ctx.balance_scale):
            proxy.node.meta["saved_tensor_with_no_vc_check"] = True


def _backward_with(run, ctx, grad_y, grad_balance):
    """One call of ``run``, the backward; its gradients go back to the arguments that asked for them."""
    needs_input_grad = ctx.needs_input_grad
    needs = [needs_input_grad[i] for i in (_X, _WEIGHT, _BIAS, _LORA_A, _LORA_B, _ROUTER)]
    x, weight, lora_A, lora_B, router, residual_A, residual_B, scaling_E, seed, *routing = ctx.saved_tensors
    # Autograd calls with gradients off unless create_graph=True; entering the context again is felt at small sizes.
    with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
        computed = iter(
            run(
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
        sources = (grad_y, grad_balance, x, weight, lora_A, lora_B, router)
        in_order = [None if g is None else _NoSecondDerivative.apply(g, *sources) for g in in_order]
    grad_x, grad_weight, grad_bias, grad_A, grad_B, grad_router = in_order
    grad_base = grad_y if needs_input_grad[_BASE_OUTPUT] else None
    return (grad_x, grad_weight, grad_base, grad_bias, grad_A, grad_B, grad_router, *([None] * 10))


class _GoatFunction(torch.autograd.Function):
    """The formula for eager mode, which calls the passes without a dispatcher in between.

    The forward takes ctx, rather than leaving it to setup_context, because torch then inspects no signatures, which
    is felt at small sizes.
    """

    @staticmethod
    def forward(ctx, *inputs):
        output = run_forward(*inputs)
        _setup_context(ctx, inputs, output)
        output, balance_loss, load, *_ = output
        ctx.mark_non_differentiable(load)
        return output, balance_loss, load

    @staticmethod
    def backward(ctx, grad_y, grad_balance, *_):
        observed = torch._C._len_torch_dispatch_stack() > 0  # see operators.py
        try:
            return _backward_with(backward_operator if observed else run_backward, ctx, grad_y, grad_balance)
        except RuntimeError as error:
            gradients = [gradient for gradient in (grad_y, grad_balance) if gradient is not None]
            if any(torch._C._functorch.is_legacy_batchedtensor(gradient) for gradient in gradients):
                raise RuntimeError(
                    "the fused backward of goat_linear takes no batch of gradients (is_grads_batched=True, "
                    "vectorize=True); use torch.func.vmap, jacrev or jacfwd around the forward"
                ) from error
            raise


def _backward_of_operator(ctx, grad_y, grad_balance, *_):
    return _backward_with(backward_operator, ctx, grad_y, grad_balance)


torch.library.register_autograd(
    "goat_kernels::forward", _backward_of_operator, setup_context=_setup_context_of_operator
)


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(
        "goat_linear has no second derivative: its backward is fused. Where create_graph=True must be differentiated "
        "again, use the transforms of torch.func (torch.func.hessian, nested torch.func.grad)"
    )


torch.library.register_autograd("goat_kernels::backward", _refuse_second_derivative)


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient that refuses to be differentiated: the backward kernels have no backward of their own."""

    @staticmethod
    def forward(ctx, gradient, *sources):
        return gradient.clone()

    backward = staticmethod(_refuse_second_derivative)
