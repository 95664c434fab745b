"""GOAT as a PEFT method: importing this package registers it, so that ``peft.get_peft_model`` knows ``GoatConfig``.

``import goat_kernels`` imports it as soon as PEFT is imported. A process that imports neither cannot load a GOAT
adapter: PEFT looks the method up by the name in the adapter's file and raises ``KeyError: 'GOAT'``.
"""

from __future__ import annotations

import peft
import peft.mapping

from goat_kernels.peft.config import GoatConfig, GoatPeftType
from goat_kernels.peft.hotswap import hotswap_adapter
from goat_kernels.peft.layer import GoatLinearLayer
from goat_kernels.peft.model import GoatModel

__all__ = ["GoatConfig", "GoatLinearLayer", "GoatModel", "GoatPeftType", "hotswap_adapter"]


# peft.utils.register_peft_method takes only the names that PEFT ships with.
peft.PEFT_TYPE_TO_CONFIG_MAPPING[GoatPeftType.GOAT] = GoatConfig
peft.PEFT_TYPE_TO_TUNER_MAPPING[GoatPeftType.GOAT] = GoatModel
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[GoatPeftType.GOAT] = GoatModel.prefix
