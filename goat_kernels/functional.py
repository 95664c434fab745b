"""``goat_linear``: the GOAT layer as a function, and its one autograd formula.

Read it downwards: the public function checks its arguments, :func:`routed_linear` prepares them (autocast, seed,
backend), :class:`_GoatFunction` is the autograd Function over the two directions of ``forward_backward.py``.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import _get_proxies

from goat_kernels import operators
from goat_kernels.argument_checks import check_scalars, check_tensors, unpack_residual
from goat_kernels.autocast import autocast_dtype
from goat_kernels.backends import resolve_backend
from goat_kernels.dropout import draw_seed
from goat_kernels.forward_backward import Layer, run_backward, run_forward
from goat_kernels.passes import Adapter, Routing
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
    seed = draw_seed(x.device) if dropout_p else None
    adapter = Adapter(lora_A, lora_B, router, residual_A, residual_B, float(scaling), scaling_E, top_k, dropout_p, seed)
    layer = Layer(weight, base_output, bias, adapter, balance_scale, balance_coefficient)
    is_compiling = torch.compiler.is_compiling()
    if is_transformed(is_compiling):
        return RoutedOutput(*plain_forward(x, layer), None)
    # A compiler sees the operator, whose autograd is registered below; both run the same code.
    if is_compiling:
        output, balance_loss, routing = operators.forward(x, layer, backend)
        return RoutedOutput(output, balance_loss, routing.load_E)
    differentiable = (x, weight, base_output, bias, lora_A, lora_B, router)
    return RoutedOutput(*_GoatFunction.apply(*differentiable, layer, backend))


# --- the autograd formula -----------------------------------------------------------------------------------------


def _keep_for_backward(ctx, x: Tensor, layer: Layer, backend: str, routing: Routing, needs: list[bool]) -> None:
    """Keep x, ``routing`` and of ``layer`` what the gradients asked for need.

    ``needs``: whether x, weight, base_output, bias, lora_A, lora_B and router require a gradient.
    """
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.backend = needs, backend
    ctx.balance = layer.balance_scale, layer.balance_coefficient  # the trainer writes the scale until the backward
    needs_x, needs_weight, _, _, needs_A, _, needs_router = needs
    weight = layer.weight
    lora_A, lora_B, router, residual_A, residual_B, scaling, scaling_E, top_k, dropout_p, seed = layer.adapter
    ctx.options = scaling, top_k, dropout_p
    if not needs_x:
        weight = residual_A = residual_B = None  # needed for the gradient of x only
    elif residual_A is not None and not torch.compiler.is_compiling():
        # Constants, kept without a version check: DDP writes the same values into its buffers at every forward.
        residual_A, residual_B = residual_A.data, residual_B.data
    if not (needs_weight or needs_A or needs_router):
        x = x.new_empty(()).expand(x.shape)  # only its shape and dtype are wanted: free its memory
    ctx.save_for_backward(x, *routing, weight, lora_A, lora_B, router, residual_A, residual_B, scaling_E, seed)


def _gradients(ctx, grad_y: Tensor | None, grad_balance: Tensor | None, *, as_operator: bool) -> list[Tensor | None]:
    """Of x, weight, base_output, bias, lora_A, lora_B and router; None for those that asked for none."""
    needs_x, needs_weight, needs_base, needs_bias, *needs_adapter = ctx.needs
    needs = [needs_x, needs_weight, needs_bias, *needs_adapter]
    x, weighted, gate, probs, load, packed, weight, A, B, router, A0, B0, scaling_E, seed = ctx.saved_tensors
    scaling, top_k, dropout_p = ctx.options
    adapter = Adapter(A, B, router, A0, B0, scaling, scaling_E, top_k, dropout_p, seed)
    layer = Layer(weight, None, None, adapter, *ctx.balance)
    routing = Routing(weighted, gate, probs, load, packed)
    # Autograd calls with gradients off unless create_graph=True; entering the context again costs time.
    with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
        run = operators.backward if as_operator else run_backward
        computed = run(grad_y, grad_balance, x, layer, routing, needs, ctx.backend)
    given = iter(computed)
    in_order = [next(given) if needed else None for needed in needs]
    if torch.is_grad_enabled():  # create_graph=True
        sources = (grad_y, grad_balance, x, weight, A, B, router)
        in_order = [None if g is None else _NoSecondDerivative.apply(g, *sources) for g in in_order]
    return [*in_order[:2], grad_y if needs_base else None, *in_order[2:]]


def _is_observed() -> bool:
    """Whether a TorchDispatchMode watches; ``operators.py`` says what it sees."""
    return torch._C._len_torch_dispatch_stack() > 0


class _GoatFunction(torch.autograd.Function):
    """The formula for eager mode, which calls the passes without a dispatcher in between.

    The forward takes ctx, rather than leaving it to setup_context, because torch then inspects no signatures, which
    costs time in a small layer. The tensors that can have a gradient come apart, because autograd does not look into
    ``layer``.
    """

    @staticmethod
    def forward(ctx, x, weight, base_output, bias, lora_A, lora_B, router, layer, backend):
        output, balance_loss, routing = run_forward(x, layer, backend, operators if _is_observed() else None)
        _keep_for_backward(ctx, x, layer, backend, routing, ctx.needs_input_grad[:7])
        ctx.mark_non_differentiable(routing.load_E)
        return output, balance_loss, routing.load_E

    @staticmethod
    def backward(ctx, grad_y, grad_balance, *_):
        try:
            return (*_gradients(ctx, grad_y, grad_balance, as_operator=_is_observed()), None, None)
        except RuntimeError as error:
            gradients = [gradient for gradient in (grad_y, grad_balance) if gradient is not None]
            if any(torch._C._functorch.is_legacy_batchedtensor(gradient) for gradient in gradients):
                raise RuntimeError(
                    "the fused backward of goat_linear takes no batch of gradients (is_grads_batched=True, "
                    "vectorize=True); use torch.func.vmap, jacrev or jacfwd around the forward"
                ) from error
            raise


def _setup_context_of_operator(ctx, inputs, output) -> None:
    x, tensors, present, numbers, counts, backend = inputs
    layer = operators.rebuilt(tensors, present, numbers, counts)
    asked = iter(ctx.needs_input_grad[1:])  # of the tensors that are present
    needs = [ctx.needs_input_grad[0], *(is_there and next(asked) for is_there in present[:6])]
    ctx.tensors = len(tensors)
    ctx.present = present
    _keep_for_backward(ctx, x, layer, backend, Routing(*output[2:]), needs)
    ctx.mark_non_differentiable(*output[2:])
    if layer.balance_scale is not None and torch.compiler.is_compiling():
        # AOTAutograd saves it, and would refuse what another graph of the same model writes to it before the backward.
        # This is how it knows a tensor that is not saved but lies on ctx.
        for proxy in _get_proxies(layer.balance_scale):
            proxy.node.meta["saved_tensor_with_no_vc_check"] = True


def _backward_of_operator(ctx, grad_y, grad_balance, *_):
    grad_x, *gradients = _gradients(ctx, grad_y, grad_balance, as_operator=True)
    of_present = [gradient for gradient, is_there in zip(gradients, ctx.present, strict=False) if is_there]
    return grad_x, of_present + [None] * (ctx.tensors - len(of_present)), None, None, None, None


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
