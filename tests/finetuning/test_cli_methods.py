"""Every method of ``goat-kernels finetune``, the recipes, pairs of texts: on tiny stand-ins, without a network."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from test_cli_tasks import bert, causal_lm, photos, results, reviews, save_tokenizer, vit, write_reviews
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPForImageClassification,
    DataCollatorForSeq2Seq,
    RobertaConfig,
    RobertaModel,
)

from goat_kernels.cli import build_parser, main
from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.options import RECIPES, settle
from goat_kernels.finetuning.tasks import IGNORED, Prepared, encode_response

__all__ = ["bert", "photos", "vit"]  # fixtures

#: The paper's table of settings: E, K, R, eta, rho, GOAT's learning rate.
PAPER = {
    "image": (8, 2, 8, 1.0, 10.0, 1e-4),
    "glue": (8, 2, 32, 1.0, 10.0, 1e-4),
    "nlg": (8, 2, 8, 1.0, 10.0, 2e-5),
    "commonsense": (8, 2, 32, 0.1, 10.0, 1e-4),
}


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def finetune(*arguments: str) -> int:
    return main(["finetune", "--batch-size", "8", "--device", "cpu", "--max-steps", "2", *arguments])


def options(*arguments: str):
    return settle(vars(build_parser("finetune").parse_args(["finetune", *arguments])))


def adapter_json(method: str = "goat") -> dict:
    return json.loads(Path(f"goat-output/{method}/adapter/adapter_config.json").read_text(encoding="utf-8"))


@pytest.mark.long
def test_every_method_trains_and_loads_back(bert):
    data = write_reviews("reviews.csv", reviews())
    arguments = ["--task", "text-classification", "--model", bert, "--data", data, "--rank", "8", "--experts", "4"]
    arguments += ["--text-column", "review", "--label-column", "verdict", "--learning-rate", "1e-3"]
    assert finetune(*arguments, "--methods", ",".join(METHODS)) == 0
    rows = {row["method"]: row for row in results()["methods"]}
    assert list(rows) == list(METHODS)
    assert all(row["reload_bit_equal"] for row in rows.values())
    assert {name for name, row in rows.items() if row["load_by_layer"]} == {
        "milora",
        "molora",
        "hydralora",
        "goat",
        "goat_s",
    }
    assert adapter_json("goat_s")["scaling"] == "goat_s" and adapter_json("hydralora")["init"] == "hydralora"
    assert adapter_json("milora")["num_experts"] == 1 and adapter_json("molora")["scaling"] == 2.0
    assert adapter_json("dora")["use_dora"] and adapter_json("pissa")["init_lora_weights"] == "pissa"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_papers_settings(name):
    found = options("--recipe", name, "--data", "somewhere")
    settings = (found.experts, found.top_k, found.rank, found.eta, found.rho)
    assert (*settings, found.learning_rates["goat"]) == PAPER[name]
    assert (found.init, found.scaling, found.balance_coefficient, found.dropout) == ("goat", "goat", 1e-3, 0.05)


def test_options_go_before_the_recipe():
    given = ["--rank", "16", "--model", "mine", "--learning-rate", "goat=3e-4", "--dropout", "0", "--dtype", "float32"]
    for arguments in (["--recipe", "nlg", *given], [*given, "--recipe", "nlg"]):
        found = options(*arguments, "--data", "somewhere")
        assert (found.rank, found.dropout, found.model) == (16, 0.0, "mine")
        assert (found.dtype, found.learning_rates["goat"]) == ("float32", 3e-4)
        assert found.target_modules == RECIPES["nlg"]["target_modules"]
    # A given value that is the default without a recipe is given all the same.
    assert options("--recipe", "image", "--data", "somewhere", "--rank", "32").rank == 32


@pytest.mark.long
def test_recipe_image_on_a_tiny_clip(photos):
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**tower, "image_size": 16, "patch_size": 8}, text_config=tower)
    CLIPForImageClassification(config).save_pretrained("clip")
    assert finetune("--recipe", "image", "--model", "clip", "--data", photos) == 0
    assert [row["method"] for row in results()["methods"]] == ["lora", "goat"]
    targets = set(adapter_json()["target_modules"])
    assert {name.rpartition(".")[2] for name in targets} >= {"q_proj", "k_proj", "v_proj", "fc1", "fc2"}
    assert adapter_json()["modules_to_save"] == ["classifier"]


@pytest.mark.long
def test_recipe_glue_on_a_tiny_roberta_and_pairs():
    torch.manual_seed(0)
    save_tokenizer("roberta")
    config = RobertaConfig(
        vocab_size=16,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        type_vocab_size=2,
        pad_token_id=0,
    )
    RobertaModel(config).save_pretrained("roberta")
    rows = [{"a": "good film", "b": row["review"], "label": row["verdict"]} for row in reviews()]
    arguments = ["--recipe", "glue", "--model", "roberta", "--data", write_reviews("pairs.csv", rows), "--rank", "8"]
    assert finetune(*arguments, "--text-column", "a,b") == 0
    assert all(row["reload_bit_equal"] for row in results()["methods"])


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "targets"), [("nlg", 7), ("commonsense", 5)])
def test_recipes_of_generation_on_a_tiny_llama(recipe, targets):
    rows = [{"prompt": "the film", "response": row["review"]} for row in reviews()]
    data = write_reviews("answers.jsonl", rows)
    arguments = ["--recipe", recipe, "--model", causal_lm("llama"), "--data", data]
    assert finetune(*arguments) == 0
    rows = results()["methods"]
    assert all(row["metric"] == "perplexity" and 1 < row["held_out"] < math.inf for row in rows)
    assert all(row["held_out_examples"] == 12 for row in rows)
    assert len(adapter_json()["target_modules"]) == targets


def test_the_loss_is_on_the_response_alone():
    save_tokenizer("tokenizer")
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    responses = Prepared([("the good film", "bad book"), ("a", "fine")], partial(encode_response, tokenizer, 5))
    words = {word: tokenizer.convert_tokens_to_ids(word) for word in ("good", "film", "bad", "book", "a", "fine")}
    end = tokenizer.eos_token_id
    # The first is one token too long, and loses the beginning of its prompt.
    first, second = responses[0], responses[1]
    assert first["input_ids"] == [words["good"], words["film"], words["bad"], words["book"], end]
    assert first["labels"] == [IGNORED, IGNORED, words["bad"], words["book"], end]
    batch = DataCollatorForSeq2Seq(tokenizer)([first, second])
    assert batch["labels"][1].tolist() == [IGNORED, words["fine"], end, IGNORED, IGNORED]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--recipe", "sheep"], ["--recipe 'sheep' is unknown", "image, glue, nlg, commonsense"]),
        (["--recipe", "glue"], ["--recipe glue needs --data"]),
        (["--recipe", "glue", "--task", "causal-lm"], ["--recipe glue is for --task text-classification"]),
    ],
)
def test_bad_recipes(arguments, parts, capsys):
    assert main(["finetune", *arguments]) == 2
    message = capsys.readouterr().err
    assert [part for part in parts if part not in message] == []


def test_prompts_need_two_columns(capsys):
    Path("text.txt").write_text("the good film " * 50, encoding="utf-8")
    arguments = ["--task", "causal-lm", "--model", causal_lm("llama"), "--data", "text.txt"]
    assert finetune(*arguments, "--text-column", "prompt,response") == 2
    assert "--data needs two columns" in capsys.readouterr().err
