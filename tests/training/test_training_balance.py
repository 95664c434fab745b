"""The balance loss reaches any trainer: gradients equal those of a loss with the balance losses written into it."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle

import pytest
import torch
import transformers
from peft import get_peft_model
from peft_tiny_models import MODELS, TARGETS, batch, tokens
from torch import nn

import goat_kernels.adapter as layer_module
from goat_kernels.peft import GoatConfig
from goat_kernels.training import GoatCallback, balance_scales

COEFFICIENT = 0.5  # large, so that a wrong scale shows far above rounding


def goat_model(name, **changes):
    values = {"r": 8, "num_experts": 4, "target_modules": "all-linear", "balance_coefficient": COEFFICIENT}
    model = MODELS[name]()
    torch.manual_seed(3)
    return get_peft_model(model, GoatConfig(**{**values, **TARGETS[name], **changes})).train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "goat_" in name}


@contextlib.contextmanager
def written_out(monkeypatch):
    """Within it nothing is injected; the yielded list collects the weighted balance losses of each forward."""
    losses = []
    real = layer_module.routed_linear

    def recording(*args, balance_coefficient, balance_scale, **kwargs):
        routed = real(*args, balance_coefficient=0.0, balance_scale=None, **kwargs)
        losses.append(COEFFICIENT * routed.balance_loss)
        return routed

    with monkeypatch.context() as patch:
        patch.setattr(layer_module, "routed_linear", recording)
        yield losses


def reference_gradients(model, batches, monkeypatch, weights=None, factor=1.0):
    """Gradients of the mean over ``batches`` of task loss + sum of balance losses, with plain autograd."""
    weights = weights or [1 / len(batches)] * len(batches)
    model.zero_grad()
    with written_out(monkeypatch) as losses:
        for inputs, weight in zip(batches, weights, strict=True):
            losses.clear()
            loss = model(**inputs).loss
            (factor * weight * (loss + sum(losses))).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def assert_equal_gradients(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("name", ["llama", "vit", "gpt2", "bert"])
def test_plain_loop(name, monkeypatch):
    model = goat_model(name)
    inputs = batch(name)
    expected = reference_gradients(model, [inputs], monkeypatch)
    model(**inputs).loss.backward()
    assert_equal_gradients(gradients(model), expected)
    without = goat_model(name, balance_coefficient=0.0)
    without.load_state_dict(model.state_dict())
    without(**inputs).loss.backward()
    router = next(name for name in expected if name.endswith(".router"))
    assert (gradients(without)[router] - expected[router]).norm() > 0.01 * expected[router].norm()


@pytest.mark.parametrize("factor", [65536.0, 0.25])
def test_follows_what_the_loss_is_multiplied_by(factor, monkeypatch):
    model = goat_model("llama")
    expected = reference_gradients(model, [batch("llama")], monkeypatch, factor=factor)
    (factor * model(**batch("llama")).loss).backward()
    assert_equal_gradients(gradients(model), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing(use_reentrant, dropout, monkeypatch):
    model = goat_model("llama", lora_dropout=dropout)
    torch.manual_seed(5)
    expected = reference_gradients(model, [batch("llama")], monkeypatch, factor=3.0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    (3.0 * model(**batch("llama"), use_cache=False).loss).backward()
    assert_equal_gradients(gradients(model), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_around_the_whole_model(use_reentrant, monkeypatch):
    model = goat_model("vit")
    inputs = batch("vit")
    expected = reference_gradients(model, [inputs], monkeypatch, factor=3.0)
    pixels = inputs["pixel_values"].requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(
        lambda pixels: model(pixel_values=pixels, labels=inputs["labels"]).loss, pixels, use_reentrant=use_reentrant
    )
    (3.0 * loss).backward()
    assert_equal_gradients(gradients(model), expected)


@pytest.mark.long
@pytest.mark.parametrize("parts", ["model", "layers"])
def test_compiled(parts, monkeypatch):
    model = goat_model("llama")
    inputs = batch("llama")
    expected = reference_gradients(model, [inputs], monkeypatch, factor=3.0)
    (7.0 * model(**inputs).loss).backward()  # leaves a scale behind that the compiled step must not use
    model.zero_grad()
    if parts == "model":
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        step = model
        for layer in model.get_base_model().model.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
    (3.0 * step(**inputs).loss).backward()
    assert_equal_gradients(gradients(model), expected)
    torch._dynamo.reset()


@pytest.mark.long
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_is_not_used(compiled, monkeypatch):
    """The model returns a loss, the caller takes its own; a graph then reports a zero gradient for the model's."""
    model = goat_model("llama")
    with written_out(monkeypatch) as losses:
        (model(**batch("llama")).logits.square().mean() + sum(losses)).backward()
    expected = gradients(model)
    model.zero_grad()
    step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    outputs = step(**batch("llama"))
    assert outputs.loss.requires_grad
    outputs.logits.square().mean().backward()
    assert_equal_gradients(gradients(model), expected)
    torch._dynamo.reset()


# --- trainers -----------------------------------------------------------------------------------------------------


class CaptureGradients(transformers.TrainerCallback):
    """Keeps the gradients of each optimiser step."""

    def __init__(self) -> None:
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


def trainer_arguments(folder, accumulation, kind=transformers.TrainingArguments, **changes):
    return kind(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        learning_rate=0.0,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        data_seed=0,
        **changes,
    )


def rows_of(inputs):
    return [{key: value[i] for key, value in inputs.items()} for i in range(len(next(iter(inputs.values()))))]


class InOrder:
    """Mixin: the batches come in the order of the data set."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Trainer(InOrder, transformers.Trainer):
    pass


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_trainer_without_any_user_code(name, accumulation, tmp_path, monkeypatch):
    model = goat_model(name)
    batches = [batch(name, rows=2, seed=i) for i in range(accumulation)]
    expected = reference_gradients(model, batches, monkeypatch)
    capture = CaptureGradients()
    Trainer(
        model,
        trainer_arguments(tmp_path, accumulation, remove_unused_columns=False),
        train_dataset=[row for inputs in batches for row in rows_of(inputs)],
        callbacks=[capture],
    ).train()
    assert_equal_gradients(capture.steps[0], expected)


def test_trainer_weighs_uneven_batches_by_their_tokens(tmp_path, monkeypatch):
    model = goat_model("llama")
    batches = [batch("llama", rows=2, seed=i) for i in range(2)]
    batches[1]["labels"] = batches[1]["labels"].clone()
    batches[1]["labels"][:, :8] = -100
    counts = [inputs["labels"][:, 1:].ne(-100).sum().item() for inputs in batches]
    expected = reference_gradients(model, batches, monkeypatch, weights=[n / sum(counts) for n in counts])
    capture = CaptureGradients()
    Trainer(
        model,
        trainer_arguments(tmp_path, 2, remove_unused_columns=False),
        train_dataset=[row for inputs in batches for row in rows_of(inputs)],
        callbacks=[capture],
    ).train()
    assert_equal_gradients(capture.steps[0], expected)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trl_sft_trainer(accumulation, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="SFTTrainer is part of TRL")
    datasets = pytest.importorskip("datasets", reason="SFTTrainer takes its data as a datasets.Dataset")
    model = goat_model("llama")
    batches = [tokens(2, seed=i) for i in range(accumulation)]
    expected = reference_gradients(model, [{"input_ids": ids, "labels": ids} for ids in batches], monkeypatch)

    class SFTTrainer(InOrder, trl.SFTTrainer):
        pass

    capture = CaptureGradients()
    callback = GoatCallback()
    arguments = trainer_arguments(
        tmp_path, accumulation, trl.SFTConfig, max_length=None, gradient_checkpointing=False, bf16=False
    )
    SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": [row.tolist() for ids in batches for row in ids]}),
        processing_class=_tokenizer(tmp_path),
        callbacks=[capture, callback],
    ).train()
    assert_equal_gradients(capture.steps[0], expected)
    assert callback.history[0]["balance_loss"] > 0


def _tokenizer(folder):
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, 96)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )


@pytest.mark.parametrize("where", ["loss", "data", "callback", "begin"])
def test_an_exception_in_training_leaves_no_scale_behind(where, tmp_path):
    """A loop of one's own after a training that failed counts each balance loss once, not as that trainer did."""

    class StoppedError(Exception):
        pass

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            if where == "data" and i == 5:
                raise StoppedError
            return {key: value[0] for key, value in batch("llama", seed=i).items()}

    class Callback(transformers.TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            if where == "callback":
                raise StoppedError

        def on_epoch_begin(self, *args, **kwargs):
            if where == "begin":
                raise StoppedError

    class Trainer(InOrder, transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            if where == "loss" and self.state.global_step == 1:
                raise StoppedError
            return super().compute_loss(*args, **kwargs)

    model = goat_model("llama")
    arguments = dataclasses.replace(trainer_arguments(tmp_path, 2), max_steps=3, per_device_train_batch_size=1)
    trainer = Trainer(model, arguments, train_dataset=Data(), callbacks=[GoatCallback(), Callback()])
    with pytest.raises(StoppedError):
        trainer.train()
    assert [scale.default for scale in balance_scales(model)] == [1.0]
    assert ("_run_epoch" in vars(trainer)) == (where == "begin")  # no epoch began: the next training puts it back
    assert pickle.loads(pickle.dumps(GoatCallback())).history == []


def test_a_training_that_ends_leaves_the_trainer_as_it_was(tmp_path):
    model = goat_model("llama")
    trainer = Trainer(
        model, trainer_arguments(tmp_path, 2), train_dataset=rows_of(batch("llama")), callbacks=[GoatCallback()]
    )
    for _ in range(2):
        trainer.train()
        assert "_run_epoch" not in vars(trainer)
        assert [scale.default for scale in balance_scales(model)] == [1.0]
