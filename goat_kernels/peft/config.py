"""``GoatConfig``: a GOAT adapter's hyper-parameters and targets, as PEFT saves and loads them."""

# ruff: noqa: RUF009 -- the calls make fields
from __future__ import annotations

import copy
import enum
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.version import Version
from peft import PeftConfig
from peft.utils.other import get_pattern_key

from goat_kernels import __version__
from goat_kernels.peft.storage import check_adapter_folder, config_of_killed_save, has_weights
from goat_kernels.settings import AdapterSettings, check_name, check_number, described, document_fields

#: Fields that say how to load, not what the adapter is, and a digest that only a finished file has: never saved here.
_NOT_SAVED = ("other_base", "allow_pickle", "weights_sha256")


def _of_settings(name: str, **changed) -> Any:
    """The field ``name`` of AdapterSettings, with its default and help text."""
    declared = AdapterSettings.__dataclass_fields__[name]
    return field(**{"default": declared.default, "metadata": declared.metadata, **changed})


class GoatPeftType(enum.StrEnum):
    """GOAT's entry in PEFT's tables. PEFT, transformers and Trainer read ``.value``, so a plain string will not do."""

    GOAT = "GOAT"


@document_fields
@dataclass
class GoatConfig(PeftConfig):
    """Configuration of a GOAT adapter for ``peft.get_peft_model``.

    The hyper-parameters are those of :class:`goat_kernels.AdapterSettings`, with the same defaults, but for
    ``balance_coefficient`` (1e-3, the paper's) and ``lora_dropout`` (``dropout`` there). The targeting fields are
    those of ``peft.LoraConfig``. A bad value raises as soon as the object is made, as there.
    """

    r: int = _of_settings("r")
    num_experts: int = _of_settings("num_experts")
    top_k: int = _of_settings("top_k")
    target_modules: list[str] | str | None = described(
        None,
        "Names of the modules to adapt, a regular expression, or 'all-linear' for every linear layer but the output "
        "layer. By default PEFT's choice for LoRA on the model's architecture.",
    )
    exclude_modules: list[str] | str | None = described(None, "Names, or a regular expression, of modules left out.")
    scaling: str | float = _of_settings("scaling")
    eta: float = _of_settings("eta")
    rho: float = _of_settings("rho")
    lora_alpha: float = _of_settings("lora_alpha")
    init: str = _of_settings("init")
    residual: str = _of_settings("residual")
    residual_coefficient: float | None = _of_settings("residual_coefficient")
    lora_dropout: float = _of_settings("dropout")
    bias: str = described(
        "none",
        "Which biases train: 'none', 'all', or 'goat_only' for those of the adapted modules. With biases trained, "
        "disabling the adapter does not give the base model back.",
    )
    balance_coefficient: float = _of_settings("balance_coefficient", default=1e-3)
    svd: str = _of_settings("svd")
    seed: int = _of_settings("seed")
    init_weights: bool = described(True, "False starts from small random A and B and no residual; True follows init.")
    modules_to_save: list[str] | None = described(None, "Further modules to train and save, such as a new head.")
    layers_to_transform: list[int] | int | None = described(None, "Indices of layers; needs a list of target_modules.")
    layers_pattern: list[str] | str | None = described(None, "Name of the model's list of layers, for these indices.")
    rank_pattern: dict | None = described(dict, "Module name or regular expression -> r, where it differs.")
    alpha_pattern: dict | None = described(dict, "Module name or regular expression -> lora_alpha, where it differs.")
    initialised: bool = described(
        False,
        "Written as true beside a saved adapter, whose tensors are then expected to be loaded. Not to be set by hand.",
    )
    base_weights: dict | None = described(
        None, "Fingerprint of the base that the adapter was made on, compared at loading. Filled in by itself."
    )
    weights_sha256: str | None = described(None, "SHA-256 of the saved weights file. Filled in by itself.")
    goat_kernels_version: str | None = field(
        default=__version__, compare=False, metadata={"help": "Version that saved the adapter. Filled in by itself."}
    )
    other_base: str = described(
        "refuse", "For loading: 'refuse' a base model that the adapter was not made on, or 'warn' and load. Not saved."
    )
    allow_pickle: bool = described(False, "For loading: read a .bin file, with weights_only=True. Not saved.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = GoatPeftType.GOAT
        self.shapes_in_file: dict[str, tuple[int, int]] = {}  # module -> (M, N), where it was read from a folder
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        if self.bias == "lora_only":  # as LoraConfig calls it
            self.bias = "goat_only"
        check_number("lora_dropout", self.lora_dropout, below=1)
        self.settings()
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if not isinstance(pattern, dict):
                raise TypeError(f"{name} must be a dict from module name to number, got {pattern!r}")
        for key, r in self.rank_pattern.items():
            try:
                self.settings(r=r)
            except (TypeError, ValueError) as error:
                raise type(error)(f"rank_pattern[{key!r}]: {error}") from None
        for key, alpha in self.alpha_pattern.items():
            check_number(f"alpha_pattern[{key!r}]", alpha, exclusive=True)
        check_name("bias", self.bias, ("none", "all", "goat_only"))
        check_name("other_base", self.other_base, ("refuse", "warn"))
        if not isinstance(self.allow_pickle, bool):
            raise TypeError(f"allow_pickle must be True or False, got {self.allow_pickle!r}")
        if not isinstance(self.init_weights, bool):
            raise TypeError(
                f"init_weights must be True or False, got {self.init_weights!r}; choose the initialisation with init"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} needs target_modules as a list of names, got the "
                f"string {self.target_modules!r}"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} says where layers_to_transform counts, which is None; set it"
            )
        if self.scaling not in ("lora", "rslora") and (self.alpha_pattern or self.lora_alpha != 16):
            warnings.warn(
                f"lora_alpha={self.lora_alpha} (and alpha_pattern) is read by scaling='lora' and 'rslora' alone; "
                f"scaling={self.scaling!r} ignores it",
                stacklevel=3,
            )

    def settings(self, module_name: str | None = None, **changes) -> AdapterSettings:
        """The hyper-parameters of one module's adapter, by rank_pattern and alpha_pattern; ``changes`` go before both.

        Without ``module_name``, its name in the model, they are the configuration's own.
        """
        values = {name: getattr(self, name) for name in AdapterSettings.__dataclass_fields__ if name != "dropout"}
        values["dropout"] = self.lora_dropout
        if module_name is not None:
            for name, pattern in (("r", self.rank_pattern), ("lora_alpha", self.alpha_pattern)):
                values[name] = pattern.get(get_pattern_key(pattern.keys(), module_name), values[name])
        return AdapterSettings(**{**values, **changes})

    def to_dict(self) -> dict:
        """The fields that are saved."""
        return {name: value for name, value in super().to_dict().items() if name not in _NOT_SAVED}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write ``adapter_config.json``; the object stays as it is.

        Beside weights, or where a model has the adapter (transformers writes the weights later), it is marked as that
        of an initialised adapter.
        """
        saved = copy.copy(self)
        saved.initialised = self.initialised or self.base_weights is not None or has_weights(Path(save_directory))
        saved.goat_kernels_version = __version__
        super(GoatConfig, saved).save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs) -> GoatConfig:
        """Read ``adapter_config.json``, and check the weights beside it before any model is touched.

        ``kwargs`` are ``other_base``, ``allow_pickle`` and what ``hf_hub_download`` takes. Of an id on the hub in place
        of a folder, PEFT alone checks the weights.

        Raises:
            ValueError: weights that are damaged, do not fit, or are pickled without ``allow_pickle=True``; fields
                that a newer version wrote; an adapter of the GOAT-PEFT repository.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if isinstance(config, GoatConfig) and folder.is_dir():
            prepared = config_of_killed_save(folder, config.weights_sha256)
            if prepared is not None:
                warnings.warn(
                    f"the last save into {folder} was killed before its configuration was in its place; it is read "
                    f"from {prepared}. Save the adapter again to have it whole",
                    stacklevel=2,
                )
                config = super().from_pretrained(str(prepared), **kwargs)
            config.shapes_in_file = check_adapter_folder(
                folder, config.settings, weights_sha256=config.weights_sha256, allow_pickle=config.allow_pickle
            )
            if not has_weights(folder):  # there is nothing to load: settings for a new adapter
                config.initialised, config.base_weights = False, None
        return config

    @classmethod
    def check_kwargs(cls, **kwargs) -> dict:
        """PEFT calls this with what a file says. Unknown fields of a newer goat_kernels raise: they may change what the
        adapter computes. Others are left to PEFT, which drops them with a warning."""
        unknown = sorted(kwargs.keys() - cls.__dataclass_fields__.keys())
        if "init_type" in unknown and "init_cof" in unknown:
            raise ValueError(
                "this is an adapter of the GOAT-PEFT repository, whose file lacks what it computes with; turn it into "
                "one of this package: goat-kernels convert"
            )
        written_by = kwargs.get("goat_kernels_version")
        if unknown and written_by is not None and Version(written_by) > Version(__version__):
            raise ValueError(
                f"the adapter was saved by goat_kernels {written_by}, with fields that this version {__version__} does "
                f"not know: {', '.join(unknown)}. They may change what it computes: upgrade goat_kernels, or remove "
                "them from adapter_config.json"
            )
        return super().check_kwargs(**kwargs)
