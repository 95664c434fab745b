"""Tiny transformers models with random weights, one per architecture that the tuner must work on."""

from __future__ import annotations

import torch
import transformers

VOCABULARY = 96


def tiny_llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def tiny_gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def tiny_bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    )


def tiny_vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    )


def tiny_clip():
    torch.manual_seed(0)
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
            projection_dim=16,
        )
    )


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "vit": tiny_vit, "clip": tiny_clip}

#: What a GoatConfig needs to know of each. PEFT leaves a causal model's output layer out of "all-linear" by itself;
#: a classifier's, with three outputs, is too small for eight ranks and trains whole.
TARGETS = {
    "llama": {"task_type": "CAUSAL_LM"},
    "gpt2": {"task_type": "CAUSAL_LM"},
    "bert": {"task_type": "SEQ_CLS"},
    "vit": {"exclude_modules": ["classifier"], "modules_to_save": ["classifier"]},
    "clip": {},
}


def tokens(rows: int = 4, columns: int = 12, seed: int = 1) -> torch.Tensor:
    """int64 [rows, columns], without the padding token."""
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def batch(name: str, rows: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs, with labels where the model computes a loss from them."""
    generator = torch.Generator().manual_seed(seed)
    if name in ("llama", "gpt2"):
        ids = tokens(rows, seed=seed)
        return {"input_ids": ids, "labels": ids}
    labels = torch.randint(0, 3, (rows,), generator=generator)
    if name == "bert":
        return {"input_ids": tokens(rows, seed=seed), "labels": labels}
    images = torch.randn(rows, 3, 16, 16, generator=generator)
    return {"pixel_values": images} if name == "clip" else {"pixel_values": images, "labels": labels}


def loss_of(outputs) -> torch.Tensor:
    """The model's own loss, or for a model without one the mean square of its features."""
    loss = getattr(outputs, "loss", None)
    return outputs.last_hidden_state.square().mean() if loss is None else loss


def outputs_of(outputs) -> torch.Tensor:
    return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
