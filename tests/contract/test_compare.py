"""Parity's messages about an answer with one mistake in it; the answer starts as transformers' own."""

import json

import numpy as np
import pytest

from shared.sampling import Sampler
from tests.contract.parity import LIMIT, Case, compare, table, write_report
from tests.tools.examples import Answer

SHORT = Case("short", "To be, or not to be", 24)


@pytest.fixture
def right(referee):
    prompt = referee.encode(SHORT.prompt)
    text = referee.generate(tuple(prompt), SHORT.new_tokens)
    logits = referee.logits(text, len(prompt)).copy()
    return {"prompt_ids": np.array(prompt), "tokens": np.array(text[len(prompt) :]), "logits": logits}


@pytest.fixture
def outcome_of(referee):
    def outcome_of(dump, case=SHORT, project="qaic_gpt2", status=0, stderr=""):
        outcome = compare(project, "gpt2-nano", case, Answer(status, "", stderr, 1.0, dump), referee)
        assert all(error.startswith(f"{project} (gpt2-nano, the prompt 'short'): ") for error in outcome.errors)
        return outcome

    return outcome_of


@pytest.fixture
def errors(outcome_of):
    return lambda *args, **answer: "\n".join(outcome_of(*args, **answer).errors)


def set_logit(value):
    return lambda dump: dump["logits"][5].put(7, value(dump["logits"][5, 7]))


def other_prompt(dump):
    dump["prompt_ids"][3] += 1


def one_token_less(dump):
    dump.update(tokens=dump["tokens"][:-1], logits=dump["logits"][:-1])


def one_column_less(dump):
    dump["logits"] = dump["logits"][:, :-1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_prompt, "prompt ids differ from transformers' at 3: "),
        (set_logit(lambda logit: logit + 1.5 * LIMIT), "at 1 of 24 positions, first at 12, new token 5"),
        (set_logit(lambda logit: np.nan), "at 1 of 24 positions, first at 12, new token 5"),
        (one_token_less, "23 tokens were written, must be 24"),
        (one_column_less, "logits have the shape (24, 1407)"),
    ],
)
def test_one_mistake_is_found(spoil, message, right, errors):
    assert errors(right) == ""
    spoil(right)
    assert message in errors(right)


def test_another_token_is_shown_with_both_texts(right, errors):
    right["tokens"][3] = right["logits"][3].argsort()[-2]
    first, both, ours, theirs = errors(right).splitlines()[:4]
    assert first.endswith("the texts differ from position 10:")
    assert both.split()[0] == "both" and ours.split()[0] == "qaic_gpt2" and theirs.split()[0] == "transformers"
    assert ours.partition("'")[2] != theirs.partition("'")[2]


def test_of_two_logits_that_tie_either_may_be_taken(right, outcome_of):
    third, second = right["logits"][3].argsort()[-3:-1]
    right["tokens"][3] = second
    right["tokens"], right["logits"] = right["tokens"][:4], right["logits"][:4]  # what follows would be another text
    gap = np.diff(np.sort(right["logits"][3])[-2:])[0]
    near, far = (Case("short", SHORT.prompt, 4, tie=float(gap * factor)) for factor in (1.01, 0.99))
    outcome = outcome_of(right, near)
    assert outcome.errors == [] and outcome.ties == [10] and "| 1 (ties) |" in table([outcome])
    assert "the texts differ from position 10" in outcome_of(right, far).errors[0]
    right["tokens"][3] = third
    assert "the texts differ from position 10" in outcome_of(right, near).errors[0]


def test_an_example_that_fails(right, errors):
    assert "exit status 1: oh no" in errors(None, status=1, stderr="Traceback\noh no\n")
    assert "exit status 1: nothing on stderr" in errors(right, status=1)
    assert "exit status 0: nothing on stderr" in errors(None)


def test_past_the_context_one_line_and_exit_status_2(right, errors):
    past = Case("short", 300 * "the ")
    assert errors(None, past, status=2, stderr="too long\n") == ""
    for status, stderr, dump in (0, "", right), (2, "", None), (2, "Traceback\nValueError\n", None), (1, "no\n", None):
        assert "must end in one line and exit status 2" in errors(dump, past, status=status, stderr=stderr)


def test_sampled_tokens_are_those_of_the_seed(right, errors):
    case = Case("short", SHORT.prompt, 1, temperature=0.8)
    logits = right["logits"][:1]
    drawn = right | {"tokens": Sampler(0.8, 50, seed=1)(logits), "logits": logits}
    assert errors(drawn, case) == ""
    drawn["tokens"] = drawn["tokens"] + 1
    assert "the same seed give another token" in errors(drawn, case)


def test_the_report_names_the_project_that_is_wrong(right, outcome_of, tmp_path):
    good = outcome_of(right)
    right["logits"] = right["logits"] + 1
    bad = outcome_of(right, project="tripy_nanogpt")
    text = write_report(tmp_path / "new", [good, bad])
    assert "| qaic_gpt2 | 1 | 24 | none | 0.0e+00 | 0.0e+00 |" in text
    assert "| tripy_nanogpt | 1 | 24 | DISAGREES in 1 of 1 texts | 1.0e+00 | 1.0e+00 |" in text
    assert bad.errors[0] in (tmp_path / "new" / "parity.md").read_text(encoding="utf-8")
    rows = json.loads((tmp_path / "new" / "parity.json").read_text(encoding="utf-8"))
    assert [row["errors"] for row in rows] == [[], bad.errors]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["parity.json", "parity.md", "parity.png"]
