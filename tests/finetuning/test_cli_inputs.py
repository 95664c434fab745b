"""Bad input to the command line: one line on stderr that names the argument, its value and what it needs; exit 2."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image
from transformers import BertConfig, GPT2Config, ViTConfig

from goat_kernels.cli import main
from goat_kernels.finetuning import pretraining
from goat_kernels.finetuning.pretraining import CACHE_VARIABLE
from goat_kernels.rules import INIT_RULES, SCALING_RULES


@pytest.fixture(autouse=True)
def _inputs(monkeypatch, tmp_path):
    """Models without weights (no case may get as far as reading them) and data with one fault each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    # Read at import from HF_HUB_OFFLINE; without it the libraries spend half a minute on retries.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    ViTConfig(hidden_size=32, num_hidden_layers=1).save_pretrained("vit")
    BertConfig(hidden_size=32, num_hidden_layers=1).save_pretrained("bert")
    GPT2Config(n_embd=32, n_layer=1).save_pretrained("gpt2")
    Path("empty").mkdir()
    Path("photos/cats").mkdir(parents=True)
    Path("photos/cats/a.png").touch()
    Path("pictures/cats").mkdir(parents=True)
    Image.new("L", (4, 4)).save("pictures/cats/a.png")
    files = {
        "data.csv": "text,label\nhello,a\nworld,b\n",
        "header.csv": "text,label\n",
        "gap.csv": "text,label\nhello,a\nworld,\n",
        "broken.jsonl": '{"text": "a", "label": "x"}\n{"text": \n',
        "list.jsonl": "[1, 2]\n",
        "blank.txt": "  \n",
        "words.txt": "some words",
    }
    for name, content in files.items():
        Path(name).write_text(content, encoding="utf-8")
    Path("latin.txt").write_bytes("caf\xe9".encode("latin-1"))


TEXT = ["--task", "text-classification", "--model", "bert"]
IMAGE = ["--task", "image-classification", "--model", "vit"]
LM = ["--task", "causal-lm", "--model", "gpt2"]

#: arguments -> parts of the message: the argument, its value, what it needs.
CASES = {
    "unknown task": (["--task", "poetry"], ["--task 'poetry'", "image-classification"]),
    "task without model": (["--task", "causal-lm", "--data", "words.txt"], ["--task causal-lm needs --model"]),
    "task without data": (TEXT, ["--task text-classification needs --data"]),
    "model without task": (["--model", "vit"], ["--model 'vit' needs a --task"]),
    "eval data without task": (["--eval-data", "data.csv"], ["--eval-data 'data.csv' needs --task"]),
    "unknown method": (["--methods", "goat,sheep"], ["--methods 'goat,sheep'", "'sheep'", "head, full, lora, rslora"]),
    "no method": (["--methods", ","], ["--methods ','", "nothing"]),
    "head of a language model": ([*LM, "--data", "words.txt", "--methods", "head"], ["--methods 'head'", "classifier"]),
    "rank and experts": (["--rank", "36"], ["--rank=36", "divisible by --experts=8"]),
    "top-k above experts": (["--top-k", "9"], ["--top-k=9", "1..", "--experts=8"]),
    "rank too large": (["--rank", "128"], ["64 singular values", "--rank=128", "at most 64"]),
    "unknown init": (["--init", "magic"], ["--init='magic'", *INIT_RULES]),
    "unknown scaling": (["--scaling", "magic"], ["--scaling='magic'", *SCALING_RULES, "positive number"]),
    "negative scaling": (["--scaling", "-1"], ["--scaling=-1.0", "above 0"]),
    "unknown residual": (["--residual", "magic"], ["--residual='magic'", "path, fold"]),
    "unknown backend": (["--backend", "magic"], ["--backend='magic'", "auto, triton, torch"]),
    "negative rho": (["--rho", "-1"], ["--rho", "'-1'", "above 0"]),
    "rank of zero": (["--rank", "0"], ["--rank", "'0'", "at least 1"]),
    "rank of half": (["--rank", "1.5"], ["--rank", "'1.5'", "whole number"]),
    "dropout of one": (["--dropout", "1"], ["--dropout", "'1'", "below 1"]),
    "eval fraction": (["--eval-fraction", "nan"], ["--eval-fraction", "'nan'", "above 0 and below 1"]),
    "device": (["--device", "tpu"], ["--device", "'tpu'", "auto"]),
    "learning rate": (["--learning-rate", "fast"], ["--learning-rate 'fast'", "positive number"]),
    "learning rate of whom": (["--learning-rate", "1,2"], ["--learning-rate '1,2'", "full=1e-5"]),
    "learning rate of nobody": (["--learning-rate", "sheep=1"], ["--learning-rate 'sheep=1'", "'sheep'", "goat"]),
    "epochs and steps": (["--epochs", "2", "--max-steps", "5"], ["--epochs 2", "--max-steps 5", "exclude"]),
    "resume and overwrite": (["--resume", "--overwrite"], ["--resume", "--overwrite", "exclude"]),
    "target modules": (["--target-modules", "nothing"], ["--target-modules ('nothing',)", "does not fit"]),
    "module pattern": (["--target-modules", "q_(proj"], ["--target-modules", "'q_(proj'", "regular expression"]),
    "excluded pattern": (["--exclude-modules", "[a"], ["--exclude-modules", "'[a'", "regular expression"]),
    "excluded nothing": (["--exclude-modules", "fc1,sheep"], ["--exclude-modules 'sheep' matches no module"]),
    "excluded everything": (
        ["--target-modules", "fc1", "--exclude-modules", ".*fc."],
        ["--target-modules ('fc1',) without --exclude-modules '.*fc.' does not fit"],
    ),
    "skipping texts": ([*TEXT, "--data", "data.csv", "--skip-bad-files"], ["--skip-bad-files is for --task image-c"]),
    "bad image": ([*IMAGE, "--data", "photos"], ["1 of 1 images cannot be read: cats/a.png", "--skip-bad-files"]),
    "bad images alone": ([*IMAGE, "--data", "photos", "--skip-bad-files"], ["cats/a.png", "There is no other"]),
    "missing model": ([*TEXT[:3], "./nowhere", "--data", "data.csv"], ["--model './nowhere' does not exist", "folder"]),
    "empty model": ([*TEXT[:3], "empty", "--data", "data.csv"], ["--model 'empty' has no config.json"]),
    "model on the hub": (
        [*TEXT[:3], "someone/model", "--data", "data.csv"],
        ["--model 'someone/model'", "neither a local folder", "network"],
    ),
    "image model for text": ([*TEXT[:3], "vit", "--data", "data.csv"], ["--model 'vit'", "'vit' model", "--task"]),
    "no tokenizer": ([*TEXT, "--data", "data.csv"], ["--model 'bert' has no tokenizer"]),
    "missing data": ([*IMAGE, "--data", "./nowhere"], ["--data './nowhere' does not exist", "subfolder"]),
    "file for folder": ([*IMAGE, "--data", "data.csv"], ["--data 'data.csv' is a file", "subfolder"]),
    "empty folder": ([*IMAGE, "--data", "empty"], ["--data 'empty' holds no class subfolders", "one subfolder"]),
    "one class": ([*IMAGE, "--data", "pictures"], ["--data has one class, 'cats'", "at least two"]),
}

#: The same for the reading of texts, which the command reaches only with a tokenizer.
READING = {
    "no such column": (("data.csv", "review", "label"), ["--text-column 'review'", "'data.csv'", "['text', 'label']"]),
    "no such label": (("data.csv", "text", "verdict"), ["--label-column 'verdict'", "'data.csv'", "['text', 'label']"]),
    "no rows": (("header.csv", "text", "label"), ["--data 'header.csv' has no rows"]),
    "a gap": (("gap.csv", "text", "label"), ["row 2", "column 'label'"]),
    "broken line": (("broken.jsonl", "text", "label"), ["'broken.jsonl', line 2, is not JSON"]),
    "not an object": (("list.jsonl", "text", "label"), ["'list.jsonl', line 1", "object"]),
    "text without classes": (
        ("words.txt", "text", "label"),
        ["--data 'words.txt' has no columns", "CSV, TSV, JSON or JSONL"],
    ),
    "blank text": (("blank.txt", "text", None), ["--data 'blank.txt' holds no text"]),
    "other encoding": (("latin.txt", "text", None), ["--data 'latin.txt'", "UTF-8"]),
    "data on the hub": (("someone/data", "text", None), ["--data 'someone/data'", "network"]),
}


@pytest.fixture
def tiny_pretraining(monkeypatch):
    """The demonstration's model at its real width (for the check of the rank), but hardly trained."""
    monkeypatch.setattr(pretraining, "PRETRAINING", pretraining.Pretraining(layers=1, steps=1))


@pytest.mark.parametrize(("arguments", "parts"), CASES.values(), ids=CASES.keys())
def test_bad_input(arguments, parts, capsys, tiny_pretraining):
    assert main(["finetune", *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("goat-kernels finetune: error: ")
    assert [part for part in parts if part not in message] == [], message
    assert not Path("goat-output").exists()


@pytest.mark.parametrize(("arguments", "parts"), READING.values(), ids=READING.keys())
def test_bad_text_data(arguments, parts):
    from goat_kernels.command_errors import CommandError
    from goat_kernels.finetuning.data import read_texts

    with pytest.raises(CommandError) as caught:
        read_texts("--data", *arguments)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_command(capsys):
    assert main(["shear"]) == 2
    assert "'shear'" in capsys.readouterr().err


def test_data_from_the_hub_needs_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["finetune", *IMAGE, "--data", "someone/data"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "datasets is not installed; it needs pip install 'goat-kernels[demo]'" in message


def test_a_package_that_is_not_installed_is_named_with_the_extra(monkeypatch, capsys):
    for name in ("run", "results"):
        monkeypatch.delitem(sys.modules, f"goat_kernels.finetuning.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "tabulate", None)
    assert main(["finetune"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "tabulate is not installed; it needs pip install 'goat-kernels[demo]'" in message


HEAVY = ("torch", "transformers", "peft", "sklearn", "matplotlib", "numpy", "PIL")


def test_help_imports_nothing_heavy():
    """The command line alone, without what ``goat_kernels/__init__.py`` imports, which is not its business."""
    script = textwrap.dedent(
        f"""
        import sys, types
        package = types.ModuleType("goat_kernels")
        package.__path__ = [sys.argv[1]]
        sys.modules["goat_kernels"] = package
        from goat_kernels.cli import main
        try:
            main(["finetune", "--help"])
        except SystemExit as end:
            assert end.code == 0
        print([name for name in {HEAVY} if name in sys.modules])
        """
    )
    import goat_kernels

    folder = os.path.dirname(goat_kernels.__file__)
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    *shown, heavy = done.stdout.strip().splitlines()
    assert heavy == "[]"
    assert "Ctrl-C while a method trains leaves a checkpoint" in "\n".join(shown)


def test_help_lists_every_option_and_rule(capsys):
    with pytest.raises(SystemExit) as end:
        main(["finetune", "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in (*INIT_RULES, *SCALING_RULES, "--methods", "--resume", "--overwrite", "--eval-data", "[:CONFIG]"):
        assert name in shown


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "goat_kernels", "--help"], capture_output=True, text=True, check=True)
    assert "finetune" in done.stdout
