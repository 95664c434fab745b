"""Which layers are adapted, and what is said of the others: experts, small layers, weights that are read uncalled."""

from __future__ import annotations

import ast
import contextlib
import copy
import gc
import json
import re
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft_moe_models import MOE, tiny_moe
from peft_tiny_models import VOCABULARY, tiny_bert, tiny_llama, tiny_vit, tokens
from torch import nn

import goat_kernels.peft.base_layer
import goat_kernels.peft.targets
from goat_kernels.peft import GoatConfig, GoatLinearLayer
from goat_kernels.peft.weight_readers import weight_readers


def config(**changes) -> GoatConfig:
    return GoatConfig(**{"r": 8, "num_experts": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def goat_layers(model: nn.Module) -> dict[str, GoatLinearLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GoatLinearLayer)}


@contextlib.contextmanager
def ours():
    """The warnings about targets, as a list of texts."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    found = [str(w.message) for w in caught]
    texts += [text for text in found if re.search("experts of this model|Left out|computes with the weight", text)]


# --- experts ------------------------------------------------------------------------------------------------------


def share_and_names(model) -> tuple[float, set[str]]:
    """By the shapes alone: of weights [experts, ...] (Dbrx stacks them along the rows), their share and names."""
    weights = dict(model.named_parameters())
    stacked = {n for n, p in weights.items() if (p.ndim == 3 and "conv" not in n) or re.search(r"experts\.mlp\.", n)}
    around = [model.get_input_embeddings(), model.get_output_embeddings()]
    outside = {id(p) for module in around for p in module.parameters()}
    body = sum(p.numel() for p in weights.values() if id(p) not in outside)
    stacked = {n for n in stacked if not n.endswith("_bias")}
    return sum(weights[n].numel() for n in stacked) / body, stacked


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(MOE))
def test_experts_that_all_linear_leaves_out_are_named_once_with_their_share(family):
    model = tiny_moe(family)
    share, names = share_and_names(model)
    with ours() as texts:
        adapted = get_peft_model(model, config())
    (text,) = [text for text in texts if "experts of this model" in text]
    patterns = re.search(r"Left frozen: (.*?) \(\d+ parameters", text)[1].split(", ")
    regex = "|".join(re.escape(p).replace(r"\*", r"\d+") for p in patterns)
    assert {name for name in names if re.fullmatch(regex, name)} == names
    assert f"({len(names)} parameters), {share:.0%} of" in text
    assert share > 0.2

    excluded = re.search(r"exclude_modules=\[(.*?)\]", text)[1].replace("'", "").split(", ")
    with ours() as texts:
        get_peft_model(tiny_moe(family), config(exclude_modules=excluded))
    assert not [text for text in texts if "experts of this model" in text]

    loss = adapted(input_ids=tokens(), labels=tokens()).loss  # and what is adapted works
    loss.backward()
    assert torch.isfinite(loss)
    assert any(p.grad is not None and p.grad.any() for n, p in adapted.named_parameters() if ".lora_B" in n)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("Qwen3Moe", {"target_modules": ["q_proj", "gate_proj"]}, ("gate_up_proj",)),
        ("Qwen3Moe", {"target_modules": ["v_proj", "down_proj"]}, ("down_proj",)),
        ("Olmoe", {"target_modules": r".*(o_proj|experts\.\d+\.(up|down)_proj)"}, ("gate_up_proj", "down_proj")),
        ("Olmoe", {"target_modules": ["k_proj", "gate_up_proj"]}, ("gate_up_proj",)),
        ("Mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}, ("gate_up_proj", "down_proj")),
        ("GptOss", {"target_modules": ["q_proj", "down_proj"]}, ("down_proj",)),
        (
            "DeepseekV3",
            {"target_modules": ["up_proj"]},
            ("gate_up_proj",),
        ),  # it has dense layers and shared experts too
        ("Dbrx", {"target_modules": ["Wqkv", "w1"]}, ("w1",)),
        ("Qwen3Moe", {"exclude_modules": r".*experts\.gate_up_proj|.*lm_head"}, ("down_proj",)),
        ("Qwen3Moe", {"target_modules": ["q_proj", "v_proj"]}, ()),
        ("Qwen3Moe", {"target_modules": r".*self_attn\.\w_proj"}, ()),
        ("DeepseekV3", {"target_modules": ["up_proj", "q_a_proj"], "exclude_modules": ["experts"]}, ()),
        ("Olmoe", {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["gate_up_proj", "k_proj"]}, ()),
        ("Mixtral", {"target_modules": None}, ()),
    ],
    ids=str,
)
def test_experts_are_spoken_of_where_target_modules_ask_for_them(family, changes, named):
    with ours() as texts:
        get_peft_model(tiny_moe(family), config(**changes))
    found = {leaf for text in texts for leaf in re.findall(r"experts\.(?:mlp\.)?(\w+)", text.split("parameters)")[0])}
    assert len(texts) == bool(named)
    assert found == set(named)


def test_experts_are_spoken_of_when_an_adapter_is_made_and_not_when_it_is_loaded(tmp_path):
    settings = config(target_modules=["o_proj", "up_proj"])
    with ours() as texts:
        get_peft_model(tiny_moe("Olmoe"), settings).save_pretrained(tmp_path)
    assert len(texts) == 1, texts
    with ours() as texts:
        model = PeftModel.from_pretrained(tiny_moe("Olmoe"), tmp_path, low_cpu_mem_usage=True)
        model.load_adapter(tmp_path, "second")
        tiny_moe("Olmoe").load_adapter(str(tmp_path))
    assert not texts


def test_models_without_experts_are_not_spoken_of():
    class Expert(nn.Module):  # linear layers of their own are adapted, however they are called
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
            self.expert_conv = nn.Conv1d(4, 4, 3)

    with ours() as texts:
        for model in (tiny_llama(), tiny_bert(), Expert()):
            get_peft_model(model, config(exclude_modules=["classifier"], task_type=None))
    assert not texts


# --- layers that nobody named -------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Two layers that take eight ranks and two that do not, whose names end alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a = nn.Linear(16, 16)
        self.b = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
        self.gate = nn.ModuleDict({"a": nn.Linear(16, 1), "c": nn.Linear(16, 4)})

    def forward(self, x):
        return self.b(self.a(x)) * self.gate["a"](x) + self.gate["c"](x).sum(-1, keepdim=True)


LEFT_OUT = ["gate.a", "gate.c"]


@pytest.mark.parametrize("route", ["get_peft_model", "inject", "low_cpu_mem_usage"])
def test_layers_too_small_for_their_experts_are_left_out_of_all_linear(route):
    settings = config(task_type=None)
    base = Mixed()
    with ours() as texts:
        if route == "inject":
            model = inject_adapter_in_model(settings, base)
        else:
            model = get_peft_model(base, settings, low_cpu_mem_usage=route == "low_cpu_mem_usage")
    assert set(goat_layers(base)) == {"a", "b.0", "b.2"}
    (text,) = texts
    assert "'all-linear'" in text
    assert re.search(r"gate\.a: gate\.a of shape \(1, 16\) has 1 singular values.*use fewer experts", text)
    assert re.search(r"gate\.c: .*4 singular values.*lower its rank to at most 4 \(rank_pattern\)", text)
    if route != "low_cpu_mem_usage":
        assert torch.isfinite(model(torch.randn(3, 16))).all()

    with ours() as texts:
        get_peft_model(Mixed(), config(task_type=None, rank_pattern={"gate.c": 4}, exclude_modules=["gate.a"]))
        get_peft_model(Mixed(), config(task_type=None, init="lora"))
        get_peft_model(Mixed(), config(task_type=None, exclude_modules=["a", "c"]))
    assert not texts


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["a", "gate.a"]},
        {"target_modules": r"b\.[02]|gate\..*"},
        {"rank_pattern": {"gate.c": 8}},
    ],
    ids=str,
)
def test_a_small_layer_that_was_named_is_refused_and_nothing_changed(changes):
    base, settings = Mixed(), config(task_type=None, **changes)
    before, asked = set(dict(base.named_modules())), settings.target_modules
    with pytest.raises(ValueError, match=r"gate\.[ac] of shape .* singular values"):
        get_peft_model(base, settings)
    assert set(dict(base.named_modules())) == before
    assert settings.target_modules == asked  # "all-linear" again, so that it can be corrected and used


def test_nothing_is_adapted_where_every_layer_is_too_small():
    with pytest.raises(ValueError, match=r"gate\.a of shape \(1, 16\)"):
        get_peft_model(nn.ModuleDict({"gate": Mixed().gate}), config(task_type=None))


def test_peft_defaults_leave_small_layers_out_too():
    base = tiny_llama()
    for layer in base.model.layers:
        layer.self_attn.v_proj = nn.Linear(32, 3)
    with ours() as texts:
        model = get_peft_model(base, config(target_modules=None))
    assert {name.rpartition(".")[2] for name in goat_layers(base)} == {"q_proj"}
    (text,) = texts
    assert "PEFT's default" in text
    assert "model.layers.*.self_attn.v_proj (2 layers): " in text
    assert sorted(model.peft_config["default"].target_modules) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_adapters_on_some_of_the_layers_are_saved_and_loaded_by_every_route(tmp_path):
    """shared_expert_gate of Qwen2-MoE has one output."""
    model = get_peft_model(tiny_moe("Qwen2Moe"), config(exclude_modules=["experts"])).eval()
    names = set(goat_layers(model.base_model.model))
    assert "model.layers.0.mlp.shared_expert.gate_proj" in names
    assert not any("shared_expert_gate" in name for name in names)
    model.save_pretrained(tmp_path)
    inputs = tokens()
    with torch.no_grad():
        expected = model(input_ids=inputs).logits
    with ours() as texts:
        loaded = [
            PeftModel.from_pretrained(tiny_moe("Qwen2Moe"), tmp_path),
            PeftModel.from_pretrained(tiny_moe("Qwen2Moe"), tmp_path, low_cpu_mem_usage=True),
            tiny_moe("Qwen2Moe"),
        ]
        loaded[2].load_adapter(str(tmp_path))
        loaded[0].load_adapter(tmp_path, "again")
        edit = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**edit, "target_modules": "all-linear"}))
        loaded.append(PeftModel.from_pretrained(tiny_moe("Qwen2Moe"), tmp_path))  # somebody wrote it by hand
    assert not texts
    for other in loaded:
        with torch.no_grad():
            assert torch.equal(other.eval()(input_ids=inputs).logits, expected)

    with ours() as texts:  # another adapter with settings of its own reaches what the first one left out
        loaded[0].add_adapter("small", config(init="lora", r=4, exclude_modules=["experts"]))
        inject_adapter_in_model(config(exclude_modules=["experts"]), loaded[2], "second")  # as its add_adapter does
    assert len(texts) == 1, texts
    assert "model.layers.*.mlp.shared_expert_gate (2 layers)" in texts[0]
    with_small = {n for n, layer in goat_layers(loaded[0].base_model.model).items() if "small" in layer.r}
    assert with_small - names == {f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)}


def test_a_head_that_is_too_small_is_left_out_beside_the_rest():
    with ours() as texts:
        model = get_peft_model(tiny_vit(), config(task_type=None))
    assert len(texts) == 1, texts
    assert "classifier: classifier of shape (3, 32)" in texts[0]
    assert len(goat_layers(model)) == 12


# --- weights that are read without a call -------------------------------------------------------------------------

_MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 8}
_MAMBA2 = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "head_dim": 16, "num_heads": 4}
_SSM = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "mamba_d_state": 8}
_WAVLM = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_CONV = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16}

#: Model, its configuration -> the linear layers whose weights it reads past their forward.
READERS = {
    "MambaForCausalLM": (_MAMBA, {"x_proj", "dt_proj", "out_proj"}),
    "FalconMambaForCausalLM": (_MAMBA, {"x_proj", "dt_proj", "out_proj"}),
    "Mamba2ForCausalLM": ({**_MAMBA2, "n_groups": 2}, {"out_proj"}),
    "BambaForCausalLM": (
        {**_SSM, "num_hidden_layers": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
        {"out_proj"},
    ),
    "FalconH1ForCausalLM": (
        {**_SSM, "num_hidden_layers": 1, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
        {"out_proj"},
    ),
    "GraniteMoeHybridForCausalLM": (
        {**_SSM, "num_hidden_layers": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
        {"out_proj"},
    ),
    "WavLMModel": ({**_WAVLM, **_CONV}, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "MobileBertForPreTraining": (
        {"vocab_size": 64, "hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 1},
        {"decoder", "dense"},
    ),
}


def meta_model(name: str, changes: dict):
    """The model on the meta device, where none of its weights exist."""
    with torch.device("meta"):
        model_class = getattr(transformers, name)
        return model_class._from_config(model_class.config_class(**changes))


@pytest.mark.parametrize("name", sorted(READERS))
def test_layers_whose_weights_a_model_reads_are_refused_by_name_and_left_out_otherwise(name):
    changes, names = READERS[name]
    head = "LMPredictionHead" if name.startswith("MobileBert") else ""
    for leaf in names:
        with pytest.raises(ValueError, match=rf"computes with the weight of \S*{leaf} without calling it.*exclude_mod"):
            get_peft_model(meta_model(name, changes), config(target_modules=[leaf], task_type=None))
    with ours() as texts:
        model = get_peft_model(meta_model(name, changes), config(task_type=None, r=4, exclude_modules=["experts"]))
    layers = {layer.rpartition(".")[2] for layer in goat_layers(model)}
    assert layers
    assert not (layers & names if not head else {n for n in goat_layers(model) if n.startswith("cls.predictions.d")})
    assert len(texts) == 1, texts
    assert f"{head}.forward computes with" in texts[0] or name == "WavLMModel"


def test_an_adapter_saved_before_such_layers_were_refused_still_loads(tmp_path, monkeypatch):
    def base():
        torch.manual_seed(0)
        return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**_MAMBA2, n_groups=2))

    with monkeypatch.context() as patch:
        patch.setattr(goat_kernels.peft.targets, "weight_readers", lambda *arguments: {})
        model = get_peft_model(base(), config(target_modules=["in_proj", "out_proj"], init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    with ours() as texts:
        loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert len(texts) == 1, texts
    assert "Mamba2Mixer.forward computes with the weight of backbone.layers.0.mixer.out_proj" in texts[0]
    inputs = tokens() % 64
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=inputs).logits, model(input_ids=inputs).logits)


class Reader(nn.Module):
    """Reads the weights of some of its layers, and asks about those of the others."""

    sliced = 1

    def __init__(self):
        super().__init__()
        self.called, self.asked, self.clamped, self.divided, self.read = (nn.Linear(16, 16) for _ in range(5))
        self.inner = nn.ModuleDict({"deep": nn.Linear(16, 16)})
        self.many = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        with torch.no_grad():
            self.setup_weights()

    def setup_weights(self):
        self.reset_parameters()

    def reset_parameters(self):
        self.called.weight.copy_(self.asked.weight * 2)

    def forward(self, x):
        if self.asked.weight.dtype != x.dtype or self.asked.weight is None or not isinstance(self.asked.weight, object):
            x = x.to(self.asked.weight)
        if self.training:
            self.clamped.weight.data.clamp_(-1, 1)
        if self.sliced > 1 and x.ndim > 1:
            x = torch.cat([F.linear(x, half) for half in self.divided.weight.chunk(2)], -1)
        else:
            x = self.divided(x)
        x = self.clamped(self.asked(self.called(x)))
        return F.linear(F.linear(x, self.read.weight), self.many[1].weight.float()) @ self.inner.deep.weight.T


class ReadsNothing(Reader):
    def forward(self, x):
        return self.read(self.called(x))


class ReadsBeyond(Reader):
    def forward(self, x):
        return super().forward(x)


def readers_of(model: nn.Module) -> set[str]:
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = weight_readers(model, linears.values())
    return {name for name, module in linears.items() if id(module) in found}


def test_reads_are_told_from_questions_and_from_branches_that_are_closed():
    read = {"read", "inner.deep", "many.0", "many.1"}
    assert readers_of(Reader()) == read
    assert readers_of(ReadsBeyond()) == read
    assert readers_of(ReadsNothing()) == set()
    divided = Reader()
    divided.sliced = 2
    assert readers_of(divided) == read | {"divided"}


def test_a_forward_that_somebody_put_into_a_model_counts():
    model = ReadsNothing()

    def forward(x):
        return x

    def fused(self, x):
        return F.linear(x, self.called.weight)

    model.forward = fused.__get__(model)
    assert readers_of(model) == {"called"}
    model.forward = forward
    assert readers_of(model) == set()


def test_only_layers_that_are_to_be_adapted_are_reported():
    model = Reader()
    assert weight_readers(model, [model.called]) == {}
    assert weight_readers(model, [model.read]) == {id(model.read): ("Reader.forward", False)}


class Regularised(nn.Module):
    """Reads weights for a penalty, and asks a weight for zeros of its kind: its layers are called all the same."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.fused = False
        self.step = nn.Parameter(torch.zeros(()))

    @property
    def fast(self):
        raise NotImplementedError("asked while the model is looked at")

    def penalty(self):
        return self.fc.weight.square().sum()

    def forward(self, x):
        if self.fused and self.fast and self.step > 3:
            return nn.functional.linear(x, self.fc.weight)
        return self.fc(x + self.fc.weight.new_zeros(16))


def test_code_that_is_not_transformers_is_warned_about_and_adapted():
    """The analysis was checked on transformers' models; elsewhere it may be wrong, and refusing would leave no way."""
    with pytest.warns(UserWarning, match=r"Regularised\.penalty seems to compute with the weight of fc"):
        model = get_peft_model(Regularised(), config(target_modules=["fc"], task_type=None))
    assert set(goat_layers(model.base_model.model)) == {"fc"}
    model(torch.randn(3, 16)).sum().backward()
    assert model.base_model.model.fc.goat_adapter["default"].lora_B.grad.any()


def test_the_analysis_keeps_no_model_alive():
    def made():
        model = nn.Sequential(nn.Linear(16, 16))
        forward = model.forward
        model.forward = lambda x: forward(x)
        return get_peft_model(model, config(target_modules=["0"], task_type=None))

    model = made()
    weight = weakref.ref(model.base_model.model[0].base_layer.weight)
    del model
    gc.collect()
    assert weight() is None


def test_following_the_advice_changes_no_layer():
    """In SigLIP the pooling head's out_proj cannot be adapted, and every attention has one that can."""
    with ours() as texts:
        first = set(goat_layers(get_peft_model(siglip(), config(task_type=None)).base_model.model))
    exclude = ast.literal_eval(re.search(r"exclude_modules=(\[.*?\])", texts[0])[1])
    with ours() as texts:
        second = get_peft_model(siglip(), config(task_type=None, exclude_modules=exclude))
    assert not texts
    assert set(goat_layers(second.base_model.model)) == first
    assert any(name.endswith("self_attn.out_proj") for name in first)


def test_layers_that_only_seem_to_be_read_are_adapted():
    """Bloom slices its weights for two ranks alone, DeBERTa chunks them for query states that it never has."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": 4}
    bloom = get_peft_model(transformers.BloomForCausalLM(transformers.BloomConfig(**sizes)), config())
    assert "transformer.h.0.self_attention.dense" in goat_layers(bloom.base_model.model)
    exact = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, pretraining_tp=2, slow_but_exact=True))
    with pytest.raises(ValueError, match=r"BloomAttention\.forward computes with the weight of .*dense"):
        get_peft_model(exact, config(target_modules=["dense"]))
    deberta = transformers.DebertaModel(transformers.DebertaConfig(**_WAVLM, vocab_size=VOCABULARY))
    assert len(goat_layers(get_peft_model(deberta, config(target_modules=None, task_type=None)))) == 2


# --- what a model does, by its gradients --------------------------------------------------------------------------


def siglip():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=8))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)


ARCHITECTURES = {
    "mamba": (lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**_MAMBA)), {"dt_proj"}),
    "wavlm": (
        lambda: transformers.WavLMModel(transformers.WavLMConfig(**_WAVLM, **_CONV)),
        {"q_proj", "k_proj", "v_proj", "out_proj"},
    ),
    "siglip": (siglip, {"head.attention.out_proj"}),
    "encoder": (encoder, {"out_proj"}),
    "Jamba": (lambda: tiny_moe("Jamba"), {"dt_proj"}),
    "LongcatFlash": (lambda: tiny_moe("LongcatFlash"), {"classifier"}),
    "Qwen2Moe": (lambda: tiny_moe("Qwen2Moe"), set()),
    "Llama4": (lambda: tiny_moe("Llama4"), set()),
    "llama": (tiny_llama, set()),
    "bert": (tiny_bert, set()),
    "vit": (tiny_vit, set()),
}


def inputs_of(name: str) -> tuple[tuple, dict]:
    generator = torch.Generator().manual_seed(5)
    if name == "wavlm":
        return (torch.randn(2, 2000, generator=generator),), {}
    if name == "encoder":
        return (torch.randn(2, 5, 16, generator=generator),), {}
    if name in ("siglip", "vit"):
        return (), {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return (), {"input_ids": tokens() % 64}


def silent_layers(name: str, training: bool) -> set[str]:
    """Adapted layers whose weight takes part in the output, and whose adapter does not."""
    torch.manual_seed(0)
    base = ARCHITECTURES[name][0]()
    get_peft_model(base, config(task_type=None, r=2, num_experts=2, init_weights=False)).train(training)
    layers = goat_layers(base)
    for layer in layers.values():
        layer.get_base_layer().weight.requires_grad_(True)
    arguments, keywords = inputs_of(name)
    outputs = base(*arguments, **keywords)
    outputs = [outputs] if torch.is_tensor(outputs) else [o for o in outputs.values() if torch.is_tensor(o)]
    sum(o.float().square().mean() for o in outputs if o.requires_grad).backward()

    def moves(gradient):
        return gradient is not None and bool(gradient.abs().sum() > 0)

    used = {n: layer for n, layer in layers.items() if moves(layer.get_base_layer().weight.grad)}
    assert used
    return {n for n, layer in used.items() if not moves(layer.goat_adapter["default"].lora_B.grad)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_adapted_layer_that_a_model_uses_gets_a_gradient(name, training, monkeypatch):
    assert silent_layers(name, training) == set()

    # The measurement sees what it should: with nothing refused, the layers that the model reads are silent.
    def lenient(base, layer_name):
        if not isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
            goat_kernels.peft.base_layer.check_base_layer(base, layer_name)

    monkeypatch.setattr(goat_kernels.peft.targets, "weight_readers", lambda *a: {})
    monkeypatch.setattr(goat_kernels.peft.targets, "check_base_layer", lenient)
    monkeypatch.setattr("goat_kernels.peft.model.check_base_layer", lenient)
    silent = silent_layers(name, training)
    expected = ARCHITECTURES[name][1]
    assert {leaf for leaf in expected if any(n.endswith(leaf) for n in silent)} == expected
    assert all(n.endswith(tuple(expected)) for n in silent)


@torch.no_grad()
def test_the_fused_encoder_of_pytorch_does_not_bypass_an_adapter():
    torch.manual_seed(0)
    plain = encoder().eval()
    with ours() as texts:
        model = get_peft_model(copy.deepcopy(plain), config(task_type=None, init_weights=False)).eval()
    assert "layers.*.self_attn.out_proj (2 layers): " in texts[0]
    assert {n.rpartition(".")[2] for n in goat_layers(model)} == {"linear1", "linear2"}
    x = torch.randn(2, 5, 16)
    with torch.enable_grad():  # no fast path
        ordinary = model(x).detach()
    assert torch.allclose(model(x), ordinary, atol=1e-5)
    assert not torch.allclose(ordinary, plain(x), atol=1e-3)


# --- layers with a forward of their own ---------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Grouped(nn.Linear):
    def forward(self, x):
        return super().forward(x).unflatten(-1, (2, -1))


class Particular(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(7, -1))


class Holder(nn.Module):
    def __init__(self, kind: type):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = kind(16, 16)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("kind", "message"), [(Pair, "gives a tuple"), (Grouped, r"gives \[2, 3, 2, 8\]"), (Particular, "fails on an inp")]
)
def test_a_layer_of_transformers_whose_forward_is_no_product_is_refused_or_left_out(kind, message, monkeypatch):
    monkeypatch.setattr(kind, "__module__", "transformers.models.one")
    with pytest.raises(TypeError, match=rf"second is a .*{kind.__name__} whose forward {message}.*exclude_modules"):
        get_peft_model(Holder(kind), config(target_modules=["first", "second"], task_type=None))
    with ours() as texts:
        model = get_peft_model(Holder(kind), config(task_type=None))
    assert message.partition("\\")[0] in texts[0]
    assert list(goat_layers(model.base_model.model)) == ["first"]


@pytest.mark.parametrize(("kind", "found"), [(Pair, "a tuple"), (Grouped, r"\[4, 2, 8\]")])
def test_a_layer_of_others_is_judged_by_its_first_output(kind, found):
    model = get_peft_model(Holder(kind), config(target_modules=["second"], task_type=None))
    with pytest.raises(TypeError, match=rf"second gives {found}.*exclude_modules"):
        model(torch.randn(4, 16))


def test_a_layer_that_takes_more_than_x_gets_it():
    class Scaled(nn.Linear):
        def forward(self, x, scale):
            assert x.ndim == 2 and not torch.isnan(x).any()
            return scale * super().forward(x)

    layer = Scaled(16, 16)
    expected = layer(torch.ones(2, 16), 3.0)
    base = nn.ModuleDict({"layer": layer})
    get_peft_model(base, config(target_modules=["layer"], init="lora", task_type=None))
    torch.testing.assert_close(base["layer"](torch.ones(2, 16), 3.0), expected)


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    base = Holder(Doubled)
    calls = []
    base.second.register_forward_hook(lambda *arguments: calls.append(arguments))
    plain = copy.deepcopy(base)
    with ours() as texts:
        model = get_peft_model(base, config(task_type=None))
    assert not texts
    assert not calls  # it was looked at without being run
    x = torch.randn(3, 16)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    assert set(goat_layers(base)) == {"first", "second"}
