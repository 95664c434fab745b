"""Saving that a full disk cannot spoil: PEFT's files are written beside the old ones, then renamed onto them.

``PeftModel.save_pretrained`` writes into the folder it is given, and offers a tuner no place to step in: a disk that
fills up there leaves half a file where a whole one was. So a ``PeftModel`` that holds a :class:`GoatModel` gets a
``save_pretrained`` of its own, as an attribute of that one object. It calls the class's with a temporary folder. The
object is met when it takes the tuner as its ``base_model``, through torch's hook on module registration, which is
there from the tuner's creation until then. No class and no module of PEFT is changed, and models with other adapters
are not affected. Trainer's checkpoints go through it too; transformers' own ``model.save_pretrained`` (adapters that
were added without PEFT's wrapper) and ``state_dict``s that users write themselves do not.
"""

from __future__ import annotations

import functools
import inspect
import shutil
import weakref
from pathlib import Path

from peft import PeftModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from goat_kernels.peft.files import CONFIG_FILE, written_whole
from goat_kernels.peft.integrity import stamp


def save_whole(tuner: nn.Module) -> None:
    """Give the PeftModel that takes ``tuner`` next a ``save_pretrained`` that writes all or nothing."""
    reference = weakref.ref(tuner)

    def on_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if submodule is None or submodule is not reference():
            return
        handle.remove()
        if isinstance(module, PeftModel):
            module.__dict__["save_pretrained"] = functools.partial(_save_pretrained, module)

    handle = register_module_module_registration_hook(on_registration)
    weakref.finalize(tuner, handle.remove)  # a tuner that no PeftModel takes: peft.inject_adapter_in_model


def _save_pretrained(model: PeftModel, save_directory: str, *args, **kwargs) -> None:
    """``PeftModel.save_pretrained`` with the same arguments; when it raises, ``save_directory`` is as it was."""
    save = type(model).save_pretrained
    arguments = inspect.signature(save).bind(model, save_directory, *args, **kwargs).arguments
    folder = Path(save_directory)
    if not arguments.get("is_main_process", True) or folder.is_file():
        save(model, save_directory, *args, **kwargs)
        return
    with written_whole(folder) as temporary:
        if (folder / "README.md").is_file():
            shutil.copy(folder / "README.md", temporary)  # PEFT updates a model card that is there
        save(model, str(temporary), *args, **kwargs)
        for config in temporary.rglob(CONFIG_FILE):
            stamp(config.parent)
