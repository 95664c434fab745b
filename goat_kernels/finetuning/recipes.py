"""What an option is where the command line does not say: by task, and by the paper's recipe for a domain.

``goat-kernels finetune --recipe NAME`` takes the settings of the paper (arXiv 2502.16894) for one of its four domains.
What the paper does not say, or what depends on the data (epochs, batch size), is left to the task.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Recipe:
    """Settings of one domain.

    Attributes:
        task: a key of ``TASKS``.
        summary: for the help text.
        options: fields of ``FinetuneOptions``; never which data.
        learning_rates: method -> learning rate.
    """

    task: str
    summary: str = ""
    options: dict[str, object] = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)


_CLIP, _ROBERTA, _LLAMA = "openai/clip-vit-base-patch32", "FacebookAI/roberta-large", "meta-llama/Llama-2-7b-hf"

#: In all four domains.
_PAPER = {"eta": 1.0, "dropout": 0.05}

#: A language model on a prompt and its response.
_GENERATION = {**_PAPER, "model": _LLAMA, "text_column": "prompt,response", "dtype": "bfloat16"}

_NLG_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_COMMONSENSE_MODULES = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

RECIPES: dict[str, Recipe] = {
    "image": Recipe(
        "image-classification", "CLIP ViT-B/32, E 8, K 2, R 8", {**_PAPER, "model": _CLIP, "rank": 8}, {"goat": 1e-4}
    ),
    "glue": Recipe(
        "text-classification",
        "RoBERTa-large, E 8, K 2, R 32",
        {**_PAPER, "model": _ROBERTA, "rank": 32},
        {"goat": 1e-4},
    ),
    "nlg": Recipe(
        "causal-lm",
        "LLaMA2-7B, a prompt and its response, E 8, K 2, R 8",
        {**_GENERATION, "rank": 8, "max_length": 1024, "target_modules": _NLG_MODULES},
        {"goat": 2e-5},
    ),
    "commonsense": Recipe(
        "causal-lm",
        "LLaMA2-7B, a prompt and its response, E 8, K 2, R 32, eta 0.1",
        {**_GENERATION, "rank": 32, "eta": 0.1, "max_length": 512, "target_modules": _COMMONSENSE_MODULES},
        {"goat": 1e-4},
    ),
}
