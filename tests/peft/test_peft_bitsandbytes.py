"""GOAT on bitsandbytes bases: SVD of the dequantised weight, exact disable, gradients, save and load."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from goat_kernels import GoatConfig
from goat_kernels.numerics import relative_error

bnb = pytest.importorskip("bitsandbytes")

TOKENS = torch.arange(32).reshape(2, 16) % 64


def _quantise(linear: nn.Linear, bits: int) -> nn.Module:
    N, M = linear.in_features, linear.out_features
    if bits == 4:
        layer = bnb.nn.Linear4bit(N, M, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    else:
        layer = bnb.nn.Linear8bitLt(N, M, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
    return layer


@pytest.fixture(params=[4, 8], ids=["4bit", "8bit"])
def quantised_llama(request):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _quantise(module, request.param))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = request.param == 4, request.param == 8
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with torch.no_grad():
        model(TOKENS)  # an 8-bit layer changes its state at its first forward
    return model


def test_quantised_base(quantised_llama, tmp_path):
    base = quantised_llama
    with torch.no_grad():
        expected = base(TOKENS).logits
    config = GoatConfig(r=8, num_experts=4, top_k=4, target_modules="all-linear", balance_coefficient=0.0)
    model = get_peft_model(copy.deepcopy(base), config)

    # With all gates at 1/E the layers are the quantised ones, to the rounding of bfloat16.
    routers = [p for name, p in model.named_parameters() if "goat_router" in name]
    assert len(routers) == 7
    saved = [p.detach().clone() for p in routers]
    with torch.no_grad():
        for router in routers:
            router.zero_()
        assert relative_error(model(TOKENS).logits, expected) < torch.finfo(torch.bfloat16).eps
        for router, value in zip(routers, saved, strict=True):
            router.copy_(value)
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, expected)

    model(TOKENS, labels=TOKENS).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("goat_" in name for name in trained)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in trained.values())

    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS).logits, reloaded.eval()(TOKENS).logits)
