"""How an example ends when the model has a bug, and what it prints where the console lacks a character."""

import re

import pytest

from tests.contract.places import copy_of
from tests.conventions.rules import ROOT
from tests.tools.examples import EXAMPLES, ask

FIRST_LINE_OF_MLP = re.compile(r"class MLP\b.*?\n    def (?:forward|__call__)\(.*?:\n", re.S)
BUG = "        import numpy; numpy.ones(2) + numpy.ones(3)\n"


@pytest.mark.parametrize("project", EXAMPLES)
def test_a_bug_in_the_model_keeps_its_traceback(project, pythons, tmp_path):
    """A broken broadcast is a ValueError, and so is a user's mistake: only what is read may end in one line."""
    root = copy_of(project, tmp_path / "root")
    file = root / project / "model.py"
    text, count = FIRST_LINE_OF_MLP.subn(lambda match: match[0] + BUG, file.read_text(encoding="utf-8"))
    assert count == 1
    file.write_text(text, encoding="utf-8")
    answer = ask(pythons(project), root, project, tmp_path, model="gpt2-nano", prompt="To be", new_tokens=2)
    assert answer.status == 1 and not answer.dump
    assert "Traceback (most recent call last)" in answer.stderr and f"{project}/model.py" in answer.stderr
    assert "operands could not be broadcast together" in answer.stderr


@pytest.mark.parametrize("project", EXAMPLES)
def test_a_text_is_printed_in_the_consoles_characters(project, pythons, tmp_path, monkeypatch):
    """As on Windows and in a bare container."""
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    answer = ask(pythons(project), ROOT, project, tmp_path, model="gpt2-nano", prompt="我☕", new_tokens=2)
    assert answer.status == 0, answer.stderr
    assert "\\u6211\\u2615" in answer.stdout
