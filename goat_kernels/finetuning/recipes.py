"""What an option is where the command line does not say: by task, and by the paper's recipe for a domain.

``goat-kernels finetune --recipe NAME`` takes the settings of the paper (arXiv 2502.16894) for one of its four domains.
What the paper does not say, or what depends on the data (epochs, batch size), is left to the task.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: The usual rates for pretrained encoders (GOAT: the paper's). A method without an entry takes that of
#: ``Method.rates_of``.
_ENCODER_RATES = {"head": 1e-3, "full": 2e-5, "lora": 2e-4, "goat": 1e-4}

#: ``--task`` -> its defaults. eta is the paper's: 1 for ViT and RoBERTa, 0.1 for Llama at a learning rate of 1e-4.
TASKS: dict[str, dict] = {
    "digits": {
        "methods": "head,full,lora,goat",
        "epochs": 18,
        "batch_size": 32,
        "eta": 1.0,
        # For a tiny model that is trained for a minute.
        "learning_rates": {"head": 2e-2, "full": 1e-3, "lora": 2e-3, "goat": 2e-3},
        # One thread keeps the digits' pace on a busy machine, and their results the same on any number of cores.
        "threads": 1,
    },
    "image-classification": {
        "methods": "lora,goat",
        "epochs": 3,
        "batch_size": 16,
        "eta": 1.0,
        "learning_rates": _ENCODER_RATES,
    },
    "text-classification": {
        "methods": "lora,goat",
        "epochs": 3,
        "batch_size": 16,
        "eta": 1.0,
        "learning_rates": _ENCODER_RATES,
    },
    "causal-lm": {
        "methods": "lora,goat",
        "epochs": 1,
        "batch_size": 4,
        "eta": 0.1,
        "learning_rates": {"full": 1e-5, "lora": 1e-4, "goat": 1e-4},
    },
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one domain.

    Attributes:
        summary: one line for the help text.
        task: a key of ``TASKS``.
        options: fields of ``FinetuneOptions``; never which data.
        learning_rates: method -> learning rate.
    """

    summary: str
    task: str
    options: dict[str, object] = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)


#: The paper's dropout, in all four domains.
_DROPOUT = 0.05

_ATTENTION = ("q_proj", "k_proj", "v_proj")

#: LLaMA2-7B on a prompt and its response.
_LLAMA = {
    "model": "meta-llama/Llama-2-7b-hf",
    "text_column": "prompt,response",
    "dtype": "bfloat16",
    "dropout": _DROPOUT,
}

RECIPES: dict[str, Recipe] = {
    "image": Recipe(
        summary="CLIP ViT-B/32, E 8, K 2, R 8",
        task="image-classification",
        options={"model": "openai/clip-vit-base-patch32", "rank": 8, "eta": 1.0, "dropout": _DROPOUT},
        learning_rates={"goat": 1e-4},
    ),
    "glue": Recipe(
        summary="RoBERTa-large, E 8, K 2, R 32",
        task="text-classification",
        options={"model": "FacebookAI/roberta-large", "rank": 32, "eta": 1.0, "dropout": _DROPOUT},
        learning_rates={"goat": 1e-4},
    ),
    "nlg": Recipe(
        summary="LLaMA2-7B, a prompt and its response, E 8, K 2, R 8",
        task="causal-lm",
        options={
            **_LLAMA,
            "rank": 8,
            "eta": 1.0,
            "max_length": 1024,
            "target_modules": (*_ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj"),
        },
        learning_rates={"goat": 2e-5},
    ),
    "commonsense": Recipe(
        summary="LLaMA2-7B, a prompt and its response, E 8, K 2, R 32, eta 0.1",
        task="causal-lm",
        options={
            **_LLAMA,
            "rank": 32,
            "eta": 0.1,
            "max_length": 512,
            "target_modules": (*_ATTENTION, "up_proj", "down_proj"),
        },
        learning_rates={"goat": 1e-4},
    ),
}
