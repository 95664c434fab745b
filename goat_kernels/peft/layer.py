"""``GoatLinearLayer``: a linear layer of any kind with GOAT adapters on it, as PEFT's tuner layers are built.

The base layer stays where it is (``base_layer``). Each adapter is a :class:`GoatAdapter` in ``goat_adapter``, a dict
keyed by adapter name.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from goat_kernels.autocast import autocast_dtype
from goat_kernels.functional import routed_linear
from goat_kernels.initialisation import initialise_adapter
from goat_kernels.peft.adapter import AdapterDict, GoatAdapter
from goat_kernels.peft.base_layer import (
    adapter_device,
    adapter_dtype,
    check_output_of_base,
    features,
    has_plain_weight,
    is_plain,
    offloading_hook,
    pretrained_weight,
    unpack,
)
from goat_kernels.peft.folding import FoldingLayer
from goat_kernels.peft.tensors import AdapterTensors, pending_tensors
from goat_kernels.routed_module import RoutedModule, never_bypass
from goat_kernels.settings import AdapterSettings

NO_MERGE = (
    "A GOAT adapter cannot be merged: each token is routed to its own experts, so no single weight gives the same "
    "output. unload() returns the base model without the adapter; keep the adapter beside the base model to use it."
)


class GoatLinearLayer(RoutedModule, nn.Module, BaseTunerLayer, FoldingLayer):
    """GOAT adapters on one base layer.

    "Linear" is in the name because PEFT looks for it when "all-linear" meets a model that has adapters already.

    ``goat_adapter`` holds the adapters' tensors by adapter name, in float32 (float64 over a float64 base); ``settings``
    their hyper-parameters, ``r`` their rank and ``scaling`` their s, where it is one number for all experts.
    """

    adapter_layer_names = ("goat_adapter",)
    other_param_names = ("settings", "scaling", "r")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        """``name`` is the module's name in the model, for messages."""
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features, self.out_features = features(self.get_base_layer())
        self.goat_adapter = AdapterDict()
        self.settings: dict[str, AdapterSettings] = {}
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._pending: set[str] = set()
        FoldingLayer.__init__(self)
        never_bypass(self)
        self.register_state_dict_post_hook(_pretrained_weight_into_state_dict)
        self.register_load_state_dict_post_hook(_check_loaded)

    # --- adapters -------------------------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        settings: AdapterSettings,
        tensors: AdapterTensors | None,
        *,
        has_residual: bool,
        may_start: bool = True,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            settings: its hyper-parameters on this module.
            tensors: what it starts from; None for an adapter whose tensors are to be loaded.
            has_residual: whether it will carry the frozen pair.
            may_start: whether an adapter whose tensors never come starts afresh; otherwise its first forward raises.
        """
        base = self.get_base_layer()
        device, dtype = adapter_device(base), adapter_dtype(base)
        pending = tensors is None
        if pending:
            tensors = pending_tensors(
                settings, self.in_features, self.out_features, has_residual=has_residual, device=device, dtype=dtype
            )
            self._pending.add(adapter_name)
        self.settings[adapter_name] = settings
        self.r[adapter_name] = settings.r
        self.goat_adapter[adapter_name] = GoatAdapter(tensors, pending=pending)
        self.goat_adapter[adapter_name].may_start = may_start
        if not isinstance(tensors.scaling, Tensor):
            self.scaling[adapter_name] = tensors.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def scaling_of(self, adapter_name: str) -> float | Tensor:
        """s of one adapter: a float, or float32 [E] where it differs by expert."""
        per_expert = self.goat_adapter[adapter_name].scaling
        return self.scaling[adapter_name] if per_expert is None else per_expert

    @torch.no_grad()
    def initialise_pending(self, adapter_name: str) -> None:
        """Settle an adapter that was to be loaded: nothing to do if its tensors have come, else start it afresh.

        Raises:
            RuntimeError: some of its tensors came and others did not; or none, though they are in a file.
        """
        if adapter_name not in self._pending:
            return
        adapter = self.goat_adapter[adapter_name]
        if any(tensor.device.type == "meta" for tensor in adapter.tensors().values()):
            return
        missing = adapter.missing()
        if adapter.loaded_in_part:
            raise RuntimeError(
                f"adapter {adapter_name!r} on {self.name} was loaded in part: {', '.join(missing)} did not come. "
                "Load a complete adapter, as save_pretrained writes it"
            )
        if missing and not adapter.may_start:
            raise RuntimeError(
                f"adapter {adapter_name!r} on {self.name} was not loaded: its configuration is that of a saved "
                "adapter, and none of its tensors came. Load it with peft.PeftModel.from_pretrained (transformers' "
                "load_adapter cannot read adapters that were saved before version 0.2: load and save them once with "
                "PEFT). For a new adapter with these settings, set initialised=False in the configuration"
            )
        if missing:
            # Every process of a distributed run lands here on its own, so the draws may not depend on the process.
            settings = self.settings[adapter_name]
            initial = initialise_adapter(
                self.pretrained_weight(),
                settings,
                generator=torch.Generator().manual_seed(settings.seed),
                name=self.name,
            )
            adapter.start(AdapterTensors.of(initial).named())
        self._pending.discard(adapter_name)

    def pretrained_weight(self) -> Tensor:
        """W0 [M, N], dequantised, whether or not an adapter is folded into the base weight."""
        self.unfold()
        return pretrained_weight(self.get_base_layer(), self.name)

    @property
    def routing_device(self) -> torch.device | None:
        adapter = next(iter(self.goat_adapter.values()), None)
        return None if adapter is None else adapter.router.device

    def _last_router(self) -> Tensor | None:
        active = self.active_here()
        return self.goat_adapter[active[-1]].router if active else None

    # --- forward --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [..., N] -> [..., M]: the base layer plus every active adapter."""
        active = self.active_here()
        if not active:
            return self.base_layer(x, *args, **kwargs)
        if not self.is_settled():
            self.settle()

        base = self.base_layer
        weight = bias = output = None
        hook = None if args or kwargs else offloading_hook(base)
        if hook is not None:
            (x,), _ = hook.pre_forward(base, x)
        plain = has_plain_weight(base) if hook is not None else not args and not kwargs and is_plain(base)
        if plain and _takes(base.weight, x):
            weight, bias = base.weight, base.bias
        else:
            if x.requires_grad and torch.is_grad_enabled():
                unpack(base)
            output = base(x, *args, **kwargs)
            check_output_of_base(x, output, self.out_features, self.name)
        balance_loss = None
        for name in active:
            routed = self._routed(name, x, weight, bias, output)
            weight, bias, output = None, None, routed.output
            balance_loss = routed.balance_loss if balance_loss is None else balance_loss + routed.balance_loss
        self._remember(balance_loss, routed.load)
        return output if hook is None else hook.post_forward(base, output)

    def _routed(self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, output: Tensor | None):
        """One adapter, on the base product (``weight``) or on what has been computed so far (``output``)."""
        settings = self.settings[name]
        lora_A, lora_B, router, residual_A, residual_B, scaling_E = self.goat_adapter[name].fetched()
        if settings.init == "hydralora":
            lora_A = lora_A.repeat(settings.num_experts, 1)
        residual = None
        if residual_A is not None and settings.residual == "path":
            residual = (residual_A, residual_B)
        return routed_linear(
            x,
            lora_A,
            lora_B,
            router,
            weight=weight,
            bias=bias,
            base_output=output,
            scaling=self.scaling[name] if scaling_E is None else scaling_E,
            top_k=settings.top_k,
            dropout_p=settings.dropout if self.training else 0.0,
            residual=residual,
            balance_coefficient=self._injected(settings.balance_coefficient, router),
            balance_scale=self.balance_scale,
        )

    # --- switching and loading: whatever may change which pair belongs in the weight -------------------------------

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.unfold()
        super().enable_adapters(enabled)
        self._settle_unless_waiting()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_alone(names)
        if self._folded_adapter not in names:
            self.unfold()
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._place_statistics()
        self._settle_unless_waiting()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name == self._folded_adapter:
            self.unfold()
        self._pending.discard(adapter_name)
        super().delete_adapter(adapter_name)
        self._settle_unless_waiting()

    def _apply(self, fn, recurse=True):
        self.unfold()  # W0 is what moves or changes its dtype
        super()._apply(fn, recurse)
        self._settle_unless_waiting()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.unfold()  # whatever is loaded, weight or pair, replaces what was folded
        super()._load_from_state_dict(*args, **kwargs)

    def _settle_unless_waiting(self) -> None:
        if not self._pending.intersection(self.active_here()):
            self.settle()

    # --- PEFT -----------------------------------------------------------------------------------------------------

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter, without PEFT's cast to the base's dtype: that would round float32 masters to bfloat16."""
        device = adapter_device(self.get_base_layer()) if device is None else device
        if adapter_name not in self.goat_adapter:
            return
        adapter = self.goat_adapter[adapter_name]
        if all(tensor.device.type != "meta" for tensor in adapter.tensors().values()):
            adapter.to(device)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Give an adapter's trainable parameters another dtype."""
        if adapter_name in self.goat_adapter:
            for parameter in self.goat_adapter[adapter_name].parameters():
                parameter.data = parameter.data.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        raise ValueError(NO_MERGE)

    def __repr__(self) -> str:
        return "goat." + super().__repr__()


def _takes(weight: Tensor, x: Tensor) -> bool:
    """Whether the operator may multiply x with the weight itself; if not, the base layer says what is wrong."""
    return x.dtype == weight.dtype or autocast_dtype(x) is not None


def _pretrained_weight_into_state_dict(layer: GoatLinearLayer, state_dict: dict, prefix: str, local_metadata) -> None:
    """A state dict holds W0 also while W0 - W_res is in the weight: what is saved is the base model, whole."""
    if layer._folded is None:
        return
    key, module = prefix, layer
    while hasattr(module, "base_layer"):  # another tuner's layer may lie between
        key, module = key + "base_layer.", module.base_layer
    if key + "weight" in state_dict:
        state_dict[key + "weight"] = layer._folded.original.to(state_dict[key + "weight"].device)


def _check_loaded(layer: GoatLinearLayer, incompatible_keys) -> None:
    """Note which adapters have come, and settle, so that a compiled first forward need not."""
    for name in list(layer._pending):
        adapter = layer.goat_adapter[name]
        on_meta = any(tensor.device.type == "meta" for tensor in adapter.tensors().values())
        if not on_meta and not adapter.missing():
            layer._pending.discard(name)
    layer._settle_unless_waiting()
