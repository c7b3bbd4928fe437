"""Odd checkpoints: every project gives transformers' logits and tokens, or refuses in the same one line."""

import shutil

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.contract.odd import REFUSED, SHAPE, VALID, write_checkpoint
from tests.contract.parity import NANO
from tests.tools.examples import EXAMPLES

pytestmark = pytest.mark.engine

LIMIT = 1e-4  # relative to the largest logit


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    made = {}

    def get(odd):
        if odd.name not in made:
            made[odd.name] = odd.make(tmp_path_factory.mktemp("odd") / "model")
        return made[odd.name]

    return get


@torch.inference_mode()
def expected(folder, context, ids, count):
    """transformers' logits for the last `count` of ids, each from the tokens before it that the context holds."""
    # transformers does not read n_ctx
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, n_positions=context).eval()
    rows = [model(torch.tensor([ids[max(0, end - context) : end]])).logits[0, -1] for end in range(len(ids))[-count:]]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("odd", VALID, ids=lambda odd: odd.name)
@pytest.mark.parametrize("project", EXAMPLES)
def test_valid_and_equal_to_transformers(project, odd, served, checkpoint):
    folder = checkpoint(odd)
    answer = served(project).ask(model=folder, prompt=odd.prompt, new_tokens=odd.new_tokens)
    assert answer.status == 0, answer.stderr
    prompt, tokens, logits = (answer.dump[name] for name in ("prompt_ids", "tokens", "logits"))
    context = (SHAPE | odd.shape)["n_positions"]
    room = context - len(prompt) + 1  # the last token may be one that the context cannot hold
    assert len(tokens) == (odd.new_tokens if EXAMPLES[project].slides else min(odd.new_tokens, room))
    exact = expected(folder, context, [*prompt.tolist(), *tokens.tolist()], len(tokens))
    assert logits.shape == exact.shape and logits.dtype == np.float32
    assert np.abs(logits - exact).max() <= LIMIT * max(1, np.abs(exact).max())
    assert (exact.argmax(axis=1) == tokens).all()


@pytest.mark.parametrize("odd", REFUSED, ids=lambda odd: odd.name)
@pytest.mark.parametrize("project", EXAMPLES)
def test_refused_in_one_line(project, odd, served, checkpoint):
    folder, process = checkpoint(odd), served(project)
    answer = process.ask(model=folder, prompt=odd.prompt, new_tokens=odd.new_tokens)
    assert answer.status == 2 and answer.dump is None
    _, said, rest = answer.stderr.rpartition(odd.refused)
    assert said and (rest == "\n" or odd.refused.endswith(": ")) and answer.stderr.count("\n") == 1
    assert odd.prompt == "" or str(folder) in answer.stderr
    assert not (process.scratch / "executed").exists()


@pytest.mark.parametrize("project", EXAMPLES)
def test_tokens_beyond_the_tokenizer_are_replacement_characters(project, served, tmp_path):
    write_checkpoint(tmp_path, SHAPE | {"n_positions": 64, "vocab_size": 5000})
    for name in ("vocab.json", "merges.txt"):  # of 1,408 tokens
        shutil.copy(NANO / name, tmp_path)
    answer = served(project).ask(model=tmp_path, prompt="To be", new_tokens=30, temperature=1, top_k=5000)
    assert answer.status == 0 and "\ufffd" in answer.stdout, answer.stderr
    assert len(answer.dump["tokens"]) == 30 and answer.dump["tokens"].max() >= 1408
