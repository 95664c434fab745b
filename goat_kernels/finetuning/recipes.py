"""The paper's settings for its four domains (arXiv 2502.16894), by name.

A recipe is what ``goat-kernels finetune --recipe NAME`` settles; every option of the command line goes before it. What
the paper does not say (or what depends on the data: epochs, batch size) is left to the command's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from goat_kernels.finetuning.options import AdapterOptions, DataOptions


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one domain.

    Attributes:
        summary: one line for the help text.
        task: one of ``options.TASKS``.
        adapter: GOAT's hyper-parameters.
        training: fields of ``TrainingOptions``.
        rates: method -> learning rate.
        data: the paper's model, and how the data is read; never which data.
    """

    summary: str
    task: str
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    training: dict[str, object] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    data: DataOptions = field(default_factory=DataOptions)


#: The paper's dropout, in all four domains.
_DROPOUT = 0.05

_LLAMA = "meta-llama/Llama-2-7b-hf"

RECIPES: dict[str, Recipe] = {
    "image": Recipe(
        summary="CLIP ViT-B/32, E 8, K 2, R 8",
        task="image-classification",
        adapter=AdapterOptions(rank=8, eta=1.0, dropout=_DROPOUT),
        rates={"goat": 1e-4},
        data=DataOptions(model="openai/clip-vit-base-patch32"),
    ),
    "glue": Recipe(
        summary="RoBERTa-large, E 8, K 2, R 32",
        task="text-classification",
        adapter=AdapterOptions(rank=32, eta=1.0, dropout=_DROPOUT),
        rates={"goat": 1e-4},
        data=DataOptions(model="FacebookAI/roberta-large"),
    ),
    "nlg": Recipe(
        summary="LLaMA2-7B, a prompt and its response, E 8, K 2, R 8",
        task="causal-lm",
        adapter=AdapterOptions(
            rank=8,
            eta=1.0,
            dropout=_DROPOUT,
            target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ),
        training={"dtype": "bfloat16"},
        rates={"goat": 2e-5},
        data=DataOptions(model=_LLAMA, text_column="prompt,response", max_length=1024),
    ),
    "commonsense": Recipe(
        summary="LLaMA2-7B, a prompt and its response, E 8, K 2, R 32, eta 0.1",
        task="causal-lm",
        adapter=AdapterOptions(
            rank=32,
            eta=0.1,
            dropout=_DROPOUT,
            target_modules=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
        ),
        training={"dtype": "bfloat16"},
        rates={"goat": 1e-4},
        data=DataOptions(model=_LLAMA, text_column="prompt,response", max_length=512),
    ),
}
