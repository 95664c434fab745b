"""``goat-kernels finetune`` on the user's own model and data, with tiny models made here and no network."""

import csv
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from goat_kernels.cli import main
from goat_kernels.finetuning.data import read_texts, split

QUICK = ["--rank", "8", "--experts", "4", "--batch-size", "8", "--device", "cpu"]
WORDS = ["good", "fine", "nice", "bad", "poor", "awful", "film", "book", "the", "a"]


def finetune(*arguments: str) -> int:
    return main(["finetune", *QUICK, *arguments])


def results() -> dict:
    with open("goat-output/results.json", encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def save_tokenizer(folder: str) -> None:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)


@pytest.fixture
def bert() -> str:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(config).save_pretrained("bert")
    save_tokenizer("bert")
    return "bert"


@pytest.fixture
def vit() -> str:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    ViTModel(config).save_pretrained("vit")
    return "vit"


def causal_lm(kind: str) -> str:
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
        )
        LlamaForCausalLM(config).save_pretrained(kind)
    else:
        GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=32, n_layer=1, n_head=2, n_positions=64)).save_pretrained(kind)
    save_tokenizer(kind)
    return kind


def reviews(count: int = 60) -> list[dict]:
    """Texts whose class is told by one word; an honest task that a tiny model learns."""
    rng = random.Random(0)
    rows = []
    for i in range(count):
        label = ("praise", "blame", "neither")[i % 3]
        telling = {"praise": WORDS[:3], "blame": WORDS[3:6], "neither": WORDS[6:8]}[label]
        words = [rng.choice(telling), *rng.choices(WORDS[8:], k=rng.randrange(1, 5))]
        rows.append({"review": " ".join(words), "verdict": label})
    return rows


def write_reviews(name: str, rows: list[dict]) -> str:
    with open(name, "w", encoding="utf-8", newline="") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


COLUMNS = ["--text-column", "review", "--label-column", "verdict"]


@pytest.mark.parametrize("name", ["reviews.csv", "reviews.jsonl"])
def test_text_classification_learns(bert, name):
    data = write_reviews(name, reviews())
    arguments = ["--task", "text-classification", "--model", bert, "--data", data, *COLUMNS]
    arguments += ["--methods", "full,goat", "--max-steps", "60", "--learning-rate", "1e-2"]
    assert finetune(*arguments) == 0
    rows = results()["methods"]
    assert [row["method"] for row in rows] == ["full", "goat"]
    for row in rows:
        assert row["metric"] == "accuracy" and row["held_out_examples"] == 12
        assert row["reload_bit_equal"]
        assert row["losses"][-1] < 0.5 * row["losses"][0], row["method"]
        assert row["held_out"] > 0.6, row["method"]  # chance is one third


def test_new_modules_are_trained_and_saved_whole(bert):
    """BERT's checkpoint for masked words has neither a pooler nor a classifier: both must be in the adapter."""
    data = write_reviews("reviews.csv", reviews())
    arguments = ["--task", "text-classification", "--model", bert, "--data", data, *COLUMNS]
    assert finetune(*arguments, "--methods", "lora", "--max-steps", "2") == 0
    config = json.loads(Path("goat-output/lora/adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert set(config["modules_to_save"]) == {"classifier", "bert.pooler"}


def test_held_out_data_of_ones_own(bert):
    rows = reviews()
    data = write_reviews("train.csv", rows[:30])
    held_out = write_reviews("test.csv", rows[30:50])
    arguments = ["--task", "text-classification", "--model", bert, "--data", data, "--eval-data", held_out, *COLUMNS]
    assert finetune(*arguments, "--methods", "head", "--max-steps", "2") == 0
    assert results()["methods"][0]["held_out_examples"] == 20


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_causal_lm_reports_perplexity(kind):
    with open("text.txt", "w", encoding="utf-8") as file:
        file.write(" ".join(["the", "good", "film", "a", "bad", "book"] * 150))
    arguments = ["--task", "causal-lm", "--model", causal_lm(kind), "--data", "text.txt", "--block-size", "16"]
    assert finetune(*arguments, "--max-steps", "40", "--learning-rate", "1e-2") == 0
    rows = results()["methods"]
    assert [row["method"] for row in rows] == ["lora", "goat"]
    for row in rows:
        assert row["metric"] == "perplexity" and row["held_out_examples"] == 11  # 901 tokens, 56 blocks, a fifth
        assert row["reload_bit_equal"] and row["held_out_standard_error"] > 0
        # Adapters alone on random weights do not get far, but they learn which words occur at all.
        assert 1 <= row["held_out"] < 0.75 * math.exp(row["losses"][0]), row["method"]


@pytest.fixture
def photos() -> str:
    """Two classes, bright and dark, 20 images each of two sizes and modes."""
    rng = np.random.default_rng(0)
    for label, level in (("bright", 200), ("dark", 50)):
        Path("photos", label).mkdir(parents=True)
        for i in range(20):
            shape = (20, 24, 3) if i % 2 else (16, 16)
            pixels = rng.normal(level, 20, shape).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(f"photos/{label}/{i}.png")
    return "photos"


@pytest.mark.long
def test_image_folder(vit, photos):
    arguments = ["--task", "image-classification", "--model", vit, "--data", photos]
    assert finetune(*arguments, "--methods", "lora,goat", "--max-steps", "30", "--learning-rate", "1e-2") == 0
    for row in results()["methods"]:
        assert row["held_out_examples"] == 8 and row["held_out"] == 1.0 and row["reload_bit_equal"]
    config = json.loads(Path("goat-output/goat/adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert "classifier" in config["modules_to_save"]


def test_hub_data_with_class_names(bert, monkeypatch):
    """What the datasets library returns, without the network that it would come over."""
    import datasets

    rows = reviews()
    names = ["blame", "neither", "praise"]
    table = datasets.Dataset.from_dict(
        {"text": [row["review"] for row in rows], "label": [names.index(row["verdict"]) for row in rows]}
    ).cast_column("label", datasets.ClassLabel(names=names))
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = ["--task", "text-classification", "--model", bert, "--data", "someone/reviews:plain@train"]
    assert finetune(*arguments, "--methods", "head", "--max-steps", "2") == 0
    assert asked == [("someone/reviews", "plain", "train")]
    with open("goat-output/head/model/config.json", encoding="utf-8") as file:
        assert json.load(file)["id2label"] == {"0": "blame", "1": "neither", "2": "praise"}


def test_quoted_line_breaks_stay_in_their_cell():
    with open("data.csv", "w", encoding="utf-8-sig", newline="") as file:
        file.write('text,label\n"two\nlines",a\n"a, b",b\n')
    examples = read_texts("--data", "data.csv", "text", "label")
    assert list(examples.items) == ["two\nlines", "a, b"] and list(examples.labels) == ["a", "b"]


def test_split_is_stratified_seeded_and_complete():
    labels = [0] * 50 + [1] * 20 + [2]
    train, held_out = split(71, labels, 0.2, 0, "--data")
    assert sorted(train + held_out) == list(range(71))
    assert [sum(labels[i] == c for i in held_out) for c in range(3)] == [10, 4, 0]
    assert split(71, labels, 0.2, 0, "--data") == (train, held_out)
    assert split(71, labels, 0.2, 1, "--data") != (train, held_out)


def test_options_reach_the_saved_adapter_and_it_loads_back_in_bfloat16():
    Path("text.txt").write_text(" ".join(["the", "good", "film"] * 100), encoding="utf-8")
    arguments = ["--task", "causal-lm", "--model", causal_lm("llama"), "--data", "text.txt", "--block-size", "16"]
    arguments += ["--methods", "goat", "--max-steps", "3", "--accumulation", "2", "--dtype", "bfloat16"]
    given = {
        "scaling": "rslora",
        "eta": 0.25,
        "rho": 20.0,
        "init": "goat_mini",
        "residual": "fold",
        "balance_coefficient": 0.01,
        "dropout": 0.1,
        "lora_alpha": 5.0,
        "top_k": 3,
        "seed": 7,
    }
    arguments += [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert finetune(*arguments, "--target-modules", "q_proj,down_proj") == 0
    saved = json.loads(Path("goat-output/goat/adapter/adapter_config.json").read_text(encoding="utf-8"))
    expected = {**given, "lora_dropout": given["dropout"], "r": 8, "num_experts": 4}
    del expected["dropout"]
    assert {name: saved[name] for name in expected} == expected
    assert set(saved["target_modules"]) == {"q_proj", "down_proj"}
    assert results()["methods"][0]["reload_bit_equal"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        ("down_proj,self_attn", {"gate_proj", "up_proj"}),  # a module, and what is in another
        (r".*\.(q|up)_proj", {"k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}),
    ],
    ids=["names", "pattern"],
)
def test_excluded_modules_get_no_adapter_of_any_method(excluded, left):
    Path("text.txt").write_text(" ".join(["the", "good", "film"] * 100), encoding="utf-8")
    arguments = ["--task", "causal-lm", "--model", causal_lm("llama"), "--data", "text.txt", "--block-size", "16"]
    arguments += ["--methods", "lora,goat", "--max-steps", "1", "--exclude-modules", excluded]
    assert finetune(*arguments) == 0
    for method in ("lora", "goat"):
        saved = load_file(f"goat-output/{method}/adapter/adapter_model.safetensors")
        assert {part for name in saved for part in name.split(".") if part.endswith("_proj")} == left, method
    given = results()["options"]["exclude_modules"]
    assert given == (excluded if "*" in excluded else excluded.split(","))
    assert finetune(*arguments, "--resume") == 0
    assert finetune(*arguments, "--resume", "--exclude-modules", "down_proj") == 2


def test_excluded_modules_come_on_top_of_the_head(bert):
    data = write_reviews("reviews.csv", reviews())
    arguments = ["--task", "text-classification", "--model", bert, "--data", data, *COLUMNS, "--max-steps", "1"]
    arguments += ["--target-modules", "query,key,value,dense,classifier", "--exclude-modules", "query,intermediate"]
    assert finetune(*arguments, "--methods", "goat") == 0
    saved = load_file("goat-output/goat/adapter/adapter_model.safetensors")
    adapted = {name.partition(".goat_")[0] for name in saved if ".goat_" in name}
    assert {name.rpartition("layer.0.")[2] for name in adapted} == {
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "output.dense",
    }
    assert any("classifier" in name for name in saved), "the head is trained in full"


@pytest.mark.long
@pytest.mark.parametrize(("given", "eta"), [((), 1.0), (("--eta", "0.25"), 0.25)], ids=["default", "given"])
def test_eta_is_the_papers_unless_given(bert, given, eta):
    data = write_reviews("reviews.csv", reviews())
    arguments = ["--task", "text-classification", "--model", bert, "--data", data, *COLUMNS, "--max-steps", "1"]
    assert finetune(*arguments, "--methods", "goat", *given) == 0
    saved = json.loads(Path("goat-output/goat/adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert saved["eta"] == eta
