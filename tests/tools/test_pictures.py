"""The pictures of README.md and BENCHMARKS.md show today's code and the results kept here."""

import json

import pytest

from tests.conventions.rules import ROOT
from tests.tools import pictures, tables


@pytest.fixture(scope="module")
def drawn():
    document = json.loads((tables.FIGURES / "bench.json").read_text(encoding="utf-8"))
    return pictures.draw(ROOT, document)


@pytest.mark.parametrize("name", ["attention.svg", "roofline.svg", "timeline.svg"])
def test_a_picture_is_that_of_the_code_and_the_results(name, drawn):
    kept = (tables.FIGURES / name).read_text(encoding="utf-8")
    assert kept == drawn[name], "run python -m tests.tools.tables"
    assert any(
        f"](tests/tools/figures/{name})" in (ROOT / page).read_text("utf-8") for page in ("README.md", "BENCHMARKS.md")
    )


def test_every_mark_is_on_a_line_of_code():
    lines = "\n".join(line for project in pictures.SHOWN for line, _ in pictures.marked_lines(ROOT, project))
    parts = [part for marks in pictures.MARKS.values() for part in marks]
    assert [part for part in parts if part not in lines] == []
    assert all(
        {mark for _, mark in pictures.marked_lines(ROOT, project)} >= {*pictures.MARKS} for project in pictures.SHOWN
    )


def test_a_long_line_is_wrapped_without_its_comment():
    line = "    keys, values = keys.scatter(2, index, k), values.scatter(2, index, v)  # B, H, S, D"
    assert pictures.wrap(line) == [
        "    keys, values = keys.scatter(2, index, k),",
        "        values.scatter(2, index, v)",
    ]
    assert pictures.wrap("x = 1  # B") == ["x = 1  # B"]
    assert pictures.wrap("x" * 100) == ["x" * 100]  # there is no space


def test_the_timeline_is_of_the_projects_that_were_measured():
    document = json.loads((tables.FIGURES / "bench.json").read_text(encoding="utf-8"))
    null = {"decode": None, "prefill": None}
    failed = [row | null if row["name"] == "qaic_gpt2" else row for row in document["rows"]]
    drawn = pictures.draw_timeline(document | {"rows": failed})
    assert "neuron_nanogpt" in drawn and "qaic_gpt2" not in drawn


def test_a_bar_is_filled_up_to_what_was_measured():
    rows = [{"ours": True, "model": "gpt2", "name": "abacus", "dtype": "float32", "decode": {"tokens_per_s": 20}}]
    machine = {"bandwidth": 20e9, "float32": 1e11, "cpu": "a CPU"}
    *devices, (name, allowed, measured) = pictures.bars({"machine": machine, "rows": rows}, "decode")
    assert (name, measured) == ("this CPU: abacus", 20) and 30 < allowed < 45
    assert devices and not any(rate for _, _, rate in devices)
