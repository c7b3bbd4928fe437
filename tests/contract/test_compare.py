"""What parity says of an answer that is wrong in one thing, beginning with one that is right."""

import json

import numpy as np
import pytest

from shared.sampling import Sampler
from tests.contract.parity import LIMIT, Case, compare, table, write_report
from tests.tools.examples import Answer

SHORT = Case("short", "To be, or not to be", 24)


def answer(dump, status=0, stderr=""):
    return Answer(status, "", stderr, 1.0, dump)


@pytest.fixture
def right(referee):
    """What transformers itself writes."""
    prompt = referee.encode(SHORT.prompt)
    text = referee.goes_on(tuple(prompt), SHORT.new_tokens)
    logits = referee.logits(text, len(prompt)).copy()
    return {"prompt_ids": np.array(prompt), "tokens": np.array(text[len(prompt) :]), "logits": logits}


def complaint(dump, referee, case=SHORT, project="qaic_gpt2", **more):
    outcome = compare(project, "gpt2-nano", case, answer(dump, **more), referee)
    assert all(line.startswith(f"{project} (gpt2-nano, the prompt 'short'): ") for line in outcome.complaints)
    return "\n".join(outcome.complaints)


def test_the_right_answer_has_no_complaints(right, referee):
    assert complaint(right, referee) == ""


def test_other_prompt_ids(right, referee):
    right["prompt_ids"][3] += 1
    assert "prompt ids differ from transformers' tokenizer's at 3" in complaint(right, referee)


def test_a_logit_too_far(right, referee):
    right["logits"][5, 7] += 1.5 * LIMIT
    assert "at 1 of 24 positions, first at 12, new token 5" in complaint(right, referee)


def test_a_logit_that_is_no_number(right, referee):
    right["logits"][5, 7] = np.nan
    assert "at 1 of 24 positions, first at 12, new token 5" in complaint(right, referee)


def test_another_token_with_both_texts(right, referee):
    right["tokens"][3] = right["logits"][3].argsort()[-2]
    said = complaint(right, referee)
    both, ours, theirs = said.splitlines()[1:4]
    assert said.splitlines()[0].endswith("the texts part at position 10:")
    assert both.split()[0] == "both" and ours.split()[0] == "qaic_gpt2" and theirs.split()[0] == "transformers"
    assert ours.partition("'")[2] != theirs.partition("'")[2]


def test_of_two_best_logits_that_tie_either_may_be_taken(right, referee):
    third = right["logits"][3].argsort()[-3]
    right["tokens"][3] = right["logits"][3].argsort()[-2]
    right["tokens"], right["logits"] = right["tokens"][:4], right["logits"][:4]  # what follows would be another text
    gap = np.diff(np.sort(right["logits"][3])[-2:])[0]
    near, far = (Case("short", SHORT.prompt, 4, tie=float(gap * factor)) for factor in (1.01, 0.99))
    outcome = compare("qaic_gpt2", "random", near, answer(right), referee)
    assert outcome.complaints == [] and outcome.flips == [10]
    assert "| 1 (ties) |" in table([outcome])
    assert "the texts part at position 10" in complaint(right, referee, far)
    right["tokens"][3] = third
    assert "the texts part at position 10" in complaint(right, referee, near)


def test_too_few_tokens(right, referee):
    right["tokens"], right["logits"] = right["tokens"][:-1], right["logits"][:-1]
    assert "23 tokens were written, 24 are expected" in complaint(right, referee)


def test_logits_of_another_shape(right, referee):
    right["logits"] = right["logits"][:, :-1]
    assert "logits have the shape (24, 1407)" in complaint(right, referee)


def test_an_example_that_fails(right, referee):
    assert "exit status 1: oh no" in complaint(None, referee, status=1, stderr="Traceback\noh no\n")
    assert "exit status 1: nothing on stderr" in complaint(right, referee, status=1)
    assert "exit status 0: nothing on stderr" in complaint(None, referee)


def test_past_the_context_one_line_and_exit_status_2(right, referee):
    past = Case("short", 300 * "the ")
    assert complaint(None, referee, past, status=2, stderr="too long\n") == ""
    for status, stderr, dump in (0, "", right), (2, "", None), (2, "Traceback\nValueError\n", None), (1, "no\n", None):
        assert "it does not go past the context" in complaint(dump, referee, past, status=status, stderr=stderr)


def test_sampled_tokens_are_those_of_the_seed(right, referee):
    case = Case("short", SHORT.prompt, 1, temperature=0.8)
    logits = right["logits"][:1]
    token = Sampler(0.8, 50, seed=1)(logits)
    drawn = right | {"tokens": token, "logits": logits}
    assert complaint(drawn, referee, case) == ""
    drawn["tokens"] = token + 1
    assert "the same seed give another token" in complaint(drawn, referee, case)


def test_the_report_holds_what_was_found(right, referee, tmp_path):
    good = compare("qaic_gpt2", "gpt2-nano", SHORT, answer(right), referee)
    right["logits"] = right["logits"] + 1
    bad = compare("tripy_nanogpt", "gpt2-nano", SHORT, answer(right), referee)
    text = write_report(tmp_path / "new", [good, bad])
    assert "| qaic_gpt2 | 1 | 24 | none | 0.0e+00 | 0.0e+00 |" in text
    assert "| tripy_nanogpt | 1 | 24 | DISAGREES in 1 of 1 texts | 1.0e+00 | 1.0e+00 |" in text
    assert bad.complaints[0] in (tmp_path / "new" / "parity.md").read_text(encoding="utf-8")
    rows = json.loads((tmp_path / "new" / "parity.json").read_text(encoding="utf-8"))
    assert [row["complaints"] for row in rows] == [[], bad.complaints]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["parity.json", "parity.md", "parity.png"]
