"""``GoatLinearLayer``: a linear layer of any kind with GOAT adapters on it, as PEFT's tuner layers are built.

The base layer stays where it is (``base_layer``). Each adapter is a :class:`GoatAdapter` in ``goat_adapter``, a dict
keyed by adapter name. Of adapters with ``residual="fold"`` one, if any, is inside the base weight: :meth:`settle`
follows everything that may change which, so that a forward, which a compiler may be tracing, finds it settled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goat_kernels.adapter import FoldedWeight, placeholders
from goat_kernels.autocast import autocast_dtype
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
from goat_kernels.routed_module import RoutedModule, never_bypass
from goat_kernels.settings import AdapterSettings

NO_MERGE = (
    "A GOAT adapter cannot be merged: each token is routed to its own experts, so no single weight gives the same "
    "output. unload() returns the base model without the adapter; keep the adapter beside the base model to use it."
)

#: A first forward may come from several threads at once. Not the layer's own: it could be neither copied nor pickled.
_LOCK = threading.RLock()


class _OfAdapters(Mapping):
    """Adapter name -> something of that adapter: a view, as PEFT and others look for one dict per hyper-parameter."""

    def __init__(self, adapters: AdapterDict, of: Callable[[GoatAdapter], Any]) -> None:
        self._adapters, self._of = adapters, of

    def __getitem__(self, name: str) -> Any:
        return self._of(self._adapters[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)


class GoatLinearLayer(RoutedModule, nn.Module, BaseTunerLayer):
    """GOAT adapters on one base layer.

    "Linear" is in the name because PEFT looks for it when "all-linear" meets a model that has adapters already.

    ``goat_adapter`` holds the adapters by name, with tensors in float32 (float64 over a float64 base); ``settings``,
    ``r`` and ``scaling`` are views of their hyper-parameters, ranks and s.
    """

    adapter_layer_names = ("goat_adapter",)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        """``name`` is the module's name in the model, for messages."""
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features, self.out_features = features(self.get_base_layer())
        self.goat_adapter = AdapterDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self._folded: FoldedWeight | None = None
        self._folded_adapter: str | None = None
        never_bypass(self)
        self.register_state_dict_post_hook(_pretrained_weight_into_state_dict)
        self.register_load_state_dict_post_hook(_check_loaded)

    # --- adapters -------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Mapping[str, AdapterSettings]:
        return _OfAdapters(self.goat_adapter, lambda adapter: adapter.settings)

    @property
    def scaling(self) -> Mapping[str, float | Tensor]:
        return _OfAdapters(self.goat_adapter, lambda adapter: adapter.scaling)

    @property
    def r(self) -> Mapping[str, int]:
        return _OfAdapters(self.goat_adapter, lambda adapter: adapter.settings.r)

    def update_layer(
        self,
        adapter_name: str,
        settings: AdapterSettings,
        tensors: Mapping[str, Tensor] | None,
        *,
        may_start: bool = True,
    ) -> None:
        """Add an adapter with ``settings`` on this module, which starts from ``tensors`` (name -> tensor).

        None of them stands for tensors that are to be loaded. Where they never come, the adapter starts afresh if it
        ``may_start``; otherwise its first forward raises.
        """
        base = self.get_base_layer()
        pending = tensors is None
        if pending:
            tensors = placeholders(
                settings, self.in_features, self.out_features, adapter_device(base), adapter_dtype(base)
            )
        self.goat_adapter[adapter_name] = GoatAdapter(settings, tensors, pending=pending, may_start=may_start)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def initialise_pending(self, adapter_name: str) -> None:
        """Settle an adapter that was to be loaded: nothing to do if its tensors have come, else start it afresh.

        Raises:
            RuntimeError: some of its tensors came and others did not; or none, though they are in a file.
        """
        adapter = self.goat_adapter[adapter_name]
        if not adapter.pending or adapter.is_on_meta():
            return
        missing = adapter.missing()
        if 0 < len(missing) < len(adapter.tensors()):
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
            generator = torch.Generator().manual_seed(adapter.settings.seed)
            initial = initialise_adapter(
                self.pretrained_weight(), adapter.settings, generator=generator, name=self.name
            )
            adapter.start(initial.named())

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
        if not self._is_settled(active):
            self.settle()

        base = self.base_layer
        weight = bias = output = None
        hook = None if args or kwargs else offloading_hook(base)
        if hook is not None:
            (x,), _ = hook.pre_forward(base, x)
        plain = has_plain_weight(base) if hook is not None else not args and not kwargs and is_plain(base)
        # Where the dtypes do not fit, the base layer says what is wrong.
        if plain and (x.dtype == base.weight.dtype or autocast_dtype(x) is not None):
            weight, bias = base.weight, base.bias
        else:
            if x.requires_grad and torch.is_grad_enabled():
                unpack(base)
            output = base(x, *args, **kwargs)
            check_output_of_base(x, output, self.out_features, self.name)
        balance_loss = None
        for name in active:
            routed = self.goat_adapter[name].routed(
                x, weight=weight, bias=bias, base_output=output, balance_scale=self.balance_scale
            )
            weight, bias, output = None, None, routed.output
            balance_loss = routed.balance_loss if balance_loss is None else balance_loss + routed.balance_loss
        self._remember(balance_loss, routed.load)
        return output if hook is None else hook.post_forward(base, output)

    # --- residual="fold" ------------------------------------------------------------------------------------------

    def check_alone(self, adapter_names: list[str]) -> None:
        """Raise ValueError where several adapters would be active and one of them is folded into the weight."""
        here = [name for name in adapter_names if name in self.goat_adapter]
        folded = [name for name in here if self.goat_adapter[name].settings.residual == "fold"]
        if folded and len(here) > 1:
            raise ValueError(
                f"adapters {here} cannot be active together: residual='fold' of {folded} changes the base weight that "
                "the others see; activate one, or create them with residual='path'"
            )

    def active_here(self) -> list[str]:
        """Active adapters that this layer has; none while they are disabled."""
        adapters = self.goat_adapter
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in adapters]

    def _is_settled(self, active: list[str]) -> bool:
        """Whether the ``active`` adapters have their tensors and the weight is in the state that they need."""
        if not torch.compiler.is_compiling():
            self._check_folded_weight()
        return not self._waits_for(active) and self._folding_among(active) == self._folded_adapter

    def settle(self) -> None:
        """Start the active adapters whose tensors never came, then fold the pair that belongs in the weight."""
        with _LOCK:
            active = self.active_here()
            if self._is_settled(active):
                return
            for name in active:
                self.initialise_pending(name)
            self.unfold()
            folding = self._folding_among(active)
            base = self.get_base_layer()
            if folding is None or base.weight.is_meta:
                return
            A0, B0 = self.goat_adapter[folding].residual_A, self.goat_adapter[folding].residual_B
            self._folded = FoldedWeight(base.weight)
            self._folded.fold(*((B0.T, A0.T) if isinstance(base, Conv1D) else (A0, B0)))  # a Conv1D holds W0^T
            self._folded_adapter = folding

    def unfold(self) -> None:
        """Write W0 back, bit for bit."""
        self._check_folded_weight()
        if self._folded is not None:
            self._folded.restore()
            self._folded, self._folded_adapter = None, None

    def _check_folded_weight(self) -> None:
        """Raise where the base layer has another weight now than the one that was folded: W0 can no longer be put back,
        and "disabled" would silently mean W0 - W_res."""
        if self._folded is not None and self._folded.weight is not self.get_base_layer().weight:
            raise RuntimeError(
                f"the weight of {self.name} was replaced while an adapter was folded into it (fully_shard does that, "
                "and accelerate's dispatch_model); use residual='path'"
            )

    def _waits_for(self, names: list[str]) -> bool:
        return any(self.goat_adapter[name].pending for name in names)

    def _folding_among(self, names: list[str]) -> str | None:
        for name in names:
            adapter = self.goat_adapter[name]
            if adapter.settings.residual == "fold" and adapter.residual_A is not None:
                return name
        return None

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
        if not self._waits_for(self.active_here()):
            self.settle()

    # --- PEFT -----------------------------------------------------------------------------------------------------

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter, without PEFT's cast to the base's dtype: that would round float32 masters to bfloat16."""
        device = adapter_device(self.get_base_layer()) if device is None else device
        if adapter_name not in self.goat_adapter:
            return
        adapter = self.goat_adapter[adapter_name]
        if not adapter.is_on_meta():
            adapter.to(device)

    def merge(self, *args, **kwargs) -> None:
        raise ValueError(NO_MERGE)

    unmerge = merge

    def __repr__(self) -> str:
        return "goat." + super().__repr__()


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, GoatLinearLayer]:
    """Name in ``model`` -> layer, of those that have the adapter."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GoatLinearLayer)}
    return {name: layer for name, layer in layers.items() if adapter_name in layer.goat_adapter}


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
    for adapter in layer.goat_adapter.values():
        if not adapter.is_on_meta():
            adapter.missing()
    layer._settle_unless_waiting()
