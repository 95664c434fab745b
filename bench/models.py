"""Training steps of whole transformers models with random weights: a Llama and a ViT, each adapted in several ways.

A step is forward, loss, backward and an AdamW update. The base of the ratios is the frozen model: forward, loss, and
the gradient of its inputs, which any adapter needs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.cases import FORMS, BenchSettings, Case
from bench.layers import BALANCE_COEFFICIENT, why_not
from bench.memory import peak_bytes
from bench.steps import Candidate, measured
from bench.timing import in_words
from goat_kernels.backends import BACKEND_NAMES, ENVIRONMENT_VARIABLE
from goat_kernels.numerics import TOLERANCES

FROZEN_MODEL, LORA_MODEL = "frozen model", "PEFT LoRA"

_NUM_EXPERTS, _TOP_K = Case.E, Case.K

_LIGER = "liger_kernel"


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

    def row(self) -> dict:
        """The fields of a result that say which model it was."""
        of_model = {"model": self.name, **self.sizes, "batch": self.batch, "length": self.length}
        return {**of_model, "R": self.rank, "E": _NUM_EXPERTS, "K": _TOP_K}

    def rate(self, time_ms: float) -> dict:
        """Tokens or images per second."""
        unit = "tokens_per_s" if self.length else "images_per_s"
        return {unit: self.batch * max(self.length, 1) / time_ms * 1e3}


def _llama(hidden: int, layers: int, heads: int, vocabulary: int, batch: int, length: int, rank: int) -> ModelCase:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
    }
    return ModelCase("llama", sizes, batch, length, rank)


def _vit(hidden: int, layers: int, heads: int, image: int, patch: int, batch: int, rank: int) -> ModelCase:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
    }
    return ModelCase("vit", sizes, batch, 0, rank)


def model_cases(device: str, *, quick: bool) -> tuple[ModelCase, ...]:
    """On a GPU eight layers of a Llama of 2048 and a ViT-B/32; on a CPU small ones of the same build."""
    if quick:
        return (_llama(32, 1, 2, 64, 2, 8, 8), _vit(32, 1, 2, 16, 8, 2, 8))
    if device == "cuda":
        return (_llama(2048, 8, 16, 32000, 4, 2048, 32), _vit(768, 12, 12, 224, 32, 64, 8))
    return (_llama(256, 4, 4, 1024, 4, 128, 32), _vit(192, 4, 3, 64, 8, 16, 8))


def model_layers(case: ModelCase) -> tuple[Case, ...]:
    """The shapes of its linear layers, but for a head."""
    hidden, wide = case.sizes["hidden_size"], case.sizes["intermediate_size"]
    length = case.length or (case.sizes["image_size"] // case.sizes["patch_size"]) ** 2 + 1
    shapes = ((hidden, hidden), (hidden, wide), (wide, hidden))
    return tuple(Case(case.batch * length, N, M, case.rank) for N, M in shapes)


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


@dataclass(frozen=True)
class Method:
    """One way to train a model.

    Attributes:
        name: in results.
        adapt: puts adapters into a pretrained one.
        backend: of ours.
        needs: a package without which it is skipped.
    """

    name: str
    adapt: Callable[[nn.Module, ModelCase], nn.Module]
    backend: str | None = None
    needs: str = "transformers"

    def skipped_reason(self, case: ModelCase, settings: BenchSettings) -> str | None:
        if self.needs == _LIGER and (settings.device.type != "cuda" or case.name != "llama"):
            return f"{_LIGER} has kernels for a Llama on a GPU"
        return why_not(self.needs, self.backend, settings.device, settings.dtype)


def _lora(model: nn.Module, case: ModelCase) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=case.rank, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def _lora_with_liger(model: nn.Module, case: ModelCase) -> nn.Module:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(rope=False, model=model)  # its rope is exchanged in models that are built already, too
    return _lora(model, case)


def _goat(residual: str) -> Callable[[nn.Module, ModelCase], nn.Module]:
    def adapt(model: nn.Module, case: ModelCase) -> nn.Module:
        from peft import get_peft_model

        from goat_kernels.peft import GoatConfig

        config = GoatConfig(
            r=case.rank,
            num_experts=_NUM_EXPERTS,
            top_k=_TOP_K,
            target_modules="all-linear",
            residual=residual,
            balance_coefficient=BALANCE_COEFFICIENT,
            init_weights=False,
        )
        return get_peft_model(model, config)

    return adapt


def methods() -> tuple[Method, ...]:
    """In the order in which they are built."""
    return (
        Method(FROZEN_MODEL, lambda model, case: model),
        Method(LORA_MODEL, _lora),
        *(
            Method(f"GOAT {form}, {backend}", _goat(form), backend=backend)
            for backend in BACKEND_NAMES
            if backend != "auto"
            for form in FORMS
        ),
        # Last: it exchanges classes of transformers, for every model that is built after it.
        Method(f"{LORA_MODEL} with Liger-Kernel", _lora_with_liger, needs=_LIGER),
    )


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    """PEFT's layers pick their backend at every call: ``name`` inside the block, whatever the environment says."""
    before = os.environ.pop(ENVIRONMENT_VARIABLE, None)
    if name is not None:
        os.environ[ENVIRONMENT_VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT_VARIABLE, None)
        if before is not None:
            os.environ[ENVIRONMENT_VARIABLE] = before


def model_rows(case: ModelCase, settings: BenchSettings) -> Iterator[dict]:
    """One row for each method: time of a step, tokens or images per second, peak memory of a step."""
    common = {**case.row(), "mode": "training step", **settings.dtypes()}
    batch, candidates = _batch(case, settings), []
    for method in methods():
        row = {**common, "contender": method.name}
        reason = method.skipped_reason(case, settings)
        if reason is not None:
            yield {**row, "skipped": reason}
            continue
        try:
            candidates.append(_candidate(row, method, case, batch, settings))
        except Exception as failure:  # whatever a peer or a driver raises is a result, and others follow
            yield {**row, "failed": in_words(failure)}
    for row in measured(candidates, 1, settings, case.name):
        yield row | (case.rate(row["time_ms_p50"]) if "time_ms_p50" in row else {})


def _candidate(
    row: dict, method: Method, case: ModelCase, batch: dict[str, Tensor], settings: BenchSettings
) -> Candidate:
    """The method's model, whose step gives the loss from before its update."""
    model = method.adapt(_build(case, settings), case).train()
    if method.name == FROZEN_MODEL:
        model.enable_input_require_grads()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-6) if parameters else None
    expected = _exact_loss(model, batch)

    def step() -> Tensor:
        with _backend(method.backend):
            loss = model(**batch).loss
            loss.backward()
            if optimiser is not None:
                optimiser.step()
                optimiser.zero_grad()
        return loss

    def further(_) -> dict:
        """Of a model that has made a step: the optimiser's state is there."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            raise RuntimeError("a gradient is not finite")
        return {
            "trainable_parameters": sum(parameter.numel() for parameter in parameters),
            "peak_mib": round(peak_bytes(step, settings.device) / 2**20, 3),
        }

    return Candidate(
        row,
        lambda copy: step,
        lambda _, loss: float((loss.double() - expected).abs() / expected.abs()),
        TOLERANCES[settings.dtype].relative,
        ratios={"ratio": FROZEN_MODEL} | ({"lora_ratio": LORA_MODEL} if method.backend is not None else {}),
        further=further,
    )


@torch.no_grad()
def _exact_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of the same model in float64."""
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    with _backend("torch"):
        return copy.deepcopy(model).double()(**doubled).loss
