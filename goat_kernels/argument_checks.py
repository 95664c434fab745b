"""The checks of goat_linear's arguments and of a GoatLinear's base: messages name the argument, what came, the need."""

from __future__ import annotations

from torch import Tensor, nn

from goat_kernels.autocast import autocast_dtype
from goat_kernels.settings import check_number


def unpack_residual(residual) -> tuple[Tensor | None, Tensor | None]:
    if residual is None:
        return None, None
    if not (isinstance(residual, tuple | list) and len(residual) == 2):
        raise TypeError(f"residual must be None or a pair (A0 [R', N], B0 [M, R']), got {type(residual).__name__}")
    return residual[0], residual[1]


def check_tensors(x, weight, lora_A, lora_B, router, bias, residual_A, residual_B) -> None:
    """Types, dtypes, devices and shapes; the messages name the argument, what came and what is needed."""
    tensors = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "router": router, "bias": bias}
    tensors |= {"residual[0]": residual_A, "residual[1]": residual_B}
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

    for name, layout in (("weight", "[M, N]"), ("lora_A", "[R, N]"), ("router", "[E, N]")):
        shape = tuple(tensors[name].shape)
        if len(shape) != 2:
            raise ValueError(f"{name} must be a matrix {layout}, got shape {shape}")
        if shape[0] < 1:
            raise ValueError(f"{name} must have at least one row, got shape {shape}")
    (M, N), R, E = weight.shape, lora_A.shape[0], router.shape[0]
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
    if autocast_dtype(x) is None:
        for name in ("weight", "bias"):
            if tensors[name] is not None and tensors[name].dtype != x.dtype:
                raise TypeError(f"{name} is {tensors[name].dtype} but x is {x.dtype}; cast one, or use autocast")


def _check_shape(name: str, tensor: Tensor, needed: tuple[int, ...], layout: str) -> None:
    if tuple(tensor.shape) != needed:
        wanted = f"[..., {needed[-1]}]" if layout.startswith("[...") else str(list(needed))
        raise ValueError(f"{name} must be {layout} = {wanted} to fit the other tensors, got {list(tensor.shape)}")


def check_scalars(x: Tensor, router: Tensor, scaling, top_k, dropout_p) -> None:
    E = router.shape[0]
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be an int, got {top_k!r}")
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k={top_k} must lie in 1..{E}, the number of rows of router")
    check_number("dropout_p", dropout_p, below=1)
    if not isinstance(scaling, Tensor):
        check_number("scaling", scaling, exclusive=True)
        return
    if scaling.shape != (E,):
        raise ValueError(f"scaling must be a number or a tensor [E] = [{E}], got shape {list(scaling.shape)}")
    if not scaling.is_floating_point():
        raise TypeError(f"scaling must be floating-point, got {scaling.dtype}")
    if scaling.device != x.device:
        raise ValueError(f"scaling is on {scaling.device} but x is on {x.device}; all tensors must share one device")
    if scaling.requires_grad:
        raise ValueError("scaling requires grad, but it is a derived constant (Thm 3.5); pass scaling.detach()")


def check_pretrained_linear(linear: nn.Linear) -> None:
    """Raise unless a GoatLinear on the weight and bias of ``linear`` would compute what ``linear`` does."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
    if not isinstance(linear.weight, nn.Parameter):
        raise TypeError(
            f"linear must have an ordinary weight, got a {type(linear.weight).__name__}; remove its parametrisation"
        )
    kind = type(linear).__qualname__
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"linear is a {kind}, the output projection of an nn.MultiheadAttention, which reads its weight without "
            "calling it, so an adapter would have no effect; adapt other layers"
        )
    replaced = not is_forward_of_linear(vars(linear).get("forward"))
    if replaced or type(linear).forward is not nn.Linear.forward:
        whose = "has a replaced forward, which" if replaced else f"is a {kind}, whose own forward"
        raise TypeError(
            f"linear {whose} a GoatLinear in its place would not call; give a plain nn.Linear (of the same weight, if "
            "that is what it computes), or adapt it by peft.get_peft_model with a GoatConfig, which calls it as it is"
        )
    if has_hooks(linear):
        raise ValueError("linear has hooks, which a GoatLinear in its place would not call; remove them first")


def is_forward_of_linear(own) -> bool:
    """Whether an instance's own ``forward`` is none, or nn.Linear's, which accelerate leaves when a hook is removed."""
    return own is None or getattr(own, "__func__", None) is nn.Linear.forward


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs hooks besides its forward and backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
