"""What docs/ says about PEFT, trainers and engines: the tests it names exist, and its list of fields is whole."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import peft
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from peft_tiny_models import tiny_llama

from goat_kernels.peft import GoatConfig
from goat_kernels.settings import AdapterSettings

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"


def sources() -> dict[str, Path]:
    return {path.stem: path for path in TESTS.rglob("test_*.py")}


@pytest.mark.parametrize("document", ["peft", "training", "distributed", "integrations"])
def test_the_tests_that_a_document_names_exist(document):
    text, found = (DOCS / f"{document}.md").read_text(), sources()
    for file, function in re.findall(r"`(test_\w+)::(\w+)`", text):
        assert file in found, f"{document}.md names {file}"
        assert f"def {function}(" in found[file].read_text(), f"{document}.md names {file}::{function}"
    for file in re.findall(r"`(\w+/test_\w+\.py)`", text):
        assert (TESTS / file).is_file(), f"{document}.md names {file}"


def test_every_row_of_the_page_for_peft_users_names_a_test():
    tables = (DOCS / "peft.md").read_text().partition("## Fields")[2].partition("## Converting")[0]
    rows = [line for line in tables.splitlines() if line.startswith("| ") and not line.endswith("| test |")]
    assert len(rows) > 30
    assert [row for row in rows if not re.search(r"`test_\w+::test_\w+` \|$", row)] == []


def names(config) -> set[str]:
    return {field.name for field in dataclasses.fields(config) if field.init}


def test_the_table_of_hyper_parameters_is_what_the_settings_declare():
    declared = []
    for field in dataclasses.fields(AdapterSettings):
        name = "lora_dropout" if field.name == "dropout" else field.name
        default = GoatConfig.__dataclass_fields__[name].default
        declared.append(f"| `{name}` | `{default!r}` | {field.metadata['help']} |")
    table = (DOCS / "peft.md").read_text().partition("## Hyper-parameters")[2].partition("## Fields")[0]
    assert [line for line in table.splitlines() if line.startswith("| `")] == declared
    for kind in (AdapterSettings, GoatConfig):
        for field in dataclasses.fields(AdapterSettings):
            assert f": {field.metadata['help']}" in kind.__doc__


def test_fields_that_are_not_available():
    (row,) = re.findall(r"^\| (`use_dora`.*?) \|", (DOCS / "peft.md").read_text(), re.M)
    documented = set(re.findall(r"`(\w+)`", row))
    called_otherwise = {"use_rslora", "init_lora_weights", "fan_in_fan_out"}
    missing = names(LoraConfig) - names(GoatConfig) - called_otherwise
    if peft.__version__.startswith("0.21."):
        assert documented == missing
    assert not documented & names(GoatConfig)
    for name in missing:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            GoatConfig(**{name: None})


def test_loading_without_the_import(tmp_path, monkeypatch):
    get_peft_model(tiny_llama(), GoatConfig(r=8, num_experts=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    monkeypatch.delitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, "GOAT")  # what the import puts there
    with pytest.raises(KeyError, match="GOAT"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
