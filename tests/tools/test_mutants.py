"""make mutants: every fault still fits the code, and a killed one is reported as killed."""

import ast
import shlex

import pytest

from tests.conventions.rules import ROOT
from tests.tools import mutants

LISTED = mutants.read_mutants(ROOT)


def test_every_environment_has_faults():
    assert {mutant.env for mutant in LISTED} >= {"shared", "jax", "neuron", "qaic", "tripy"}
    assert len(LISTED) >= 80


@pytest.mark.parametrize("mutant", LISTED, ids=lambda mutant: f"{mutant.env}: {mutant.about}")
def test_the_fault_fits_the_code(mutant):
    text = mutant.text(ROOT)
    if mutant.file.endswith(".py"):
        ast.parse(text)
    paths = [word.partition("::")[0] for word in shlex.split(mutant.tests) if word.startswith("tests/")]
    assert paths and all((ROOT / path).exists() for path in paths)


CODE = "def double(x):\n    return 2 * x\n\n\ndef unused():\n    return 1\n"
TEST = "from code_under_test import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
FAULTS = """
[[mutant]]
about = "triples"
file = "code_under_test.py"
right = "2 * x"
wrong = "3 * x"
tests = "tests/alpha"
[[mutant]]
about = "no test calls it"
file = "code_under_test.py"
right = "return 1"
wrong = "return 2"
tests = "tests/alpha"
"""


def test_killed_survived_and_the_file_restored(checkout, add_file, tmp_path_factory, monkeypatch, capsys):
    add_file("code_under_test.py", CODE)
    add_file("tests/alpha/test_it.py", TEST)
    add_file("tests/alpha/mutants.toml", FAULTS)
    monkeypatch.setattr(mutants, "ROOT", checkout)
    scratch = tmp_path_factory.mktemp("scratch")
    counts = mutants.try_all(mutants.read_mutants(checkout), 1, scratch)
    assert counts == {("alpha", "killed"): 1, ("alpha", "survived"): 1}
    assert mutants.report(counts) == "alpha: 1 killed of 2, 1 survived"
    assert (scratch / "0" / "code_under_test.py").read_text(encoding="utf-8") == CODE
    assert "survived  alpha" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "outcome"), [(0, "survived"), (1, "killed"), (2, "broken"), (4, "broken"), (5, "broken")]
)
def test_only_failed_tests_kill(status, outcome):
    mutant = mutants.Mutant("alpha", "about", "file", "right", "wrong", "tests")
    assert mutants.outcome_of(mutant, status) == outcome


def test_tests_that_fail_without_a_fault_prove_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "copy_repository", lambda root, copy: copy)
    monkeypatch.setattr(mutants, "run_tests", lambda *_: (1, "red"))
    with pytest.raises(SystemExit, match="must pass without a fault"):
        mutants.try_all([mutants.Mutant("alpha", "about", "file", "right", "wrong", "tests")], 1, tmp_path)
