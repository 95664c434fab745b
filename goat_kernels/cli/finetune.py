"""Fine-tune a model with full fine-tuning, LoRA and GOAT, and compare them.

Without arguments and without a network: scikit-learn's bundled digits (1797 images) and a small ViT, pretrained once
on the digits 0-5 and cached ($GOAT_KERNELS_CACHE, else ~/.cache/goat-kernels). The task is all ten digits, with black
and white exchanged and turned by a quarter. With a new classifier alone on the frozen model ("head") about six in ten
held-out images come out right; with the model adapted, more than nine.

The output folder gets the trained models (adapters for lora and goat), results.json and results.png. Every saved model
is loaded back and must give bit-equal outputs. Ctrl-C while a method trains leaves a checkpoint that --resume
continues from, exactly; at any other time --resume goes on with the stage that was interrupted, and before the output
folder is begun (start-up, pretraining) nothing is left behind. A method whose loss becomes NaN or infinite is stopped
there and reported as diverged; the others go on, and the exit code is 1.

    goat-kernels finetune
    goat-kernels finetune --task image-classification --model google/vit-base-patch16-224 --data photos/
    goat-kernels finetune --task text-classification --model FacebookAI/roberta-base --data reviews.csv
    goat-kernels finetune --task causal-lm --model path/to/llama --data book.txt --methods goat --dtype bfloat16
"""

from __future__ import annotations

import argparse
import os
import warnings

from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning.data import looks_like_path
from goat_kernels.finetuning.options import add_options as add_arguments
from goat_kernels.finetuning.options import settle

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code, 1 where a method diverged or did not load back with the same outputs."""
    options = settle(vars(arguments))
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
            rows = run(options)
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is not installed; it needs pip install 'goat-kernels[demo]'") from None
    return 1 if any(row["held_out"] is None or not row["reload_bit_equal"] for row in rows) else 0
