"""Another adapter's values in the place of a loaded one, the modules untouched: for serving and compiled models."""

from __future__ import annotations

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights

from goat_kernels.initialisation import adapter_scaling
from goat_kernels.peft.adapter import present_name
from goat_kernels.peft.config import GoatConfig
from goat_kernels.peft.layer import layers_with

#: Settings that change what a layer computes without showing in the shapes of its tensors.
_COMPUTING = ("num_experts", "top_k", "dropout", "residual")


def hotswap_adapter(
    model: PeftModel, path: str, adapter_name: str = "default", *, torch_device: str | None = None, **hub_options
) -> None:
    """Give the adapter ``adapter_name`` of ``model`` the values of the one saved at ``path``.

    As with PEFT's function of this name for LoRA, the new adapter must adapt the same modules in the same way; its
    tensors are copied into the old one's, so a compiled model and a captured CUDA graph stay valid. A refused adapter
    leaves the model as it was. The balance coefficient stays the model's.

    Args:
        model: with a GOAT adapter of that name.
        path: a folder or hub id with a saved GOAT adapter.
        adapter_name: the adapter to replace; the name stays.
        torch_device: where the file is read to; None for the default device.
        hub_options: ``revision``, ``token``, ``subfolder``, ``cache_dir`` for a hub id.

    Raises:
        ValueError: no such adapter in the model, another method at ``path``, or an adapter of other modules, shapes,
            experts, top_k, dropout, scaling or residual, which the message names.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is not in the model, which has {', '.join(model.peft_config)}")
    if not isinstance(model.peft_config[adapter_name], GoatConfig):
        kind = type(model.peft_config[adapter_name]).__name__
        raise ValueError(f"adapter_name={adapter_name!r} is a {kind} adapter; GOAT's hotswap_adapter needs a GOAT one")
    config = GoatConfig.from_pretrained(path, **hub_options)  # checks the weights beside it
    if not isinstance(config, GoatConfig):
        raise ValueError(f"path={path!r} holds a {type(config).__name__} adapter; a GOAT one is needed")
    config.other_base = model.peft_config[adapter_name].other_base
    for layer in layers_with(model, adapter_name).values():
        both = layer.goat_adapter[adapter_name].settings, config.settings(layer.name)
        differing = {name: [getattr(settings, name) for settings in both] for name in _COMPUTING}
        differing["scaling"] = [
            s.scaling if s.per_expert_scaling else adapter_scaling(s, layer.in_features) for s in both
        ]
        for name, (found, needed) in differing.items():
            if found != needed:
                raise ValueError(
                    f"path={path!r} cannot replace adapter {adapter_name!r} in place: on {layer.name} it has "
                    f"{name}={needed!r} where the loaded one has {found!r}; load it with load_adapter() instead"
                )
    state = load_peft_weights(path, device=torch_device, **hub_options)
    state = {present_name(key): tensor for key, tensor in state.items()}
    old, instead = get_peft_model_state_dict(model, adapter_name=adapter_name), "; load it with load_adapter() instead"
    if missing := sorted(old.keys() - state.keys()):
        raise ValueError(f"path={path!r} lacks {missing[0]} ({len(missing)} tensors in all){instead}")
    if unknown := sorted(state.keys() - old.keys()):
        raise ValueError(f"path={path!r} has {unknown[0]} ({len(unknown)} tensors), which the model lacks{instead}")
    for name, tensor in old.items():
        if tensor.shape != state[name].shape:
            found, needed = list(state[name].shape), list(tensor.shape)
            raise ValueError(f"path={path!r} has {name} of shape {found}; {needed} is needed{instead}")
    set_peft_model_state_dict(model, state, adapter_name=adapter_name)
