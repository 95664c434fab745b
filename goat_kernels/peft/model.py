"""``GoatModel``: PEFT's tuner for GOAT. Checks and initialises all targeted layers before it touches the model."""

from __future__ import annotations

import contextlib
import warnings

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from tqdm.auto import tqdm

from goat_kernels.adapter import random_start, start_from_pair
from goat_kernels.initialisation import initialise_adapter
from goat_kernels.peft.adapter import present_name
from goat_kernels.peft.base_check import check_base, fingerprint
from goat_kernels.peft.base_layer import (
    adapter_device,
    adapter_dtype,
    check_base_layer,
    check_loading_of_base,
    features,
    is_meta,
    pretrained_weight,
)
from goat_kernels.peft.config import GoatConfig
from goat_kernels.peft.layer import NO_MERGE, GoatLinearLayer, layers_with
from goat_kernels.peft.saving import save_whole
from goat_kernels.peft.targets import choose_targets
from goat_kernels.rules import ZERO_RULES
from goat_kernels.training.balance import attach_balance_scale, detach_balance_scale


class GoatModel(BaseTuner):
    """A model with GOAT adapters; ``peft.get_peft_model`` makes it from a :class:`GoatConfig`.

    ``low_cpu_mem_usage=True`` creates the adapter's parameters on the meta device, to be loaded; no SVD is run.

    Raises:
        TypeError: a targeted module that is no linear layer.
        ValueError: a targeted module that is too small for its rank, whose weight the model reads without calling it,
            or that cannot take ``residual="fold"``. Either way the model is as it was. Layers that "all-linear" or
            PEFT's default stands for are left out with a warning instead, but for "fold".
    """

    prefix: str = "goat_"
    tuner_layer_cls = GoatLinearLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model, peft_config, adapter_name: str, *args, **kwargs) -> None:
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        save_whole(self)

    # --- injection ------------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs,
    ) -> None:
        """Add the adapter's layers: checked first, initialised second, and only then put into the model."""
        config = self.peft_config[adapter_name]
        self._initial: dict[str, dict[str, torch.Tensor]] = {}  # module -> what its adapter starts from
        self._asked = config.target_modules
        self._twin = next(
            (name for name, other in self.peft_config.items() if other is config and name != adapter_name), None
        )
        on_meta = low_cpu_mem_usage or nn.PReLU().weight.is_meta  # in a context that creates all parameters there
        self._loads = on_meta or (config.initialised and self._twin is None)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, **kwargs)
        except Exception:
            config.target_modules = self._asked  # the configuration can be corrected and used again
            raise
        finally:
            del self._initial, self._loads, self._asked, self._twin
        attach_balance_scale(model)

    def _prepare_model(self, peft_config: GoatConfig, model: nn.Module) -> None:
        """PEFT calls this when the configuration is complete and before it replaces the first module."""
        _warn_about_top_1(peft_config)
        settings = peft_config.settings()
        if settings.has_residual or settings.per_expert_scaling:
            check_loading_of_base(model)
        targets = choose_targets(peft_config, model, self._asked)
        adapted = {name: m for name in targets if isinstance(m := model.get_submodule(name), GoatLinearLayer)}
        for layer in adapted.values():
            layer.unfold()
        if peft_config.initialised:
            check_base(peft_config, targets, model)
        else:
            peft_config.base_weights = fingerprint(targets)
        if self._loads:
            return
        if not peft_config.init_weights:
            for name, base in targets.items():
                self._initial[name] = random_start(
                    peft_config.settings(name), *features(base), adapter_device(base), adapter_dtype(base)
                )
            return
        # An adapter that shares its configuration object with one that is there starts from that one's frozen pair, bit
        # for bit. TRL adds its reference adapter so, and copies the policy's parameters onto it, but not its buffers.
        for name, layer in adapted.items():
            if self._twin not in layer.goat_adapter:
                continue
            twin, settings = layer.goat_adapter[self._twin], peft_config.settings(name)
            there = twin.residual_A is not None and not twin.residual_A.is_meta and not twin.missing()
            if there and twin.settings == settings:  # the configuration may have been changed since then
                self._initial[name] = start_from_pair(settings, twin.residual_A, twin.residual_B, twin.scaling)
        left = {
            name: (features(base), peft_config.settings(name))
            for name, base in targets.items()
            if not is_meta(base) and name not in self._initial
        }
        # Weights of one shape after another: a seed gives the routers that it has always given.
        first: dict[tuple, int] = {}
        names = sorted(left, key=lambda name: first.setdefault(left[name], len(first)))
        for name in tqdm(names, desc="GOAT initialisation", unit="layer", disable=len(names) <= 4):
            weight = _weight_for_initialisation(peft_config, model.get_submodule(name), name)
            initial = initialise_adapter(weight, left[name][1], dtype=adapter_dtype(targets[name]), name=name)
            self._initial[name] = initial.named()

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        layer = target
        if not isinstance(target, GoatLinearLayer):
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            check_base_layer(base, current_key)  # again: targets named by a state_dict come unchecked
            layer = GoatLinearLayer(target, current_key)
            layer._active_adapter = adapter_name
        tensors = self._initial.pop(current_key, None)
        may_start = not peft_config.initialised
        layer.update_layer(adapter_name, peft_config.settings(current_key), tensors, may_start=may_start)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            # Past PEFT's _replace_module, which moves adapters after the weight: onto meta where that is offloaded.
            setattr(parent, target_name, layer)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The masters are float32 from the start; only ``autocast_adapter_dtype=False`` asks for the base's dtype."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)
            return
        for layer in layers_with(self.model, adapter_name).values():
            weight = getattr(layer.get_base_layer(), "weight", None)
            if weight is not None and weight.is_floating_point():
                for parameter in layer.goat_adapter[adapter_name].parameters():
                    parameter.data = parameter.data.to(weight.dtype)

    # --- switching, saving, unloading -----------------------------------------------------------------------------

    def _layers(self) -> list[GoatLinearLayer]:
        return [module for module in self.model.modules() if isinstance(module, GoatLinearLayer)]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for layer in self._layers():
            layer.check_alone(names)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        # An adapter whose tensors never came is initialised before it is saved; in place, so state_dict sees it.
        for layer in layers_with(model, adapter_name).values():
            layer.initialise_pending(adapter_name)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        # torch copies what fits before it complains about the rest; an adapter is loaded whole or not at all.
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict={present_name(key): tensor for key, tensor in state_dict.items()},
        )
        for name, layer in layers_with(model, adapter_name).items():
            for tensor, old in layer.goat_adapter[adapter_name].tensors().items():
                new = remapped.get(f"{name}.goat_adapter.{adapter_name}.{tensor}")
                if new is not None and old.numel() and new.shape != old.shape:
                    raise ValueError(
                        f"{layer.name}.{tensor} of adapter {adapter_name!r} has shape {list(old.shape)}, and the "
                        f"state dict to be loaded has {list(new.shape)}; load an adapter of the same model and "
                        "settings. Nothing was loaded"
                    )
        return remapped

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    def add_weighted_adapter(self, adapters: list[str], *args, **kwargs) -> None:
        raise ValueError(
            f"adapters {list(adapters)} cannot be blended into one: each has a router of its own, and the average of "
            "two routers or factors computes neither's output. base_model.set_adapter() with both names adds outputs"
        )

    def unload(self) -> nn.Module:
        """The base model as it was, with its exact weights."""
        for layer in self._layers():
            layer.enable_adapters(False)
        detach_balance_scale(self.model)
        return super().unload()

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names asks for a different adapter per sample, which GOAT does not offer; call set_adapter() "
                "and run each adapter's samples in a batch of their own"
            )
        yield


def _weight_for_initialisation(config: GoatConfig, module: nn.Module, name: str) -> torch.Tensor:
    """W0 [M, N] of a targeted module, which may be adapted already."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if config.init in ZERO_RULES:
        # Only shape and device matter: nothing is dequantised, and what cannot be dequantised can be adapted.
        return torch.zeros((), device=adapter_device(base)).expand(features(base)[::-1])
    return module.pretrained_weight() if isinstance(module, GoatLinearLayer) else pretrained_weight(base, name)


def _warn_about_top_1(config: GoatConfig) -> None:
    if config.top_k != 1 or config.num_experts == 1:
        return
    learns = "from the balance loss alone" if config.balance_coefficient else "nothing, as balance_coefficient is 0"
    warnings.warn(
        f"top_k=1 renormalises the gate of the one expert to 1, so the router learns {learns}; use top_k=2 to train "
        "it on the task",
        stacklevel=2,
    )
