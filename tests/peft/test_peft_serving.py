"""Habits of serving: generation, compilation, hot-swapping, copies, threads, and models that share nothing."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_tiny_models import batch, tiny_llama, tokens

from goat_kernels.peft import GoatConfig, hotswap_adapter


def config(**changes):
    values = {"r": 8, "num_experts": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    return GoatConfig(**values)


def goat_llama(seed: int = 0, **changes):
    """An adapted model, moved away from its start."""
    model = get_peft_model(tiny_llama(), config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "goat_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model, seed: int = 1):
    with torch.no_grad():
        return model(**batch("llama", seed=seed)).logits


# --- generation and compilation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["path", "fold"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_generation_without(beams, residual):
    model = goat_llama(residual=residual)
    ids = tokens(2, 7)
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(ids)}
    with_cache = model.generate(input_ids=ids, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(input_ids=ids, use_cache=False, **options))
    with model.disable_adapter():
        assert not torch.equal(with_cache, model.generate(input_ids=ids, use_cache=True, **options))


@pytest.mark.long
@pytest.mark.parametrize("changes", [None, {}, {"residual": "fold"}, {"scaling": "goat_s"}], ids=["lora", *"pfs"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.filterwarnings("ignore")
def test_a_whole_model_compiles_as_one_graph(changes, training):
    torch._dynamo.reset()
    adapter = LoraConfig(r=8, target_modules="all-linear") if changes is None else config(**changes)
    model = get_peft_model(tiny_llama(), adapter).train(training)  # compiled before it has run
    outcomes = []
    for run in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        for autocast in (False, True):
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                output = run(**batch("llama"))
            output.loss.backward()
            outcomes.append([output.logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch._dynamo.reset()
    for compiled, eager in zip(outcomes[:2], outcomes[2:], strict=True):
        for found, expected in zip(compiled, eager, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_evaluation_uses_no_state_of_training():
    model = goat_llama(lora_dropout=0.5, balance_coefficient=0.1)
    before, state = logits(model), torch.get_rng_state()
    assert torch.equal(logits(model), before)
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws no random number"
    model.train()
    model(**batch("llama", seed=5)).loss.backward()
    model.eval()
    assert torch.equal(logits(model), before)


# --- hot-swapping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"residual": "fold"}, {"scaling": "goat_s"}], ids=["path", "fold", "goat_s"])
def test_hotswap_gives_the_other_adapters_output_in_the_same_tensors(changes, tmp_path):
    first, second = goat_llama(seed=1, **changes), goat_llama(seed=2, **changes)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first").eval()
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    base = dict(tiny_llama().named_parameters())
    for source, folder in ((second, "second"), (first, "first")):
        hotswap_adapter(model, str(tmp_path / folder))
        assert torch.equal(logits(model), logits(source))
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
    for name, parameter in model.unload().named_parameters():
        assert torch.equal(parameter, base[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 1}, r"it has top_k=1 where the loaded one has 2; load it with load_adapter\(\)"),
        ({"r": 16}, r"of shape \[16, 32\]; \[8, 32\] is needed|it has scaling="),
        ({"eta": 0.5}, r"it has scaling=.* where the loaded one has"),
        ({"target_modules": ["q_proj"]}, r"lacks .* \(\d+ tensors in all\)"),
        ({"lora_dropout": 0.1}, r"it has dropout=0.1 where the loaded one has 0.0"),
    ],
    ids=["top_k", "rank", "scaling", "modules", "dropout"],
)
@pytest.mark.filterwarnings("ignore:top_k=1")
def test_hotswap_refuses_what_computes_differently(changes, message, tmp_path):
    goat_llama(seed=2, **changes).save_pretrained(tmp_path)
    model = goat_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, str(tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_hotswap_names_what_is_missing(tmp_path):
    model = goat_llama()
    with pytest.raises(ValueError, match="adapter_name='other' is not in the model, which has default"):
        hotswap_adapter(model, str(tmp_path), "other")
    get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a LoraConfig adapter; a GOAT one is needed"):
        hotswap_adapter(model, str(tmp_path))


# --- threads, copies, neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["path", "fold"])
def test_threads_get_what_one_gets(residual):
    fresh = goat_llama(residual=residual)
    expected = {seed: logits(copy.deepcopy(fresh), seed) for seed in range(4)}
    for _ in range(5):
        model, wrong = copy.deepcopy(fresh), []
        for layer in model.modules():
            if hasattr(layer, "unfold"):
                layer.unfold()  # the first forward, which folds again, is then raced for
        barrier = threading.Barrier(4)

        def work(seed, model=model, wrong=wrong, barrier=barrier):
            barrier.wait()
            for _ in range(2):
                if not torch.equal(logits(model, seed), expected[seed]):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


@pytest.mark.parametrize("residual", ["path", "fold"])
def test_a_pickled_model_computes_the_same(residual):
    model = goat_llama(residual=residual)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


def train(model, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model(**batch("llama", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_two_models_in_one_process_share_nothing():
    one, other = goat_llama(balance_coefficient=0.1).train(), goat_llama(balance_coefficient=0.1).train()
    untouched, alone = logits(copy.deepcopy(other).eval()), goat_llama(balance_coefficient=0.1).train()
    train(one, 2)
    assert torch.equal(logits(copy.deepcopy(other).eval()), untouched)
    train(other, 2)
    train(alone, 2)
    assert torch.equal(logits(other.eval()), logits(alone.eval())), "as if the first had never trained"
    mine = {p.untyped_storage().data_ptr() for p in (*one.parameters(), *one.buffers()) if p.numel()}
    assert not mine & {p.untyped_storage().data_ptr() for p in (*other.parameters(), *other.buffers()) if p.numel()}


def test_layers_of_several_dtypes_work_together():
    model = goat_llama()
    layers = model.base_model.model.model.layers
    layers[1].to(torch.float64)
    layers[0].register_forward_hook(lambda module, args, output: output.double())
    model.base_model.model.model.norm.to(torch.float64)
    model.base_model.model.lm_head.to(torch.float64)
    layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            {**kwargs, "position_embeddings": tuple(t.double() for t in kwargs["position_embeddings"])},
        ),
        with_kwargs=True,
    )
    model.train()
    output = model(**batch("llama"))
    output.loss.backward()
    gradients = {p.grad.dtype for name, p in model.named_parameters() if name.endswith("lora_A")}
    assert output.logits.dtype == torch.float64 and gradients == {torch.float32, torch.float64}


@pytest.mark.gpu
@pytest.mark.parametrize("residual", ["path", "fold"])
def test_a_model_moves_to_the_gpu_and_back(residual):
    model = goat_llama(residual=residual)
    before = logits(model)
    model.to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in batch("llama").items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits.cpu(), before, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(model.to("cpu")), before)
