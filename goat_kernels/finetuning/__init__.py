"""All that ``goat-kernels finetune`` does; :func:`finetune` is the door.

options, recipes    the options of a run and their defaults
methods             the methods: LoRA, GOAT, full fine-tuning, ...
tasks, demo         the tasks: data, a base model and a metric; data, texts and images read the data
models              the base model, a method's adapter on it, saving and loading back
train               one training run
run                 every method of a run in turn, and the report; output guards the folder
results             one row per method: the table, results.json, results.png
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from goat_kernels.command_errors import CommandError

if TYPE_CHECKING:
    from goat_kernels.finetuning.options import FinetuneOptions


def finetune(options: FinetuneOptions) -> list[dict]:
    """Run every method of ``options`` and write the report; returns the rows of the table (``results``).

    Sets environment variables that transformers reads when it is imported, so it must not be imported yet for them to
    have an effect.

    Raises:
        CommandError: input that cannot be used, a package that is not installed, or a file that cannot be written.
        Interrupted: Ctrl-C, after the output folder was begun.
    """
    from goat_kernels.finetuning.data import looks_like_path

    sources = (options.model, options.data, options.eval_data)
    if all(source is None or looks_like_path(source) for source in sources):
        # Nothing is to come from the hub, so nothing may ask it anything, such as whether a model card exists.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.backend != "auto":
        os.environ["GOAT_KERNELS_BACKEND"] = options.backend
    try:
        import transformers

        from goat_kernels.finetuning.run import run

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        with warnings.catch_warnings():
            # transformers reads its own deprecated property when it looks a model over.
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
            # Pillow's, about files that it opens all the same; those that it cannot open are reported before training.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            return run(options)
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is not installed; it needs pip install 'goat-kernels[demo]'") from None
