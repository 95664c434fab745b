"""Tiny transformers models with random weights, saved as folders, in place of the hub's that PEFT's tests load.

PEFT's tests skip some methods by a model's name: a GPT-2 under another name is not skipped. PEFT's inputs consist of
the tokens 1 and 2, so neither may be the padding token.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from peft import LoraConfig

_TEXT = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 4}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_TEXT,
}
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    **_TEXT,
}

#: kind -> folder -> class, its configuration
_MODELS = {
    "decoder": {
        "tiny-random-LlamaForCausalLM": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**_LLAMA)),
        "tiny-random-OPTForCausalLM": (
            transformers.OPTForCausalLM,
            transformers.OPTConfig(
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                word_embed_proj_dim=32,
                **_TEXT,
            ),
        ),
        "tiny-random-Conv1DLMHeadModel": (
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **_TEXT),
        ),
        "tiny-dummy-qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**_LLAMA)),
    },
    "encoder_decoder": {
        "tiny-random-T5ForConditionalGeneration": (
            transformers.T5ForConditionalGeneration,
            transformers.T5Config(
                vocab_size=99,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                pad_token_id=0,
                eos_token_id=4,
                decoder_start_token_id=0,
            ),
        ),
        "tiny-random-BartForConditionalGeneration": (
            transformers.BartForConditionalGeneration,
            transformers.BartConfig(
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_position_embeddings=64,
                decoder_start_token_id=4,
                forced_eos_token_id=4,
                **_TEXT,
            ),
        ),
    },
    "encoder": {
        "tiny-random-BertModel": (transformers.BertModel, transformers.BertConfig(**_BERT)),
        "tiny-random-RobertaModel": (transformers.RobertaModel, transformers.RobertaConfig(**_BERT)),
    },
    "classifier": {
        "tiny-random-BertForSequenceClassification": (
            transformers.BertForSequenceClassification,
            transformers.BertConfig(**_BERT),
        ),
        "tiny-random-RobertaForSequenceClassification": (
            transformers.RobertaForSequenceClassification,
            transformers.RobertaConfig(**_BERT),
        ),
    },
    "causal_classifier": {
        "tiny-LlamaForSequenceClassification": (
            transformers.LlamaForSequenceClassification,
            transformers.LlamaConfig(**_LLAMA),
        ),
    },
}


def local_models(folder: Path) -> dict[str, list[str]]:
    """kind -> paths of its models in ``folder``, made where they are missing; "lora_adapter": a configuration alone."""
    found = {}
    for kind, models in _MODELS.items():
        found[kind] = []
        for name, (model_class, config) in models.items():
            path = folder / name
            if not (path / "config.json").exists():
                torch.manual_seed(0)
                model_class(config).save_pretrained(path)
            found[kind].append(str(path))
    adapter = folder / "tiny-lora-adapter"
    LoraConfig(target_modules=["q_proj"]).save_pretrained(str(adapter))
    return {**found, "lora_adapter": [str(adapter)]}
