"""``--output`` of ``goat-kernels finetune``: --overwrite removes what the command wrote and nothing else."""

import json
from pathlib import Path

import pytest
from test_cli_finetune import finetune, tiny_demo

from goat_kernels.cli import main

__all__ = ["tiny_demo"]  # fixture


def files(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def write(name: str, text: str = "mine") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


MINE = (
    "plan.md",
    "figures/loss.svg",
    "lora/why it failed.txt",
    "lora/adapter/seed 3.txt",
    "full/model/notes/a.txt",
    "full/model/model_backup.safetensors",
    "full/model/model-best.safetensors",
    "full/model/model-00001-of-00002.bak.safetensors",
    "x.json",
)


@pytest.mark.long
def test_overwriting_keeps_what_the_command_did_not_write(tiny_demo, capsys):
    assert finetune("--methods", "full,lora", "--save-steps", "2", "--max-steps", "2") == 0
    mine = [write(f"goat-output/{name}") for name in MINE]
    written = files("goat-output") - set(MINE)
    # The next run has another method beside one of the first.
    assert finetune("--methods", "lora,goat", "--overwrite") == 0
    assert all(path.read_text() == "mine" for path in mine)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("kept in goat-output"))
    assert "plan.md" in line and "and 4 more" in line
    assert {name for name in written if name.startswith("full/")}.isdisjoint(files("goat-output"))
    assert {"lora/result.json", "lora/adapter/adapter_model.safetensors", "goat/result.json"} <= files("goat-output")


@pytest.mark.long
def test_overwriting_leaves_nothing_of_an_interrupted_run(tiny_demo, capsys):
    assert finetune("--methods", "head") == 0
    for left in (
        "goat/checkpoints/checkpoint-20/trainer_state.json",
        "goat/checkpoints/checkpoint-20/rng_state.pth",
        "goat/checkpoints/checkpoint-20/adapter_model.safetensors",
        "goat/.adapter.1f.tmp/adapter_config.json",
        "goat/adapter/.goat-save.0a1b2c3d.tmp/adapter_config.json",
        "dora/.trained.json.77.tmp",
        ".results.png.77.tmp",
    ):
        write(f"goat-output/{left}")
    assert finetune("--methods", "head", "--overwrite") == 0
    assert "kept in" not in capsys.readouterr().out
    assert {path.name for path in Path("goat-output").iterdir()} == {"run.json", "head", "results.json", "results.png"}


@pytest.mark.long
def test_overwriting_removes_a_link_and_never_its_target(tiny_demo):
    assert finetune("--methods", "head") == 0
    report = write("elsewhere/report.json")
    weights = write("elsewhere/model/model.safetensors")
    output = Path("goat-output")
    (output / "results.json").unlink()
    (output / "results.json").symlink_to(report.absolute())
    (output / "lora").mkdir()
    (output / "lora" / "adapter").symlink_to(weights.parent.absolute())
    (output / "data").symlink_to(report.parent.absolute())
    assert finetune("--methods", "head,lora", "--overwrite") == 0
    assert report.read_text() == "mine" and weights.read_text() == "mine"
    assert files("elsewhere") == {"report.json", "model/model.safetensors"}
    assert not (output / "results.json").is_symlink() and not (output / "lora" / "adapter").is_symlink()
    assert (output / "data").is_symlink(), "no name of this command's"


def test_resuming_removes_what_the_command_half_wrote_and_nothing_else(tiny_demo):
    assert finetune("--methods", "head") == 0
    mine = [write(f"goat-output/{name}") for name in (".cache.tmp/a.txt", ".notes.1f.tmp", "head/.adapter.1f.tmp/b.md")]
    half = [
        write(f"goat-output/{name}")
        for name in (
            ".results.json.77.tmp",
            "head/.result.json.1f.tmp",
            "head/.adapter.1f.tmp/adapter_config.json",
            "lora/adapter/.goat-save.0a1b.tmp/adapter_config.json",
        )
    ]
    assert finetune("--methods", "head", "--resume") == 0
    assert [path for path in mine if not path.is_file()] == []
    assert [path for path in half if path.exists()] == []


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
@pytest.mark.parametrize(
    ("note", "part"),
    [
        ("results.json/note.txt", "results.json' is a folder, and this command writes a file of that name"),
        ("head/result.json/note.txt", "result.json' is a folder, and this command writes a file"),
        ("lora", "lora' is a file, and this command writes a folder of that name"),
    ],
)
def test_another_thing_under_a_name_of_the_commands_is_refused_before_training(note, part, option, tiny_demo, capsys):
    write("goat-output/run.json", json.dumps({"options": {}}))
    path = write(f"goat-output/{note}")
    before = files("goat-output")
    assert finetune("--methods", "head", option) == 2
    assert part in capsys.readouterr().err.strip().splitlines()[-1]
    assert path.read_text() == "mine" and files("goat-output") == before


@pytest.mark.long
@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_a_link_to_a_folder_where_a_file_goes_is_replaced(option, tiny_demo):
    assert finetune("--methods", "head") == 0
    figure, note = Path("goat-output/results.png"), write("elsewhere/note.txt")
    figure.unlink(missing_ok=True)
    figure.symlink_to(note.parent.absolute())
    assert finetune("--methods", "head", option) == 0
    assert figure.is_file() and not figure.is_symlink() and note.read_text() == "mine"


@pytest.mark.long
def test_overwriting_refuses_what_lies_among_checkpoints(tiny_demo, capsys):
    assert finetune("--methods", "head") == 0
    note = write("goat-output/lora/checkpoints/checkpoint-3/note.txt")
    before = files("goat-output")
    assert finetune("--methods", "head", "--overwrite") == 2
    assert "checkpoint-3/note.txt' was not written by this command" in capsys.readouterr().err
    assert files("goat-output") == before and note.read_text() == "mine"


@pytest.fixture
def run_with_inputs(monkeypatch, tmp_path):
    """A folder that looks like an earlier run, with inputs inside and outside of it."""
    monkeypatch.chdir(tmp_path)
    write("out/run.json", '{"options": {}}')
    write("out/reviews.csv", "text,label\n")
    write("out/full/model/config.json", "{}")
    write("outer/photos/cat/a.png")
    write("outside.csv", "text,label\n")
    write("model/config.json", "{}")
    Path("link.csv").symlink_to(Path("out/reviews.csv").absolute())
    Path("way").symlink_to(Path("out").absolute())
    return tmp_path


INSIDE = {
    "data": (["--data", "out/reviews.csv"], "--data 'out/reviews.csv' lies in --output 'out'"),
    "data by a link": (["--data", "link.csv"], "--data 'link.csv' lies in --output 'out'"),
    "data is output": (["--data", "./out"], "--data './out' lies in --output 'out'"),
    "eval data": (["--eval-data", "out/reviews.csv"], "--eval-data 'out/reviews.csv' lies in --output"),
    "model": (["--model", "out/full/model"], "--model 'out/full/model' lies in --output"),
    "output by a link": (["--output", "way", "--data", "out/reviews.csv"], "lies in --output 'way'"),
    "output in data": (["--data", "outer", "--output", "outer/photos/new"], "lies in --data 'outer'"),
    "output in model": (["--output", "model/new"], "--output 'model/new' lies in --model 'model'"),
}


@pytest.mark.parametrize("resume", ["--overwrite", "--resume", None])
@pytest.mark.parametrize(("arguments", "part"), INSIDE.values(), ids=INSIDE.keys())
def test_inputs_in_the_output_folder_are_refused(arguments, part, resume, run_with_inputs, capsys):
    before = files(".")
    usual = ["--task", "text-classification", "--model", "model", "--data", "outside.csv", "--output", "out"]
    assert main(["finetune", *usual, *arguments, *([resume] if resume else [])]) == 2
    assert part in capsys.readouterr().err
    assert files(".") == before


@pytest.mark.long
def test_a_run_of_before_an_option_was_there_can_be_resumed(tiny_demo, capsys):
    assert finetune("--methods", "head") == 0
    file = Path("goat-output/run.json")
    content = json.loads(file.read_text())
    del content["options"]["exclude_modules"], content["options"]["skip_bad_files"]
    file.write_text(json.dumps(content))
    assert finetune("--methods", "head", "--resume") == 0
    assert finetune("--methods", "head", "--resume", "--exclude-modules", "query") == 2
    assert "--exclude-modules is ['query']" in capsys.readouterr().err
