"""Each project's example, in its own environment, writes what transformers writes."""

import shutil
from dataclasses import asdict

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.contract.parity import NANO, Case, Referee, compare
from tests.tools.examples import EXAMPLES

pytestmark = pytest.mark.engine

HAMLET = """To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles
And by opposing end them. To die: to sleep;
No more; and by a sleep to say we end
The heart-ache and the thousand natural shocks
That flesh is heir to, 'tis a consummation
Devoutly to be wish'd. To die, to sleep;
To sleep: perchance to dream: ay, there's the rub;
For in that sleep of death what dreams may come
When we have shuffled off this mortal coil,
Must give us pause: there's the respect
That makes calamity of so long life;
For who would bear the whips and scorns of time,
The oppressor's wrong, the proud man's contumely,
The pangs of despised love, the law's delay?"""
LINES = HAMLET.splitlines(keepends=True)
CASES = [
    Case("short", "To be, or not to be"),
    Case("unicode", "Café, naïve: 東京 🙂 Ωmega\n"),
    Case("empty", ""),
    Case("to the edge", "".join(LINES[:2]).rstrip(), 256 - 31),
    Case("over the edge", "".join(LINES[:14]).rstrip(), 64),
    Case("from past the edge", HAMLET, 32),
]
SAMPLED = Case("sampled", "To be, or not to be", temperature=0.8)
RANDOM = [Case("short", "To be, or not to be", tie=1e-4), Case("over the edge", CASES[4].prompt, 64, tie=1e-4)]


@pytest.fixture(scope="session")
def random_referee(tmp_path_factory):
    """A GPT-2 of random weights, biases among them, with gpt2-nano's vocabulary."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=1408, n_positions=256, n_layer=3, n_head=3, n_embd=96))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.1)
    model.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    return Referee(folder)


def check(project, model, case, referee, served, report):
    settings = {"prompt": case.prompt, "new_tokens": case.new_tokens, "temperature": case.temperature}
    answer = served(project).ask(model=referee.folder, **settings)
    outcome = compare(project, model, case, answer, referee)
    report("parity", asdict(outcome))
    assert not outcome.errors, "\n".join(outcome.errors)
    return outcome


def by_name(case):
    return case.name.replace(" ", "-")


def test_the_cases_reach_and_pass_the_edge(referee):
    lengths = {case.name: len(referee.encode(case.prompt)) for case in CASES}
    assert lengths["to the edge"] + CASES[3].new_tokens == referee.context
    assert referee.context - 30 < lengths["over the edge"] < referee.context < lengths["from past the edge"]


@pytest.mark.parametrize("case", CASES, ids=by_name)
@pytest.mark.parametrize("project", EXAMPLES)
def test_gpt2_nano_writes_as_in_transformers(project, case, referee, served, report):
    check(project, "gpt2-nano", case, referee, served, report)


@pytest.mark.parametrize("case", RANDOM, ids=by_name)
@pytest.mark.parametrize("project", EXAMPLES)
def test_random_weights_write_as_in_transformers(project, case, random_referee, served, report):
    """A tie that goes the other way is in the report, and not a failure."""
    check(project, "random", case, random_referee, served, report)


@pytest.mark.parametrize("project", [project for project, example in EXAMPLES.items() if example.numpy])
def test_the_same_seed_draws_the_same_tokens(project, referee, served, report):
    """On every stack those that shared/sampling.py draws from transformers' logits: JAX has a generator of its own."""
    check(project, "gpt2-nano", SAMPLED, referee, served, report)
