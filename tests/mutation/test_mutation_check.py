"""The list of mutants fits the code, and the check tells a caught one from one that nobody notices."""

from __future__ import annotations

import ast
import re
from dataclasses import replace

import pytest
from mutation_check import CAUGHT, ROOT, SURVIVED, Mutant, check, read_mutants

MUTANTS = read_mutants()

#: The quickest to judge; all of them: python tests/mutation/run.py
SAMPLE = ("goat-s-upside-down", "odd-slots-repeat-even-ones")


def test_there_are_mutants_of_every_part():
    assert len(MUTANTS) >= 40 and len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    files = (ROOT / "goat_kernels" / "kernels").glob("*.py")
    kernels = {path.name for path in files if "\n@triton.jit" in path.read_text(encoding="utf-8")}
    assert kernels <= {mutant.file.removeprefix("kernels/") for mutant in MUTANTS}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutants_line_is_there_and_its_tests_are(mutant):
    ast.parse(mutant.apply((ROOT / "goat_kernels" / mutant.file).read_text(encoding="utf-8")))
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert re.search(rf"^def {name.partition('[')[0]}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), test


def test_a_mutant_whose_line_is_gone_is_an_error(tmp_path):
    for old in ("there is no such line", "import"):
        gone = replace(MUTANTS[0], old=old)
        with pytest.raises(ValueError, match="Where the line was rewritten, rewrite the mutant"):
            list(check([gone], tmp_path))


@pytest.mark.long
def test_caught_and_survived_are_told_apart(tmp_path):
    before = (ROOT / "goat_kernels" / "rules.py").read_text()
    harmless = Mutant(
        name="harmless",
        file="rules.py",
        old="lora_alpha / D",
        new="lora_alpha / float(D)",
        breaks="nothing",
        tests=("tests/test_initialisation.py::test_every_scaling_rule_is_its_formula",),
    )
    verdicts = list(check([*(m for m in MUTANTS if m.name in SAMPLE), harmless], tmp_path, with_baseline=False))
    assert {verdict.mutant.name: verdict.status for verdict in verdicts} == {
        **dict.fromkeys(SAMPLE, CAUGHT),
        "harmless": SURVIVED,
    }
    assert all(verdict.test.startswith(verdict.mutant.tests[0].partition("::")[0]) for verdict in verdicts[:-1])
    assert (ROOT / "goat_kernels" / "rules.py").read_text() == before
