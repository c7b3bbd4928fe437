"""A console that lacks a text's characters, as Windows' and a bare container's do: the text is printed all the same."""

import pytest

from tests.conventions.rules import ROOT
from tests.tools.examples import EXAMPLES, ask


@pytest.mark.parametrize("project", EXAMPLES)
def test_a_text_is_printed_in_the_consoles_characters(project, pythons, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    answer = ask(pythons(project), ROOT, project, tmp_path, model="gpt2-nano", prompt="我☕", new_tokens=2)
    assert answer.status == 0, answer.stderr
    assert "\\u6211\\u2615" in answer.stdout
