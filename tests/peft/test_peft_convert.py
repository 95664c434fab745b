"""Adapters of others, converted: outputs are the oracle's, or PEFT's own; what is not known is asked for."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_tiny_models import outputs_of, tiny_gpt2, tiny_llama, tokens
from safetensors.torch import load_file, save_file

from goat_kernels import goat_reference
from goat_kernels.cli import main
from goat_kernels.numerics import TOLERANCES, relative_error
from goat_kernels.peft import GoatConfig, GoatLinearLayer
from goat_kernels.peft.convert import REPORT_FILE, export_approximate_lora, from_goat_peft, from_lora

PREFIX = "base_model.model."
NAMES = [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "v_proj")]
BOUND = TOLERANCES[torch.float32].relative


def logits(model):
    with torch.no_grad():
        return outputs_of(model.eval()(input_ids=tokens()))


def assert_alike(result, oracle):
    assert relative_error(result, oracle) < BOUND


# --- GOAT-PEFT ----------------------------------------------------------------------------------------------------


def official(folder, *, stacked=False, **changes):
    """A folder as the public code writes it: experts apart and once more below moe_layer; trained values."""
    fields = {"peft_type": "GOAT", "r": 8, "num_experts": 4, "top_k": 2, "lora_alpha": 16, "init_type": "goat"}
    fields |= {"init_cof": 0.25, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "bias": "none"}
    fields |= {"lora_dropout": 0.05, "use_rslora": False, "init_lora_weights": True, "modules_to_save": None, **changes}
    E, D = fields["num_experts"], fields["r"] // fields["num_experts"]
    tensors = {}
    for name in NAMES:
        M, N = tiny_llama().get_submodule(name).weight.shape
        A, B = 0.1 * torch.randn(E, D, N), 0.1 * torch.randn(E, M, D)
        key = f"{PREFIX}{name}."
        tensors[f"{key}lora_gating.weight"] = torch.randn(E, N)
        if stacked:
            tensors[f"{key}lora_A.weight"] = A.reshape(-1, N)
            tensors[f"{key}lora_B.weight"] = torch.cat(list(B), dim=1)
            continue
        for i in range(E):
            for letter, matrix in (("A", A[i]), ("B", B[i])):
                tensors[f"{key}lora_{letter}.{i}.weight"] = matrix
                tensors[f"{key}moe_layer.experts.{i}.lora_{letter}.weight"] = matrix.clone()
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def segments(W, E, D, init_type):
    """(U, S, Vt) of the triples that the public code takes, written from its description."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    h, t = len(S), len(S) // E
    index = {
        "goat": [i * t + j for i in range(E) for j in range(D)],
        "goat_mini": [(i + 1) * t - D + j for i in range(E) for j in range(D)],
        "pissa": list(range(E * D)),
        "milora": list(range(h - E * D, h)),
        "pissa_milora": [*range(E * D // 2), *range(h - E * D // 2, h)],
    }
    chosen = index[init_type.removesuffix("_scale")]
    return U[:, chosen], S[chosen], Vt[chosen]


@pytest.mark.parametrize(
    ("init_type", "scaling", "rule"),
    [
        ("goat", "lora", lambda N: 16 / 2),
        ("goat", "goat", lambda N: math.sqrt(3 * N / 2)),
        ("goat_mini", 5.0, lambda N: 5.0),
        ("pissa", None, lambda N: 2.0),
        ("pissa_scale", None, lambda N: math.sqrt(3 * N / 2)),
        ("milora", None, lambda N: 16 / 2),
        ("pissa_milora", None, lambda N: 16 / 2),
        ("mole", None, lambda N: 16 / 2),
        ("lora_scale", None, lambda N: math.sqrt(3 * N / 2)),
    ],
)
def test_goat_peft_gives_the_oracles_outputs(init_type, scaling, rule, tmp_path):
    source = official(tmp_path / "in", init_type=init_type)
    from_goat_peft(tmp_path / "in", base_model=tiny_llama(), scaling=scaling).save(tmp_path / "out")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    for name in NAMES:
        W0 = tiny_llama().get_submodule(name).weight.detach().double()
        N = W0.shape[1]
        s = rule(N)
        W = W0
        if init_type not in ("mole", "lora_scale"):
            U, S, Vt = segments(W0, 4, 2, init_type)
            W = W0 - 0.25 * s * (U * (S / (s * 10))) @ Vt  # init_cof * scaling * lora_B @ lora_A
        x = torch.randn(3, 5, N, dtype=torch.float64)
        part = {k.removeprefix(f"{PREFIX}{name}."): v.double() for k, v in source.items() if name in k}
        A = torch.cat([part[f"lora_A.{i}.weight"] for i in range(4)])
        B = torch.cat([part[f"lora_B.{i}.weight"] for i in range(4)], dim=1)
        oracle = goat_reference(x, W, A, B, part["lora_gating.weight"], scaling=s, top_k=2).output
        layer = model.get_base_model().get_submodule(name).eval()
        with torch.no_grad():
            assert_alike(layer(x.float()), oracle)


def test_the_stacked_layout_and_the_pickled_file(tmp_path):
    source = official(tmp_path / "in", stacked=True, init_type="mole")
    adapter = from_goat_peft(tmp_path / "in")
    key = f"{PREFIX}{NAMES[0]}"
    assert torch.equal(adapter.tensors[f"{key}.goat_adapter.lora_B"], source[f"{key}.lora_B.weight"])
    (tmp_path / "in" / "adapter_model.safetensors").unlink()
    torch.save(source, tmp_path / "in" / "adapter_model.bin")
    with pytest.raises(ValueError, match="is a pickle"):
        from_goat_peft(tmp_path / "in")
    again = from_goat_peft(tmp_path / "in", allow_pickle=True)
    assert all(torch.equal(again.tensors[k], v) for k, v in adapter.tensors.items())


@pytest.mark.parametrize(
    ("changes", "options", "match"),
    [
        ({}, {"scaling": "lora"}, "base_model is needed"),
        ({}, {"base_model": tiny_llama}, "scaling is needed: the file does not say it"),
        ({"init_type": "hydralora"}, {}, "not one that the public code can run"),
        ({"init_type": "pissa", "r": 10}, {"base_model": tiny_llama}, "subtracts other ranks"),
        ({"init_type": "mole", "r": 16}, {}, None),
    ],
)
def test_what_goat_peft_does_not_say(changes, options, match, tmp_path):
    official(tmp_path / "in", **changes)
    options = {name: value() if callable(value) else value for name, value in options.items()}
    if match is None:
        from_goat_peft(tmp_path / "in", **options)
        return
    with pytest.raises(ValueError, match=match):
        from_goat_peft(tmp_path / "in", **options)


def test_a_tampered_or_partial_goat_peft_file(tmp_path):
    tensors = official(tmp_path / "in", init_type="mole")
    key = f"{PREFIX}{NAMES[0]}."
    file = tmp_path / "in" / "adapter_model.safetensors"
    changed = tensors | {f"{key}lora_A.1.weight": tensors[f"{key}lora_A.1.weight"] + 1}
    save_file(changed, file)
    with pytest.raises(ValueError, match=r"lora_A\.1 and its copy below moe_layer differ"):
        from_goat_peft(tmp_path / "in")
    save_file({k: v for k, v in tensors.items() if f"{key}lora_gating" not in k}, file)
    with pytest.raises(ValueError, match="missing or unknown: lora_gating"):
        from_goat_peft(tmp_path / "in")


# --- PEFT ---------------------------------------------------------------------------------------------------------


def trained_lora(folder, base=None, *, initial=None, **changes):
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **changes})
    model = get_peft_model(tiny_llama() if base is None else base, config)
    if initial is not None:
        model.save_pretrained(initial)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*q_proj": 3}},
        {"target_modules": r".*layers\.1\..*_proj", "exclude_modules": ["up_proj"]},
        {"modules_to_save": ["lm_head"], "layers_to_transform": [1]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_a_lora_is_one_expert(changes, tmp_path):
    expected = logits(trained_lora(tmp_path / "in", **changes))
    from_lora(tmp_path / "in", base_model=tiny_llama()).save(tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert loaded.peft_config["default"].num_experts == 1
    assert_alike(logits(loaded), expected)
    if "modules_to_save" not in changes:
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), logits(tiny_llama()))


def test_a_lora_with_biases_on_conv1d(tmp_path):
    changes = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}
    expected = logits(trained_lora(tmp_path / "in", tiny_gpt2(), **changes))
    from_lora(tmp_path / "in").save(tmp_path / "out")
    assert_alike(logits(PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "out")), expected)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("way", ["base_model", "initial_adapter", "on_residual_base", "converted"])
def test_a_pissa_adapter(way, use_rslora, tmp_path):
    pissa = {"init_lora_weights": "pissa", "use_rslora": use_rslora}
    model = trained_lora(tmp_path / "in", initial=tmp_path / "initial", **pissa)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"changed the base weights.*base_model.*initial_adapter.*on_residual_base"):
        from_lora(tmp_path / "in")
    base, source, options = tiny_llama(), tmp_path / "in", {way: True}
    if way == "base_model":
        options = {way: tiny_llama()}
    elif way == "initial_adapter":
        options = {way: tmp_path / "initial"}
    elif way == "on_residual_base":
        base = model.unload()
    else:
        source, options = tmp_path / "converted", {}
        model.save_pretrained(source, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    from_lora(source, **options).save(tmp_path / "out")
    assert_alike(logits(PeftModel.from_pretrained(base, tmp_path / "out")), expected)


def test_a_randomised_pissa_needs_its_initial_adapter(tmp_path):
    model = trained_lora(tmp_path / "in", initial=tmp_path / "initial", init_lora_weights="pissa_niter_4")
    with pytest.raises(ValueError, match=r"Needed is one of: initial_adapter"):
        from_lora(tmp_path / "in", base_model=tiny_llama())
    from_lora(tmp_path / "in", initial_adapter=tmp_path / "initial").save(tmp_path / "out")
    assert_alike(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")), logits(model))


@pytest.mark.parametrize(
    ("changes", "match"), [({"use_dora": True}, "use_dora=True"), ({"lora_bias": True}, "lora_bias=True")]
)
def test_variants_of_lora_are_refused(changes, match, tmp_path):
    trained_lora(tmp_path / "in", **changes)
    with pytest.raises(ValueError, match=match):
        from_lora(tmp_path / "in")


def test_an_existing_output_is_refused_and_never_half_written(tmp_path, monkeypatch):
    trained_lora(tmp_path / "in")
    adapter = from_lora(tmp_path / "in")
    adapter.save(tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists"):
        adapter.save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(GoatConfig, "save_pretrained", lambda *args: (_ for _ in ()).throw(OSError("full")))
    for folder in ("out", "new"):
        with pytest.raises(OSError, match="full"):
            adapter.save(tmp_path / folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


# --- the approximate LoRA -----------------------------------------------------------------------------------------


def trained_goat(folder, **changes):
    config = GoatConfig(**{"r": 8, "num_experts": 4, "target_modules": ["q_proj", "v_proj"], **changes})
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, GoatLinearLayer)):
            layer.goat_adapter["default"].lora_B.add_(0.05 * torch.randn_like(layer.goat_adapter["default"].lora_B))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("gates", ["mean", "uniform"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"scaling": "goat_s"}, {"init": "lora"}, {"init": "hydralora"}, {"rank_pattern": {"v_proj": 4}}],
    ids=str,
)
def test_the_approximation_says_how_far_off_it_is(gates, changes, tmp_path):
    model = trained_goat(tmp_path / "in", **changes)
    exact = logits(model)
    report = export_approximate_lora(model, {"input_ids": tokens()}, tmp_path / "out", gates=gates)
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert isinstance(lora.peft_config["default"], LoraConfig)
    assert relative_error(logits(lora), exact) == pytest.approx(report["relative_error"], rel=1e-3)
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text()) == report
    assert 0 < report["relative_error"] < report["relative_error_without_adapter"]


@pytest.mark.parametrize("gates", ["mean", "uniform"])
def test_where_all_experts_are_used_alike_the_approximation_is_exact(gates, tmp_path):
    model = trained_goat(tmp_path / "in", top_k=4)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, GoatLinearLayer)):
            layer.goat_adapter["default"].router.zero_()
    report = export_approximate_lora(model, {"input_ids": tokens()}, tmp_path / "out", gates=gates)
    assert report["relative_error"] < BOUND


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    base, inputs = str(tmp_path / "base"), str(tmp_path / "inputs.safetensors")
    tiny_llama().save_pretrained(base)
    save_file({"input_ids": tokens()}, inputs)
    official(tmp_path / "in")
    out, lora = str(tmp_path / "out"), str(tmp_path / "lora")
    assert main(["convert", str(tmp_path / "in"), out, "--base-model", base]) == 2
    assert "scaling is needed" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "in"), out, "--base-model", base, "--scaling", "lora"]) == 0
    assert main(["convert", str(tmp_path / "in"), out, "--base-model", base, "--scaling", "lora"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["convert", out, lora, "--base-model", base, "--to-lora-approximate", "--inputs", inputs]) == 0
    assert "APPROXIMATE" in capsys.readouterr().out
    assert load_file(f"{lora}/adapter_model.safetensors")
    trained_lora(tmp_path / "plain")
    assert main(["convert", str(tmp_path / "plain"), str(tmp_path / "one")]) == 0
    assert main(["convert", out, str(tmp_path / "no")]) == 2
    assert "--to-lora-approximate" in capsys.readouterr().err
