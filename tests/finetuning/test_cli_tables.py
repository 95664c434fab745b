"""Text for ``goat-kernels finetune``: tables as programs write them, doubtful cells, long texts, chats, tokenizers."""

import json
from pathlib import Path

import pytest
import torch
from test_cli_tasks import COLUMNS, bert, causal_lm, finetune, results, reviews, save_tokenizer, write_reviews
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CanineConfig,
    IBertConfig,
    PerceiverConfig,
    RobertaConfig,
    RobertaModel,
)

from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning.data import describe_classes, read_texts
from goat_kernels.finetuning.models import text_limits

__all__ = ["bert"]  # fixture


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def read(name: str, content: str | bytes, text: str = "text", label: str | None = "label"):
    examples = read_texts("--data", write(name, content), text, label)
    return list(examples.items), examples.labels


EXPECTED = (["one, two", "three"], ["x", "y"])

#: The same table as different programs write it.
TABLES = {
    "capital suffix": ("t.CSV", 'text,label\n"one, two",x\nthree,y\n'),
    "tabs": ("t.Tsv", "label\ttext\nx\tone, two\ny\tthree\n"),
    "tabs under a wrong name": ("t.csv", "text\tlabel\none, two\tx\nthree\ty\n"),
    "semicolons and quotes": ("t.csv", '"id";"text";"label"\r\n1;"one, two";x\r\n2;"three";y\r\n'),
    "utf-16": ("t.csv", 'text,label\n"one, two",x\nthree,y\n'.encode("utf-16")),
    "blank lines": ("t.csv", '\ntext,label\n\n"one, two",x\n ,\nthree,y\n,\n  \n'),
    "trailing separators": ("t.csv", 'text,label\n"one, two",x,,\nthree,y,\n'),
    "another column short": ("t.csv", 'text,label,note\n"one, two",x\nthree,y,n\n'),
    "another column twice": ("t.csv", 'id,text,id,label\n1,"one, two",1,x\n2,three,2,y\n'),
    "spaces": ("t.csv", ' text ,label\t\n"one, two",x \nthree, y\n'),
    "json array": ("t.json", '[{"text": "one, two", "label": "x"}, {"label": "y", "text": "three"}]'),
    "json lines": ("t.JSONL", '{"text": "one, two", "label": "x"}\n\n{"text": "three", "label": "y", "z": 1}\n'),
    "json over lines": ("t.jsonl", '{\n "text": "one, two",\n "label": "x"\n}\n{"text": "three",\n"label": "y"}'),
    "ndjson": ("t.ndjson", '{"z": 1, "text": "one, two", "label": "x"}\r\n{"text": "three", "label": "y"}\r\n'),
}


@pytest.mark.parametrize(("name", "content"), TABLES.values(), ids=TABLES.keys())
def test_tables_are_read_however_they_are_written(name, content):
    assert read(name, content) == EXPECTED


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\x1d"])
def test_only_line_ends_end_a_row(odd):
    rows = f"text,label\nup{odd}down,x\nleft,y\n"
    assert read("t.csv", rows) == ([f"up{odd}down", "left"], ["x", "y"])
    rows = (
        f'{{"text": "up{odd}down", "label": "x"}}\n' if odd > "\x1f" else json.dumps({"text": odd + "a", "label": "x"})
    )
    assert len(read("t.jsonl", rows)[0]) == 1


def test_a_cell_may_be_long_and_the_limit_of_others_stays():
    import csv

    before = csv.field_size_limit()
    texts, _ = read("t.csv", f'text,label\n"{"word " * 60_000}",x\nshort,y\n')
    assert [len(text) for text in texts] == [300_000, 5]
    assert csv.field_size_limit() == before


def test_text_files_end_lines_as_any_system_does():
    assert read("t.txt", b"one\r\ntwo\rthree\n", label=None) == (["one\ntwo\nthree\n"], None)
    Path("t.txt").unlink()
    write(".hidden.txt", "no"), write("b.TXT", "yes")
    Path(".ipynb_checkpoints").mkdir()
    write(".ipynb_checkpoints/b.txt", "no")
    assert list(read_texts("--data", ".", "text", None).items) == ["yes"]


def test_an_array_of_json_is_no_plain_text():
    assert read("t.json", '[{"text": "one"}, {"text": "two"}]', label=None) == (["one", "two"], None)


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(*labels) -> str:
    """JSON lines with these labels."""
    return jsonl(*({"text": "a", "label": label} for label in labels))


#: content -> parts of the message. Files are called like the key's first word.
REFUSED = {
    "t.csv latin-1": ("text,label\nna\xefve,x\n".encode("latin-1"), ["not readable as UTF-8", "saved as UTF-8"]),
    "t.csv NUL": ("text,label\na,x\nb\0,y\n", ["line 3, has a NUL character"]),
    "t.csv utf-16 without mark": ("text,label\na,x\n".encode("utf-16-le"), ["line 1, has a NUL character"]),
    "t.csv open quote": ('text,label\n"a,x\nb,y\n', ["up to line 3, is not a table", "quotes"]),
    "t.csv quote in quotes": ('text,label\n"a "b" c",x\n', ["up to line 2, is not a table", "doubled"]),
    "t.csv many cells": ("text,label\na,x\nb, c,y\n", ["row 2 has 3 cells, but the header has 2"]),
    "t.csv few cells": ("text,label\na,x\nb\n", ["row 2 has nothing in column 'label'"]),
    "t.csv twice": ("label,text,label\nx,a,y\n", ["--label-column 'label' is 2 columns"]),
    "t.csv blank": ("text,label\na,x\n  ,y\n\t,y\n", ["row 2 (and 1 more row) has nothing in column 'text'"]),
    "t.tsv no column": ("words\tlabel\na\tx\n", ["--text-column 'text'", "['words', 'label']"]),
    "t.csv decimals": ("text,label\na,1.5\nb,2\nc,-.25\n", ["decimal numbers (-0.25, 1.5, ...)", "regression"]),
    "t.csv decimal commas": ("text;label\nso, so;4,5\nb;2\nc;-,25\n", ["decimal numbers (-0.25, 4.5, ...)"]),
    "t.csv decimals and NA": ("text,label\na,1.5\nb,NA\nc,2\nd,nan\n", ["decimal numbers (1.5, ...)"]),
    "t.csv decimals and words": ("text,label\na,1.5\nb,unclear\nc,2.5\nd,0.5\n", ["decimal numbers (0.5, 1.5"]),
    "t.jsonl decimals": (table(3.25, 4), ["decimal numbers (3.25, ...)"]),
    "t.jsonl truths": (table(True, "true", 0), ["true and false in row 1 but other values in row 2 (and 1 more row)"]),
    "t.jsonl list label": (table("x", ["x", "y"]), ["row 2 has a list in column 'label'; it needs a class"]),
    "t.jsonl object": (table("x", {"a": 1}), ["row 2 has an object in column 'label'"]),
    "t.jsonl null": (table("x", None, float("nan")), ["row 2 (and 1 more row) has nothing in column 'label'"]),
    "t.jsonl list text": (jsonl({"text": ["a", "b"], "label": "x"}), ["row 1 has a list in column 'text'"]),
    "t.jsonl late column": (jsonl({"label": "x"}, {"text": "a", "label": "y"}), ["row 1 has nothing in column 'text'"]),
    "t.jsonl cut": (
        '{"text": "a", "label": "x"}\n{"text": "b", "la\n{"text": "c", "label": "x"}\n',
        ["line 2, is not JSON"],
    ),
    "t.json cut": ('[{"text": "a", "label": "x"},\n\n {"text": "b"', ["line 3, is not JSON"]),
    "t.json words": ('["a", "b"]', ["line 1, must be a JSON object"]),
    "t.jsonl half a text": (
        jsonl({"text": "a", "label": "x"}, {"text": "fine \ud83d", "label": "y"}),
        ["row 2 has half a character", "in column 'text'"],
    ),
    "t.jsonl half a class": (table("x", "\udc4d"), ["row 2 has half a character", "in column 'label'"]),
    "t.jsonl digits": (
        '{"text": "a", "label": 1}\n{"text": "b", "label": ' + "7" * 6000 + "}",
        ["line 2 or below, has a number too long"],
    ),
    "t.json depth": ("[" * 100_000, ["line 1 or below, has lists or objects nested too deeply"]),
    "t.jsonl depth": ('{"text": "a"}\n' + '{"text":' * 100_000, ["line 2 or below, has lists or objects nested"]),
    "t.jsonl empty": ("\n", ["has no rows"]),
    "t.jsonl chat": (
        jsonl({"text": [{"role": "user", "content": "a"}], "label": "x"}),
        ["has chat messages, which only --task causal-lm can use"],
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_doubtful_tables_are_refused_in_one_line(key):
    content, parts = REFUSED[key]
    with pytest.raises(CommandError) as caught:
        read(key.split()[0], content)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value) and "'t." in str(caught.value)


def test_spaces_around_classes_are_left_out_with_a_warning(capsys):
    assert read("t.csv", "text,label\na,yes\nb,yes \nc, no\n")[1] == ["yes", "yes", "no"]
    assert "warning: --data 't.csv': column 'label' has spaces around the class in 2 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "names"), [(("Yes", "no", "yes"), "'Yes' and 'yes'"), (("1", "1.0", "2"), "'1' and '1.0'")]
)
def test_classes_that_look_alike_are_named(labels, names, capsys):
    assert read("t.csv", "text,label\n" + "".join(f"a,{label}\n" for label in labels))[1] == list(labels)
    assert f"has {names}, which count as different classes" in capsys.readouterr().out


def test_whole_numbers_and_truths_are_classes(capsys):
    assert read("t.csv", "text,label\na,1\nb,NA\nc,0\n")[1] == ["1", "NA", "0"]
    assert read("t.csv", "text,label\na,v2.5\nb,3.5\nc,other\n")[1] == ["v2.5", "3.5", "other"]
    assert read("t.jsonl", table(1.0, 0, 1))[1] == ["1", "0", "1"]
    assert read("t.jsonl", table(True, False))[1] == ["True", "False"]
    assert read("t.csv", "text,label\nNA,1.0\nnull,0.0\n") == (["NA", "null"], ["1.0", "0.0"])
    assert capsys.readouterr().out == ""


def test_a_class_that_the_hub_does_not_tell_is_none(monkeypatch):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"text": ["one", None, "three"], "label": [0, 1, -1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
    with pytest.raises(CommandError, match="row 3 has nothing in column 'label'"):
        read_texts("--data", "someone/texts", "text", "label")
    with pytest.raises(CommandError, match="row 2 has nothing in column 'text'"):
        read_texts("--data", "someone/texts", "text", None)


def test_a_long_list_of_classes_is_cut():
    line = describe_classes([f"class{i}" for i in range(30)], [0, 0, 1], [1])
    assert line.startswith("30 classes (training + held out): class0: 2 + 0, class1: 1 + 1, class2: 0 + 0")
    assert line.endswith("class19: 0 + 0, and 10 more")


def test_classes_are_printed_with_their_counts(bert, capsys):
    data = write_reviews("reviews.csv", reviews(30))
    arguments = ["--task", "text-classification", "--model", bert, "--data", data, *COLUMNS]
    assert finetune(*arguments, "--methods", "head", "--max-steps", "1") == 0
    assert "3 classes (training + held out): blame: 8 + 2, neither: 8 + 2, praise: 8 + 2" in capsys.readouterr().out


def roberta(positions: int) -> str:
    """Whose padding token, 0, takes the first of the positions."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=16, max_position_embeddings=positions, pad_token_id=0, type_vocab_size=1, **sizes)
    RobertaModel(config).save_pretrained("roberta")
    save_tokenizer("roberta")
    return "roberta"


def test_positions_are_those_that_the_model_has():
    config = AutoConfig.from_pretrained(roberta(12))
    assert text_limits(config, AutoModelForSequenceClassification) == (11, 16)


@pytest.mark.long
def test_texts_longer_than_the_model_are_cut_and_counted(capsys):
    rows = reviews(30)
    for i in (3, 4, 20):
        rows[i]["review"] += " the film" * 40
    rows[5]["review"] = " ".join(["good"] * 11)  # just fits
    data = write_reviews("reviews.csv", rows)
    arguments = ["--task", "text-classification", "--model", roberta(12), "--data", data, *COLUMNS]
    assert finetune(*arguments, "--methods", "head", "--max-steps", "4") == 0
    assert "3 of 30 texts are cut to 11 tokens (the model takes no more)" in capsys.readouterr().out
    assert finetune(*arguments, "--methods", "head", "--max-steps", "1", "--max-length", "7", "--overwrite") == 0
    assert "4 of 30 texts are cut to 7 tokens (--max-length 7)" in capsys.readouterr().out


def test_prompts_with_long_responses_are_cut_and_counted(capsys):
    rows = [{"p": "the film", "r": "good" + " book" * (80 if i < 5 else 2)} for i in range(20)]
    arguments = ["--task", "causal-lm", "--model", causal_lm("gpt2"), "--data", write_reviews("t.jsonl", rows)]
    assert finetune(*arguments, "--text-column", "p, r", "--methods", "lora", "--max-steps", "1") == 0
    assert "5 of 20 texts are cut to 64 tokens (the model takes no more)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "columns", "least"), [("text-classification", "text", 1), ("causal-lm", "text,label", 2)]
)
def test_a_length_without_room_for_a_text_is_refused(task, columns, least, bert, capsys):
    if task == "text-classification":
        tokenizer = AutoTokenizer.from_pretrained(bert)
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A [EOS]", special_tokens=[("[EOS]", 2)])
        tokenizer.save_pretrained(bert)
    model = bert if task == "text-classification" else causal_lm("llama")
    data = write("t.csv", "text,label\n" + "a,x\nb,y\n" * 9)
    arguments = ["--task", task, "--model", model, "--data", data, "--text-column", columns, "--max-length", "1"]
    assert finetune(*arguments) == 2
    assert "--max-length 1 leaves no room for a text; it needs at least 2" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(
    ("task", "columns"), [("text-classification", "text"), ("causal-lm", "text"), ("causal-lm", "text,label")]
)
def test_tokens_above_the_embedding_are_refused_where_the_data_has_them(task, columns, bert, capsys):
    model = bert if task == "text-classification" else causal_lm("llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(5)])  # 13 + 5 tokens, 16 rows
    tokenizer.save_pretrained(model)
    arguments = ["--task", task, "--model", model, "--text-column", columns, "--block-size", "4", "--max-steps", "1"]
    arguments += ["--methods", "lora", "--overwrite"]
    rows = "good film,good\nbad film,bad\n" * 10
    assert finetune(*arguments, "--data", write("t.csv", f"text,label\nfine <extra2>,good\n{rows}")) == 0
    assert finetune(*arguments, "--data", write("t.csv", f"text,label\nfine <extra4>,good\n{rows}")) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "its embedding has 16 rows, none for token 17 of its tokenizer, '<extra4>'" in message
    assert "resize_token_embeddings" in message


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        (CanineConfig(hidden_size=32, num_hidden_layers=1, max_position_embeddings=64), (64, None)),
        (IBertConfig(vocab_size=16, hidden_size=24, num_hidden_layers=1, max_position_embeddings=24), (22, 16)),
        (PerceiverConfig(d_model=32, d_latents=32, num_latents=4, max_position_embeddings=48), (48, None)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_without_the_usual_tables_have_limits_too(config, limits):
    assert text_limits(config, AutoModelForSequenceClassification) == limits


TEMPLATE = "{% for m in messages %}{{ m['role'] }} the {{ m['content'] }} {% endfor %}"


def chats(count: int = 40) -> list[dict]:
    words = [("good", "film"), ("bad", "book")]
    return [
        {"chat": [{"role": "a", "content": words[i % 2][0]}, {"role": "a", "content": words[i % 2][1]}]}
        for i in range(count)
    ]


def chat_model(template: str | None) -> str:
    model = causal_lm("llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    return model


def test_chats_go_through_the_tokenizers_template():
    data = write_reviews("t.jsonl", chats())
    arguments = ["--task", "causal-lm", "--model", chat_model(TEMPLATE), "--data", data, "--text-column", "chat"]
    arguments += ["--methods", "lora", "--max-steps", "1", "--block-size", "7"]
    assert finetune(*arguments) == 0
    # "a the good a the film" and the end of text are seven tokens: a block for each chat, a fifth of them held out.
    assert results()["methods"][0]["held_out_examples"] == 8


def test_chats_in_the_cells_of_a_csv_file_are_chats():
    parsed = [row["chat"] for row in chats(4)]
    data = write_reviews("t.csv", [{"chat": json.dumps(chat, indent=i)} for i, chat in enumerate(parsed)])
    assert read_texts("--data", data, "chat", None).items == parsed
    data = write_reviews("t.csv", [{"chat": json.dumps(chat)} for chat in parsed] + [{"chat": "[a text]"}])
    with pytest.raises(CommandError, match="chat messages in some rows and none in row 5"):
        read_texts("--data", data, "chat", None)
    lists = [{"chat": "[1, 2]"}, {"chat": "[3"}, {"chat": "[" * 100_000}]
    assert read_texts("--data", write_reviews("t.csv", lists), "chat", None).items == [row["chat"] for row in lists]
    half = [{"chat": [{"role": "a", "content": "b"}]}, {"chat": [{"role": "a", "content": "fine \ud83d"}]}]
    with pytest.raises(CommandError, match="row 2 has half a character"):
        read_texts("--data", write_reviews("t.jsonl", half), "chat", None)


@pytest.mark.parametrize("swapped", [False, True])
def test_chats_for_training_and_texts_held_out_do_not_mix(swapped, capsys):
    write_reviews("chats.jsonl", chats()), write_reviews("texts.jsonl", [{"chat": "the good film"}] * 40)
    data, held_out = ("texts.jsonl", "chats.jsonl") if swapped else ("chats.jsonl", "texts.jsonl")
    arguments = ["--task", "causal-lm", "--model", chat_model(TEMPLATE), "--text-column", "chat", "--block-size", "7"]
    assert finetune(*arguments, "--data", data, "--eval-data", held_out, "--methods", "lora", "--max-steps", "1") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert ("--eval-data has chat messages" in message) == swapped and "both need the same" in message


@pytest.mark.parametrize(
    ("template", "change", "part"),
    [
        (None, lambda rows: rows, "the tokenizer of --model has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", lambda rows: rows, "row 1 does not fit the tokenizer's chat"),
        (TEMPLATE, lambda rows: [*rows, {"chat": "a text"}], "chat messages in some rows and none in row 41"),
    ],
    ids=["no template", "refused by it", "mixed"],
)
def test_chats_that_cannot_be_used_are_refused(template, change, part, capsys):
    data = write_reviews("t.jsonl", change(chats()))
    arguments = ["--task", "causal-lm", "--model", chat_model(template), "--data", data, "--text-column", "chat"]
    assert finetune(*arguments) == 2
    assert part in capsys.readouterr().err.strip().splitlines()[-1]


def test_chats_are_no_prompts(capsys):
    rows = [{"chat": row["chat"], "answer": "good"} for row in chats()]
    arguments = ["--task", "causal-lm", "--model", chat_model(TEMPLATE), "--data", write_reviews("t.jsonl", rows)]
    assert finetune(*arguments, "--text-column", "chat,answer") == 2
    assert "column 'chat' has chat messages" in capsys.readouterr().err
