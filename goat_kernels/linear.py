"""``GoatLinear``: a drop-in nn.Linear with a GOAT adapter inside."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goat_kernels.adapter import AdapterModule, FoldedWeight, placeholders
from goat_kernels.argument_checks import check_pretrained_linear
from goat_kernels.autocast import autocast_dtype
from goat_kernels.backends import BACKEND_NAMES
from goat_kernels.initialisation import check_weight, initialise_adapter
from goat_kernels.routed_module import RoutedModule, never_bypass
from goat_kernels.settings import AdapterSettings, check_count, check_name

_DEFAULT = AdapterSettings()


class GoatLinear(RoutedModule, AdapterModule):
    """nn.Linear with E routed LoRA experts on a frozen weight (GOAT).

    A new one draws its weight as nn.Linear does; :meth:`from_linear` adapts a pretrained layer. Weight and bias are
    frozen; ``lora_A``, ``lora_B`` and ``router`` train, in float32 even over a half-precision weight.

    With all gates at 1/E the layer computes exactly what the pretrained one did (Thm 3.4); with the router's own
    gates the first outputs differ a little. That is the method. :meth:`disable_adapter` gives the pretrained layer
    exactly, :meth:`to_linear` takes it out.

    Args:
        in_features: N.
        out_features: M.
        bias: whether there is a bias [M].
        r, num_experts, top_k, scaling, eta, rho, lora_alpha, init, residual, residual_coefficient, dropout,
            balance_coefficient, svd, seed: see :class:`goat_kernels.AdapterSettings`.
        backend: as for :func:`goat_kernels.goat_linear`.
        device: of every tensor; on ``"meta"`` nothing is computed until ``to_empty`` and :meth:`reset_parameters`.
        dtype: of weight and bias; the adapter has float32, float64 over a float64 weight.
        generator: CPU generator for every random draw; the global one by default.

    Attributes:
        weight: [M, N], W0 (``residual="path"``) or, while the adapter is on, W0 - W_res (``"fold"``). The state dict
            holds W0 either way.
        bias: [M] or None.
        lora_A, lora_B, router, scaling, residual_A, residual_B: see :class:`goat_kernels.adapter.AdapterModule`.
        balance_loss, expert_load: of the last forward, detached.
        svd_error: of ``svd="randomized"``, see :class:`goat_kernels.initialisation.InitialAdapter`; 0 otherwise.

    Raises:
        TypeError, ValueError: a bad argument, by name; or a weight with too few singular values for the rule.
    """

    # For type checkers: nn.Module tells them nothing of what is registered, nor that a call returns what forward does.
    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    router: nn.Parameter
    residual_A: Tensor | None
    residual_B: Tensor | None
    scaling: float | Tensor
    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = _DEFAULT.r,
        num_experts: int = _DEFAULT.num_experts,
        top_k: int = _DEFAULT.top_k,
        scaling: str | float = _DEFAULT.scaling,
        eta: float = _DEFAULT.eta,
        rho: float = _DEFAULT.rho,
        lora_alpha: float = _DEFAULT.lora_alpha,
        init: str = _DEFAULT.init,
        residual: str = _DEFAULT.residual,
        residual_coefficient: float | None = _DEFAULT.residual_coefficient,
        dropout: float = _DEFAULT.dropout,
        balance_coefficient: float = _DEFAULT.balance_coefficient,
        svd: str = _DEFAULT.svd,
        seed: int = _DEFAULT.seed,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        given = locals()
        settings = AdapterSettings(**{field.name: given[field.name] for field in dataclasses.fields(AdapterSettings)})
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        check_weight(weight, settings)
        super().__init__()
        self._build(
            settings,
            nn.Parameter(weight, requires_grad=False),
            nn.Parameter(weight.new_empty(out_features), requires_grad=False) if bias else None,
            backend,
        )
        if not weight.is_meta:
            self.reset_parameters(generator)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, backend: str = "auto", generator: torch.Generator | None = None, **settings: Any
    ) -> GoatLinear:
        """A GoatLinear on the weight and bias of ``linear``, which it shares (and freezes) rather than copies.

        With ``residual="fold"`` the weight is copied, because it will be overwritten.

        Args:
            linear: the pretrained layer, of a floating dtype, without hooks, parametrisations or a forward of its own.
            backend, generator: as for the class.
            **settings: the fields of :class:`goat_kernels.AdapterSettings`.

        Raises:
            TypeError: ``linear`` is not an nn.Linear with an ordinary weight and nn.Linear's forward, or is the output
                projection of an nn.MultiheadAttention, which would not call it; or a keyword is unknown.
            ValueError: a bad setting, a weight with too few singular values for the rule, or hooks on ``linear``.
        """
        check_pretrained_linear(linear)
        adapter_settings = AdapterSettings(**settings)
        check_weight(linear.weight, adapter_settings)
        weight = linear.weight
        if adapter_settings.residual == "fold" and not weight.is_meta:
            weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._build(adapter_settings, weight, linear.bias, backend)
        layer.train(linear.training)
        if not linear.weight.is_meta:
            layer.reset_adapter(generator)
        # Last, so that a layer that is refused is left as it came.
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        return layer

    def _build(self, settings: AdapterSettings, weight: nn.Parameter, bias: nn.Parameter | None, backend: str) -> None:
        """Register every tensor with its final shape; values come with reset_adapter or a state dict."""
        check_name("backend", backend, BACKEND_NAMES)
        self.backend = backend
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias
        self._folded_weight = FoldedWeight(self.weight)
        self._adapter_enabled = True
        never_bypass(self)

        dtype = torch.promote_types(weight.dtype, torch.float32)
        tensors = placeholders(settings, self.in_features, self.out_features, weight.device, dtype)
        self._register_adapter(settings, tensors)
        self._place_statistics()

    # --- values ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw a new weight and bias as nn.Linear does, and initialise the adapter from them."""
        self._folded_weight.restore()
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=generator)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound, generator=generator)
        self.reset_adapter(generator)

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator | None = None) -> None:
        """Initialise the adapter from the pretrained weight, by the rules of ``settings``."""
        self._folded_weight.restore()
        initial = initialise_adapter(self.weight, self.settings, dtype=self.lora_A.dtype, generator=generator)
        self.svd_error = initial.svd_error
        self.start(initial.named())
        self._fold_if_wanted()

    def _fold_if_wanted(self) -> None:
        if self.settings.residual == "fold" and self.residual_A is not None and self._adapter_enabled:
            self._folded_weight.fold(self.residual_A, self.residual_B)

    # --- forward --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N] of the weight's dtype -> [..., M].

        Raises:
            TypeError: x is not of the weight's dtype (outside autocast), or not floating-point.
            ValueError: the last dimension of x is not N, x is on another device than the weight, or the weight is
                trainable while W0 - W_res is folded into it.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., N] = [..., {self.in_features}], got {list(x.shape)}")
        weight = self.weight  # once: an attribute of a module costs as much as a call into torch
        if x.device != weight.device:
            raise ValueError(f"x is on {x.device} but weight is on {weight.device}; move one")
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            raise TypeError(f"x is {x.dtype} but weight is {weight.dtype}; cast one, or use autocast")
        if not self._adapter_enabled:
            return F.linear(x, weight, self.bias)
        if weight.requires_grad and self._folded_weight.folded:
            raise ValueError(
                "weight requires grad, but residual='fold' keeps W0 aside and would lose its updates; use "
                "residual='path' to train the weight too"
            )
        routed = self.routed(x, weight=weight, bias=self.bias, balance_scale=self.balance_scale, backend=self.backend)
        self._remember(routed.balance_loss, routed.load)
        return routed.output

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[GoatLinear]:
        """Within this context the layer is the pretrained nn.Linear, bit for bit."""
        was_enabled, self._adapter_enabled = self._adapter_enabled, False
        self._folded_weight.restore()
        try:
            yield self
        finally:
            self._adapter_enabled = was_enabled
            if was_enabled:
                self._fold_if_wanted()

    def to_linear(self) -> nn.Linear:
        """The pretrained layer, exactly, as an nn.Linear that shares nothing with this one.

        There is no merged form: routing is per token, so no single weight computes what this layer does.
        """
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, **like)
        with torch.no_grad():
            linear.weight.copy_(self._pretrained_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    def _pretrained_weight(self) -> Tensor:
        """W0 [M, N]: the weight, or the copy kept of it while it is folded."""
        original = self._folded_weight.original
        return self.weight.detach() if original is None else original

    # --- state ----------------------------------------------------------------------------------------------------

    def _apply(self, fn, recurse: bool = True):
        """Moves and casts as nn.Module does; a fold is of the new W0."""
        was_folded = self._folded_weight.folded
        self._folded_weight.restore()
        super()._apply(fn, recurse)
        self._folded_weight.weight = self.weight
        if was_folded and not self.weight.is_meta:
            self._fold_if_wanted()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._folded_weight.folded:
            destination[prefix + "weight"] = self._pretrained_weight().to(self.weight)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A state dict holds W0: take the fold out, load, and fold with the pair that was loaded.
        self._folded_weight.restore()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._folded_weight.weight = self.weight
        if not self.weight.is_meta:
            loaded = state_dict.get(prefix + "weight")
            if self.settings.residual == "fold" and loaded is not None and loaded.data_ptr() == self.weight.data_ptr():
                self.weight.data = self.weight.data.clone()  # assign=True: the fold must not write into the state dict
            self._fold_if_wanted()

    def get_extra_state(self) -> Tensor:
        """What the tensors alone do not say: float64 [E, K, s], s 0 where it is a tensor of its own."""
        s = 0.0 if isinstance(self.scaling, Tensor) else self.scaling
        return torch.tensor([self.settings.num_experts, self.settings.top_k, s], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Raise ValueError where the tensors being loaded were trained with other values."""
        mine = self.get_extra_state()
        if not torch.allclose(state.cpu(), mine, rtol=1e-12, atol=0):
            names = ("num_experts", "top_k", "scaling")
            theirs, own = (dict(zip(names, values.tolist(), strict=True)) for values in (state, mine))
            raise ValueError(f"the state dict is of a layer with {theirs}, which does not fit this one with {own}")

    def extra_repr(self) -> str:
        names = ("r", "num_experts", "top_k", "init", "scaling", "residual")
        rest = "".join(f", {name}={getattr(self.settings, name)!r}" for name in names)
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{rest}"
