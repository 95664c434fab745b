"""Training steps of whole transformers models with random weights: a Llama and a ViT, each adapted in several ways.

A step is forward, loss, backward and an AdamW update. The base of the ratios is the frozen model: forward, loss, and
the gradient of its inputs, which any adapter needs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from bench.cases import FORMS, BenchSettings, Case
from bench.layers import BALANCE_COEFFICIENT, why_not
from bench.memory import peak_bytes
from bench.steps import Candidate, measured
from bench.timing import in_words
from goat_kernels.backends import ENVIRONMENT_VARIABLE

FROZEN_MODEL, LORA_MODEL = "frozen model", "PEFT LoRA"

#: Method -> (form of GOAT's residual or None, backend).
METHODS: dict[str, tuple[str | None, str]] = {
    FROZEN_MODEL: (None, "torch"),
    LORA_MODEL: (None, "torch"),
    **{f"GOAT {form}, {backend}": (form, backend) for backend in ("triton", "torch") for form in FORMS},
}


@dataclass(frozen=True)
class ModelCase:
    """One model.

    Attributes:
        name: "llama" or "vit".
        sizes: keywords of its configuration.
        batch: sequences or images in a step.
        length: tokens of a sequence; 0 for images.
        rank: R of every adapter.
    """

    name: str
    sizes: dict[str, int]
    batch: int
    length: int
    rank: int

    def layers(self) -> tuple[Case, ...]:
        """The shapes of its linear layers, but for a head."""
        hidden, wide = self.sizes["hidden_size"], self.sizes["intermediate_size"]
        length = self.length or (self.sizes["image_size"] // self.sizes["patch_size"]) ** 2 + 1
        shapes = ((hidden, hidden), (hidden, wide), (wide, hidden))
        return tuple(Case(self.batch * length, N, M, self.rank) for N, M in shapes)

    def row(self) -> dict:
        """The fields of a result that say which model it was."""
        of_model = {"model": self.name, **self.sizes, "batch": self.batch, "length": self.length}
        return {**of_model, "R": self.rank, "E": Case.E, "K": Case.K}


def _model(name: str, widths: tuple[int, int, int, int], batch: int, length: int, rank: int, **sizes) -> ModelCase:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return ModelCase(name, dict(zip(names, widths, strict=True)) | sizes, batch, length, rank)


#: On a GPU eight layers of a Llama of 2048 and a ViT-B/32; on a CPU small ones of the same build.
MODELS = {
    "quick": (
        _model("llama", (32, 80, 1, 2), batch=2, length=8, rank=8, vocab_size=64),
        _model("vit", (32, 128, 1, 2), batch=2, length=0, rank=8, image_size=16, patch_size=8),
    ),
    "cpu": (
        _model("llama", (256, 672, 4, 4), batch=4, length=128, rank=32, vocab_size=1024),
        _model("vit", (192, 768, 4, 3), batch=16, length=0, rank=8, image_size=64, patch_size=8),
    ),
    "cuda": (
        _model("llama", (2048, 5456, 8, 16), batch=4, length=2048, rank=32, vocab_size=32000),
        _model("vit", (768, 3072, 12, 12), batch=64, length=0, rank=8, image_size=224, patch_size=32),
    ),
}


def _build(case: ModelCase, settings: BenchSettings) -> nn.Module:
    """The pretrained model: random weights, the same for every method."""
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    if case.name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**case.sizes, use_cache=False))
    else:
        model = ViTForImageClassification(ViTConfig(**case.sizes, num_labels=10))
    return model.to(settings.device, settings.dtype).requires_grad_(False)


def _batch(case: ModelCase, settings: BenchSettings) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if case.length:
        tokens = torch.randint(case.sizes["vocab_size"], (case.batch, case.length), generator=generator)
        return {"input_ids": tokens.to(settings.device), "labels": tokens.to(settings.device)}
    size = case.sizes["image_size"]
    pixels = torch.randn(case.batch, 3, size, size, generator=generator)
    labels = torch.randint(10, (case.batch,), generator=generator)
    return {"pixel_values": pixels.to(settings.device, settings.dtype), "labels": labels.to(settings.device)}


def _adapted(model: nn.Module, name: str, case: ModelCase) -> nn.Module:
    """``model`` with the adapters of the method called ``name``."""
    if name == FROZEN_MODEL:
        model.enable_input_require_grads()
        return model
    from peft import LoraConfig, get_peft_model

    from goat_kernels.peft import GoatConfig

    common = {"r": case.rank, "target_modules": "all-linear"}
    if name == LORA_MODEL:
        return get_peft_model(model, LoraConfig(**common, init_lora_weights=False))
    experts = {"num_experts": Case.E, "top_k": Case.K, "balance_coefficient": BALANCE_COEFFICIENT}
    return get_peft_model(model, GoatConfig(**common, **experts, residual=METHODS[name][0], init_weights=False))


def _on(backend: str):
    """PEFT's layers choose their backend at every call: ``backend`` inside the block, whatever the environment says."""
    return mock.patch.dict(os.environ, {ENVIRONMENT_VARIABLE: backend})


def model_rows(case: ModelCase, settings: BenchSettings) -> Iterator[dict]:
    """One row for each method: time of a step, tokens or images per second, peak memory of a step."""
    batch, candidates = _batch(case, settings), []
    for name, (_, backend) in METHODS.items():
        row = {"mode": "training step", "contender": name}
        reason = why_not(backend, settings.device, settings.dtype)
        if reason is not None:
            yield {**row, "skipped": reason}
            continue
        try:
            candidates.append(_candidate(row, case, batch, settings))
        except Exception as failure:  # whatever a peer or a driver raises is a result, and others follow
            yield {**row, "failed": in_words(failure)}
    for row in measured(candidates, 1, settings):
        if "time_ms_p50" in row:
            unit = "tokens_per_s" if case.length else "images_per_s"
            row[unit] = case.batch * max(case.length, 1) / row["time_ms_p50"] * 1e3
        yield row


def _candidate(row: dict, case: ModelCase, batch: dict[str, Tensor], settings: BenchSettings) -> Candidate:
    """The method's model, whose step gives the loss from before its update."""
    residual, backend = METHODS[row["contender"]]
    model = _adapted(_build(case, settings), row["contender"], case).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-6) if parameters else None

    def step() -> Tensor:
        with _on(backend):
            loss = model(**batch).loss
            loss.backward()
            if optimiser is not None:
                optimiser.step()
                optimiser.zero_grad()
        return loss

    def error(_: int, loss: Tensor) -> float:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            return float("nan")
        return float((loss.double() - expected).abs() / expected.abs())

    step()  # after which the optimiser's state is there
    row["trainable_parameters"] = sum(parameter.numel() for parameter in parameters)
    row["peak_mib"] = round(peak_bytes(step, settings.device) / 2**20, 3)
    expected = _exact_loss(model, batch)
    ratios = {"ratio": FROZEN_MODEL} | ({"lora_ratio": LORA_MODEL} if residual else {})
    return Candidate(row, lambda copy: step, error, ratios=ratios)


@torch.no_grad()
def _exact_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of the same model in float64."""
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    with _on("torch"):
        return copy.deepcopy(model).double()(**doubled).loss
