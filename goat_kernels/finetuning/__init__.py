"""Fine-tuning: tasks, methods, training and evaluation, for ``goat-kernels finetune`` and ``bench.quality``."""
