"""Under real trainers the gradients equal, to 1e-6, those of a loss with the balance loss written into it by hand.

Everything is float64 but what the models themselves compute in float32 (rotary embeddings, norms, the loss). The
reference never calls the package's balance loss: it is computed here from each layer's input.
"""

from __future__ import annotations

import datasets
import pytest
import torch
import transformers
import trl
from peft import get_peft_model
from peft_tiny_models import MODELS, TARGETS, VOCABULARY, batch, tokens
from two_processes import needs_gloo, run_two

from goat_kernels.peft import GoatConfig, GoatLinearLayer
from goat_kernels.training import GoatCallback

COEFFICIENT = 0.5  # large, so that a wrong scale shows far above rounding
TOLERANCE = 1e-6
EXPERTS, TOP_K = 4, 2


def goat_model(name="llama", **changes):
    values = {"r": 8, "num_experts": EXPERTS, "top_k": TOP_K, "target_modules": "all-linear", **TARGETS[name]}
    model = MODELS[name]().double()
    torch.manual_seed(3)
    return get_peft_model(model, GoatConfig(**{**values, "balance_coefficient": COEFFICIENT, **changes})).train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "goat_" in name}


def padded(ids: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    """A batch [rows, columns] whose rows end after ``lengths`` tokens, as a collator pads it."""
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


def uneven_batches(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of two rows with different numbers of tokens; the first row of each is full."""
    return [padded(tokens(2, 10, seed=seed + i), [10, 3 + (5 * i + seed) % 7]) for i in range(count)]


def targets(inputs) -> int:
    return inputs["labels"][:, 1:].ne(-100).sum().item()


# --- the reference ------------------------------------------------------------------------------------------------


def balance_loss(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """E * sum_i f_i P_i of x [..., N] with router [E, N]; gradient through P alone.

    Of equal logits the lower index wins. That happens: Llama's padding token has a zero embedding.
    """
    probs_TE = torch.softmax(x.reshape(-1, x.shape[-1]) @ router.T, dim=1)
    chosen_TE = torch.zeros_like(probs_TE).scatter(
        1, probs_TE.argsort(dim=1, descending=True, stable=True)[:, :TOP_K], 1.0
    )
    return EXPERTS * (chosen_TE.mean(0) * probs_TE.mean(0)).sum()


class ByHand:
    """Within it the layers inject nothing, and ``losses`` holds the balance loss of each layer that ran."""

    def __init__(self, model) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, GoatLinearLayer)]
        self.losses = []

    def __enter__(self):
        for layer in self.layers:
            layer.goat_adapter["default"].balance_coefficient = 0.0
        self.handles = [layer.register_forward_pre_hook(self._record) for layer in self.layers]
        return self

    def _record(self, layer, args):
        self.losses.append(balance_loss(args[0], layer.goat_adapter["default"].router))

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            layer.goat_adapter["default"].balance_coefficient = COEFFICIENT


def model_loss(model, inputs):
    return model(**inputs).loss


def reference(model, batches, task_weights, balance_weights, *, loss=model_loss, factor=1.0):
    """Gradients of factor * (sum of w task loss + sum of v balance loss) over the batches."""
    model.zero_grad()
    with ByHand(model) as by_hand:
        for inputs, w, v in zip(batches, task_weights, balance_weights, strict=True):
            by_hand.losses.clear()
            task = loss(model, inputs)
            (factor * (w * task + v * COEFFICIENT * sum(by_hand.losses))).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def by_tokens(batches) -> list[float]:
    counts = [targets(inputs) for inputs in batches]
    return [count / sum(counts) for count in counts]


def evenly(batches) -> list[float]:
    return [1 / len(batches)] * len(batches)


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < TOLERANCE, f"{name}: relative error {error:.2e}"


# --- the trainers -------------------------------------------------------------------------------------------------


class CaptureGradients(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


class InOrder:
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Trainer(InOrder, transformers.Trainer):
    pass


class SFTTrainer(InOrder, trl.SFTTrainer):
    pass


def arguments(folder, accumulation, kind=transformers.TrainingArguments, checkpointing=None, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": 0.0,
        "learning_rate": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "ddp_broadcast_buffers": False,
        "gradient_checkpointing": checkpointing is not None,
        "gradient_checkpointing_kwargs": None
        if checkpointing is None
        else {"use_reentrant": checkpointing == "reentrant"},
    }
    return kind(**{**values, **changes})


def transformers_trainer(model, batches, accumulation, folder, callbacks=(), **changes):
    """A Trainer over the batches, and the callback that keeps its gradients."""
    trainer_options = {key: changes.pop(key) for key in ("compute_loss_func",) if key in changes}
    capture = CaptureGradients()
    trainer = Trainer(
        model,
        arguments(folder, accumulation, remove_unused_columns=False, **changes),
        train_dataset=[{key: value[i] for key, value in b.items()} for b in batches for i in range(2)],
        callbacks=[capture, *callbacks],
        **trainer_options,
    )
    return trainer, capture


def sft_trainer(model, batches, accumulation, folder, **changes):
    rows = [
        row[mask == 1].tolist() for b in batches for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    capture = CaptureGradients()
    trainer = SFTTrainer(
        model,
        arguments(folder, accumulation, trl.SFTConfig, max_length=None, bf16=False, shuffle_dataset=False, **changes),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer(),
        callbacks=[capture, GoatCallback()],
    )
    return trainer, capture


def tokenizer():
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )


#: What one step of each trainer is the gradient of: its task loss weighs the batches by their tokens. The balance
#: loss follows the task loss where it is seen, and is a mean over the batches where it is not (as TRL's own aux_loss).
TRAINERS = {"Trainer": (transformers_trainer, by_tokens), "SFTTrainer": (sft_trainer, evenly)}
CHECKPOINTING = [None, "reentrant", "not reentrant"]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", TRAINERS)
def test_the_gradient_is_exact(kind, accumulation, checkpointing, tmp_path):
    build, balance_weights = TRAINERS[kind]
    model, batches = goat_model(), uneven_batches(accumulation)
    expected = reference(model, batches, by_tokens(batches), balance_weights(batches))
    trainer, capture = build(model, batches, accumulation, tmp_path, checkpointing=checkpointing)
    trainer.train()
    assert_equal_gradients(capture.steps[0], expected)
    assert len({name.rpartition(".goat_")[0] for name in expected}) == 14
    assert any("goat_adapter.default.router" in name for name in expected)


@pytest.mark.parametrize("kind", TRAINERS)
def test_float16_loss_scaling(kind, tmp_path):
    build, balance_weights = TRAINERS[kind]
    model, batches = goat_model(), uneven_batches(2)
    expected = reference(model, batches, by_tokens(batches), balance_weights(batches), factor=3000.0)
    trainer, capture = build(model, batches, 2, tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=3000.0)  # as accelerate has it on a GPU
    trainer.train()
    assert_equal_gradients(capture.steps[0], expected)


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_epoch_that_ends_within_an_accumulation(kind, tmp_path):
    build, balance_weights = TRAINERS[kind]
    model, batches = goat_model(), uneven_batches(3)
    parts = [batches[:2], batches[2:]]
    expected = [reference(model, part, by_tokens(part), balance_weights(part)) for part in parts * 2]
    trainer, capture = build(model, batches, 2, tmp_path, max_steps=4)
    trainer.train()
    for found, gradient in zip(capture.steps, expected, strict=True):
        assert_equal_gradients(found, gradient)


#: Accumulated batches, and what transformers 5.23 multiplies the task loss by: for GPT-2 it counts the first label of
#: each row as a target, for BERT it does not divide by the accumulated batches at all.
QUIRKS = {"vit": (2, 1.0), "gpt2": (2, 11 / 12), "bert": (2, 2.0)}


@pytest.mark.parametrize("name", QUIRKS)
def test_other_architectures(name, tmp_path):
    accumulation, task_factor = QUIRKS[name]
    model, batches = goat_model(name), [batch(name, rows=2, seed=i) for i in range(accumulation)]
    for inputs in batches:
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = reference(model, batches, [task_factor * w for w in evenly(batches)], evenly(batches))
    trainer, capture = transformers_trainer(model, batches, accumulation, tmp_path)
    trainer.train()
    assert_equal_gradients(capture.steps[0], expected)


def test_a_loss_of_the_users_own_needs_the_callback(tmp_path):
    def of_logits(model, inputs):
        return model(**{key: value for key, value in inputs.items() if key != "labels"}).logits.square().mean()

    def compute_loss_func(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().mean() / 4

    model, batches = goat_model(), uneven_batches(4)
    expected = reference(model, batches, evenly(batches), evenly(batches), loss=of_logits)
    options = {"compute_loss_func": compute_loss_func}
    trainer, capture = transformers_trainer(model, batches, 4, tmp_path, callbacks=[GoatCallback()], **options)
    trainer.train()
    assert_equal_gradients(capture.steps[0], expected)


# --- two processes ------------------------------------------------------------------------------------------------


def batches_of_rank(rank: int) -> list[dict[str, torch.Tensor]]:
    return uneven_batches(2, seed=100 * rank)


def save_gradients_of_one_rank(rank: int, folder: str) -> None:
    found = {}
    for kind, (build, _) in TRAINERS.items():
        # The trainers deal the batches of the data set out in turn: rank 0, rank 1, rank 0, ...
        dealt = [b for pair in zip(batches_of_rank(0), batches_of_rank(1), strict=True) for b in pair]
        trainer, capture = build(goat_model(), dealt, 2, f"{folder}/{kind}{rank}")
        trainer.train()
        assert trainer.accelerator.num_processes == 2
        found[kind] = capture.steps[0]
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.long
@needs_gloo
def test_two_processes(tmp_path):
    run_two(save_gradients_of_one_rank, tmp_path)
    model = goat_model()
    batches = batches_of_rank(0) + batches_of_rank(1)
    for kind, (_, balance_weights) in TRAINERS.items():
        expected = reference(model, batches, by_tokens(batches), balance_weights(batches))
        for rank in range(2):
            assert_equal_gradients(torch.load(tmp_path / f"{rank}.pt")[kind], expected)
