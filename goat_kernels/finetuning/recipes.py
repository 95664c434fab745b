"""Default options: by task, and by the paper's recipe for a domain.

``goat-kernels finetune --recipe NAME`` takes the settings of the paper (arXiv 2502.16894) for one of its four domains.
What the paper does not say, or what depends on the data (epochs, batch size), is left to the task.
"""

from __future__ import annotations

#: For pretrained encoders the usual learning rates (GOAT: the paper's).
_ENCODER = {
    "methods": "lora,goat",
    "epochs": 3,
    "batch_size": 16,
    "eta": 1.0,
    "learning_rates": {"head": 1e-3, "full": 2e-5, "lora": 2e-4, "goat": 1e-4},
}

#: ``--task`` -> its defaults. eta is the paper's: 1 for ViT and RoBERTa, 0.1 for Llama at a learning rate of 1e-4. A
#: method without a learning rate takes that of ``Method.rates_of``.
TASKS: dict[str, dict] = {
    # A tiny model, trained for a minute. One thread keeps its pace on a busy machine, and its results the same on any
    # number of cores.
    "digits": {
        "methods": "head,full,lora,goat",
        "epochs": 18,
        "batch_size": 32,
        "eta": 1.0,
        "learning_rates": {"head": 2e-2, "full": 1e-3, "lora": 2e-3, "goat": 2e-3},
        "threads": 1,
    },
    "image-classification": _ENCODER,
    "text-classification": _ENCODER,
    "causal-lm": {
        "methods": "lora,goat",
        "epochs": 1,
        "batch_size": 4,
        "eta": 0.1,
        "learning_rates": {"full": 1e-5, "lora": 1e-4, "goat": 1e-4},
    },
}


#: In all four domains.
_PAPER = {"eta": 1.0, "dropout": 0.05}

#: A language model on a prompt and its response.
_GENERATION = {
    **_PAPER,
    "task": "causal-lm",
    "model": "meta-llama/Llama-2-7b-hf",
    "text_column": "prompt,response",
    "dtype": "bfloat16",
}

#: ``--recipe`` -> its ``--task``, a summary for the help text, and options (none that names data).
RECIPES: dict[str, dict] = {
    "image": {
        **_PAPER,
        "task": "image-classification",
        "summary": "CLIP ViT-B/32, E 8, K 2, R 8",
        "model": "openai/clip-vit-base-patch32",
        "rank": 8,
        "learning_rates": {"goat": 1e-4},
    },
    "glue": {
        **_PAPER,
        "task": "text-classification",
        "summary": "RoBERTa-large, E 8, K 2, R 32",
        "model": "FacebookAI/roberta-large",
        "rank": 32,
        "learning_rates": {"goat": 1e-4},
    },
    "nlg": {
        **_GENERATION,
        "summary": "LLaMA2-7B, a prompt and its response, E 8, K 2, R 8",
        "rank": 8,
        "max_length": 1024,
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "learning_rates": {"goat": 2e-5},
    },
    "commonsense": {
        **_GENERATION,
        "summary": "LLaMA2-7B, a prompt and its response, E 8, K 2, R 32, eta 0.1",
        "rank": 32,
        "eta": 0.1,
        "max_length": 512,
        "target_modules": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
        "learning_rates": {"goat": 1e-4},
    },
}
