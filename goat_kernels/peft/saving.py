"""``PeftModel.save_pretrained`` for models with a GOAT adapter: all files or none, and a card that says how to load.

PEFT writes into the folder that it is given and offers a tuner no place to step in, so a disk that fills up leaves half
a file where a whole one was. A ``PeftModel`` that takes a :class:`GoatModel` as its ``base_model`` therefore becomes an
object of a subclass under the same name, which saves into a temporary folder first. It is met through torch's hook on
module registration: nothing else that PEFT calls before it writes knows the model and the folder, and without it
``test_peft_faults::test_a_full_disk_leaves_the_old_adapter`` and the tests of ``test_peft_killed`` fail. No class of
PEFT is changed, and models with other adapters are not affected. Trainer's checkpoints go through it too,
transformers' own ``model.save_pretrained`` does not.
"""

from __future__ import annotations

import functools
import inspect
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from goat_kernels.files import CONFIG_FILE, written_whole
from goat_kernels.peft.storage import stamp

MODEL_CARD = "README.md"

#: What a process needs that has never heard of GOAT: PEFT alone raises KeyError 'GOAT'.
_HOW_TO_LOAD = """## How to load this adapter

It is a GOAT adapter, which PEFT knows once `goat_kernels` is imported (`pip install goat-kernels`):

```python
import goat_kernels  # without it, PEFT raises KeyError: 'GOAT'
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or its id on the hub")
```
"""


def save_whole(tuner: nn.Module) -> None:
    """Give the PeftModel that takes ``tuner`` next a ``save_pretrained`` that writes all or nothing."""
    reference = weakref.ref(tuner)

    def on_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if submodule is None or submodule is not reference():
            return
        handle.remove()
        if isinstance(module, PeftModel):
            module.__class__ = _saving_whole(type(module))

    handle = register_module_module_registration_hook(on_registration)
    weakref.finalize(tuner, handle.remove)  # a tuner that no PeftModel takes: peft.inject_adapter_in_model


@functools.cache
def _saving_whole(kind: type[PeftModel]) -> type[PeftModel]:
    """A subclass of ``kind``, under its name, whose ``save_pretrained`` writes all or nothing."""

    class Whole(kind):
        @functools.wraps(kind.save_pretrained)
        def save_pretrained(self, save_directory, *args, **kwargs):
            _save(super().save_pretrained, save_directory, *args, **kwargs)

        def __reduce_ex__(self, protocol):
            # Pickle and copy look a class up by its name, and would find ``kind``.
            return (_new, (kind,), *super().__reduce_ex__(protocol)[2:])

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(Whole, name, getattr(kind, name))
    return Whole


def _new(kind: type[PeftModel]) -> PeftModel:
    whole = _saving_whole(kind)
    return whole.__new__(whole)


def _save(save: Callable[..., None], save_directory: str, *args, **kwargs) -> None:
    """``save``, PEFT's own, with the same arguments; when it raises, ``save_directory`` is as it was."""
    arguments = inspect.signature(save).bind(save_directory, *args, **kwargs).arguments
    folder = Path(save_directory)
    if not arguments.get("is_main_process", True) or folder.is_file():
        save(save_directory, *args, **kwargs)
        return
    with written_whole(folder) as temporary:
        if (folder / MODEL_CARD).is_file():
            shutil.copy(folder / MODEL_CARD, temporary)  # PEFT updates a model card that is there
        save(str(temporary), *args, **kwargs)
        for config in temporary.rglob(CONFIG_FILE):
            stamp(config.parent)
        card = temporary / MODEL_CARD
        text = card.read_text(encoding="utf-8") if card.is_file() else _HOW_TO_LOAD
        if _HOW_TO_LOAD.splitlines()[0] not in text:
            card.write_text(f"{text.rstrip()}\n\n{_HOW_TO_LOAD}", encoding="utf-8")
