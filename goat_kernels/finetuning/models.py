"""From a model's name to one that trains: loading, the methods, saving, loading back."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from goat_kernels.backends import resolve_backend
from goat_kernels.command_errors import CommandError, one_line
from goat_kernels.finetuning.data import local_path, looks_like_path
from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.options import FinetuneOptions
from goat_kernels.initialisation import check_weight
from goat_kernels.peft import GoatConfig

#: Top-level modules that are a classifier's head, in transformers' models.
HEAD_NAMES = ("classifier", "score", "pre_classifier", "classification_head", "head", "fc")

#: Settings as error messages name them -> the options that set them.
_OPTION_OF_SETTING = {"rank_pattern": "--rank"} | {
    field.metadata.get("setting", field.name): f"--{field.name.replace('_', '-')}" for field in fields(FinetuneOptions)
}


@dataclass(frozen=True)
class BaseModel:
    """A pretrained model: ``load`` returns a fresh copy, each time bit-equal, a new head's random weights too.

    ``new_modules`` names the modules that did not come with the pretrained weights, or are the classifier's head: every
    method trains them fully.
    """

    load: Callable[[], PreTrainedModel]
    new_modules: tuple[str, ...]


def load_config(source: str, auto_class) -> PreTrainedConfig:
    """The configuration of the model ``source``; CommandError where there is none, or ``auto_class`` cannot make it."""
    if looks_like_path(source):
        path = local_path("--model", source, "a folder that transformers can load")
        if not (path / "config.json").is_file():
            raise CommandError(f"--model {source!r} has no config.json; it needs a folder that transformers can load")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"--model {source!r} is neither a local folder nor a model that could be loaded from the hub; "
            f"it needs an existing folder, or an id and a network ({one_line(error)})"
        ) from None
    if type(config) not in auto_class._model_mapping:
        raise CommandError(
            f"--model {source!r} is a {config.model_type!r} model, which {auto_class.__name__} cannot make; "
            "it needs a model of the kind that --task names"
        )
    return config


def text_limits(config: PreTrainedConfig, auto_class) -> tuple[int | None, int | None]:
    """How many positions a sequence may have (None: as many as it likes), and how many rows the embedding has (None:
    there is no such table, as in CANINE, which hashes its characters).

    From a model without weights: RoBERTa and its kin begin to count behind the padding's index, so that they have fewer
    positions than the configuration says.
    """
    positions, rows = getattr(config.get_text_config(), "max_position_embeddings", None), None
    # Some models cannot be made without values; if the configuration is at fault, loading tells.
    with contextlib.suppress(Exception), torch.device("meta"):
        model = auto_class.from_config(config)
        for name, module in model.named_modules():
            if name.endswith("position_embeddings") and getattr(module, "weight", None) is not None:
                padding = getattr(module, "padding_idx", None)
                positions = positions if padding is None else module.weight.shape[0] - padding - 1
        rows = model.get_input_embeddings().weight.shape[0]
    # XLNet says -1 for no limit.
    return positions if positions and positions > 0 else None, rows


def base_model(source: str, auto_class, seed: int, dtype: str, **config_changes) -> BaseModel:
    """A reloadable base model of the folder or id ``source``; ``seed`` is of the weights that the checkpoint lacks."""

    def load() -> tuple[PreTrainedModel, dict]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            more = {"ignore_mismatched_sizes": True, "output_loading_info": True, **config_changes}
            return auto_class.from_pretrained(source, dtype=getattr(torch, dtype), **more)

    model, info = load()
    missing = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    heads = {name for name, _ in model.named_children() if name in HEAD_NAMES}
    return BaseModel(lambda: load()[0], tuple(sorted(heads | set(_fully_missing(model, missing)))))


def classifier(source: str, auto_class, options: FinetuneOptions, names: Sequence[str], **config_changes) -> BaseModel:
    """A reloadable base model with a new head for the classes ``names``."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return base_model(
        source, auto_class, options.seed, options.dtype, num_labels=len(names), **labels, **config_changes
    )


def _fully_missing(model: nn.Module, missing: set[str]) -> list[str]:
    """The outermost modules all of whose parameters are in ``missing``."""
    found: list[str] = []
    for name, module in model.named_modules():  # each before what is in it
        names = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        if names and names <= missing and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def adapter_config(method: str, options: FinetuneOptions, new_modules: tuple[str, ...]) -> PeftConfig:
    """The PEFT configuration of a method that has one; CommandError for a hyper-parameter that the method refuses."""
    targets = options.target_modules
    # all-linear would adapt the head too, which trains in full.
    excluded = [*map(_inside, new_modules), *_excluded(options).values()]
    shared = {
        "r": options.rank,
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
        "exclude_modules": "|".join(f"(?:{pattern})" for pattern in excluded) or None,
        "modules_to_save": list(new_modules) or None,
        "lora_dropout": options.dropout,
    }
    with options_named():
        return METHODS[method].config(options, shared)


def _excluded(options: FinetuneOptions) -> dict[str, str]:
    """What --exclude-modules names, each with its regular expression."""
    excluded = options.exclude_modules or ()
    return {excluded: excluded} if isinstance(excluded, str) else {name: _inside(name) for name in excluded}


def _inside(name: str) -> str:
    """A regular expression for the names of the modules called ``name``, with or without a prefix, and all in them."""
    return rf"(?:.*\.)?{re.escape(name)}(?:\..*)?"


def build(method: str, base: BaseModel, options: FinetuneOptions) -> PreTrainedModel | PeftModel:
    """A fresh copy of the base model, set up so that exactly what ``method`` trains requires grad."""
    model = base.load()
    if method == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(name.startswith(f"{module}.") for module in base.new_modules))
    if METHODS[method].config is None:
        return model
    torch.manual_seed(options.seed)
    config = adapter_config(method, options, base.new_modules)
    with options_named():
        model = get_peft_model(model, config)
    if getattr(config, "num_experts", None) == 1:  # its gate is always 1, so its router has nothing to learn
        for name, parameter in model.named_parameters():
            if ".goat_adapter." in name and name.endswith(".router"):
                parameter.requires_grad_(False)
    return model


def training_device(options: FinetuneOptions) -> torch.device:
    """Where the Trainer will train."""
    use_gpu = options.device == "auto" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def check_adapters(base: BaseModel, options: FinetuneOptions) -> None:
    """Raise CommandError now for what would only fail when the adapters' turn comes, perhaps hours later.

    Puts a LoRA on the targets, which is cheap, and checks each target's weight against GOAT's needs by its shape.
    """
    with_adapters = [name for name in options.methods if METHODS[name].config is not None]
    if not with_adapters:
        return
    configs = [adapter_config(name, options, base.new_modules) for name in with_adapters]
    ours = [config for config in configs if isinstance(config, GoatConfig)]
    if ours:
        with options_named():
            resolve_backend(options.backend, training_device(options), torch.float32)
    model = base.load()
    for name, pattern in _excluded(options).items():
        if not any(re.fullmatch(pattern, module) for module, _ in model.named_modules()):
            raise CommandError(f"--exclude-modules {name!r} matches no module of the model")
    try:
        model = get_peft_model(model, adapter_config("lora", options, base.new_modules))
    except ValueError as error:
        without = f" without --exclude-modules {options.exclude_modules!r}" if options.exclude_modules else ""
        raise CommandError(
            f"--target-modules {options.target_modules!r}{without} does not fit the model: {one_line(error, 300)}"
        ) from None
    with options_named():
        for name, module in model.base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                weight = torch.empty(module.out_features, module.in_features, device="meta")
                for config in ours:
                    check_weight(weight, config.settings(), name)


@contextlib.contextmanager
def options_named() -> Iterator[None]:
    """Turn errors about settings (``r=36``) into CommandErrors about options (``--rank=36``)."""
    names = "|".join(_OPTION_OF_SETTING)
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        message = re.sub(rf"\b({names})(?==)", lambda match: _OPTION_OF_SETTING[match[1]], str(error))
        raise CommandError(one_line(message, None)) from None


def save(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Write what is needed to have the model back: the adapter, or the whole model."""
    # "auto" would ask the hub whether the base model's vocabulary was resized; nothing here resizes it.
    model.save_pretrained(folder, **({"save_embedding_layers": False} if isinstance(model, PeftModel) else {}))


def load_back(method: str, base: BaseModel, folder: Path, device: torch.device) -> PreTrainedModel | PeftModel:
    """The trained model from its folder, on a freshly loaded base, in eval mode."""
    model = base.load()
    if METHODS[method].config is not None:
        model = PeftModel.from_pretrained(model, folder)
    else:
        model = type(model).from_pretrained(folder, dtype=model.dtype)
    return model.to(device).eval()


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """The logits of one batch, on the CPU."""
    return model(**{name: value.to(device) for name, value in batch.items()}).logits.cpu()


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers the optimiser updates."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
