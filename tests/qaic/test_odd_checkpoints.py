"""Unusual and valid checkpoints through export, compile and generate: equal to transformers at every token."""

import json
import re

import numpy as np
import pytest
import torch
import transformers

from qaic_gpt2 import example
from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM

SHAPES = {
    "one position": {"n_positions": 1},
    "two positions": {"n_positions": 2},
    "seventeen positions": {"n_positions": 17},
    "a vocabulary of one": {"vocab_size": 1},
    "a vocabulary of two": {"vocab_size": 2},
    "a vocabulary of three": {"vocab_size": 3},
    "one head": {"n_head": 1},
    "a head size of one": {"n_embd": 4, "n_head": 4},
    "a width of one": {"n_embd": 1, "n_head": 1},
    "two layers": {"n_layer": 2},
}
LETTERS = "abcdefghijk"


class Ids:
    """A tokenizer whose texts are lists of ids, and which has no <|endoftext|>."""

    eot, encode = None, staticmethod(list)

    @staticmethod
    def to_bytes(id):
        return b""


class Prompt(str):
    """A text that a class which asks for texts takes, and Ids reads as these ids."""

    def __new__(cls, ids):
        prompt = super().__new__(cls, ids)
        prompt.ids = ids
        return prompt

    def __iter__(self):
        return iter(self.ids)


def expected_logits(folder, ids):
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def make(make_checkpoint, **settings):
    small = {"n_layer": 1, "n_positions": 8, "vocab_size": 11, "n_embd": 16, "n_head": 2}
    return make_checkpoint(**small | {"bos_token_id": 0, "eos_token_id": 0} | settings)


@pytest.fixture(scope="module")
def small(make_checkpoint):
    """With a tokenizer of characters."""
    folder = make(make_checkpoint)
    (folder / "meta.json").write_text(json.dumps({"chars": LETTERS}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
def test_every_token_to_the_last_position_is_transformers(make_checkpoint, settings):
    folder = make(make_checkpoint, **settings)
    model = QEFFAutoModelForCausalLM.from_pretrained(folder)
    size, vocab_size = model.config.n_positions, model.config.vocab_size
    for length in sorted({1, size // 2, size - 1, size} - {0}):
        prompt = [place % vocab_size for place in range(length)]
        info = model.generate(Ids, [Prompt(prompt)], return_logits=True)
        made = info.generated_ids[0][0, : size - length + 1]
        assert len(info.logits[0]) == size - length + 1  # the last position predicts a token, too
        expected = expected_logits(folder, [*prompt, *made.tolist()][:size])[length - 1 :]
        np.testing.assert_allclose(info.logits[0], expected, atol=1e-4)
        assert made.tolist() == np.argmax(info.logits[0], axis=1).tolist()


def test_int8_of_a_width_without_blocks_is_refused_in_one_line(make_checkpoint):
    model = QEFFAutoModelForCausalLM.from_pretrained(make(make_checkpoint, n_embd=24))
    with pytest.raises(ValueError, match=r"^n_embd must be a multiple of 16 with int8_matmul, got 24: .*$"):
        model.compile(int8_matmul=True)


@pytest.mark.parametrize("chunk", [1, 3, 7, 8])
def test_rows_that_fill_the_context_are_what_they_are_alone(small, compiled, chunk):
    """The last chunk has no padding, which would take the last slot."""
    session = compiled(small, batch_size=4, ctx_len=8, prefill_seq_len=chunk).session
    rows = [[5, 1, 2, 3, 4, 6, 7, 8], [9, 3], [1, 2, 3, 4, 5, 6, 7], [8, 7, 6, 5, 4, 3, 2, 1]]
    for row, logits in zip(rows, session.prefill(rows), strict=True):
        np.testing.assert_allclose(logits, expected_logits(small, row)[-1], atol=1e-4)


def run(capsys, *flags):
    status = 0
    try:
        example.main([*map(str, flags)])
    except SystemExit as exit:
        status = exit.code
    return status, capsys.readouterr()


def test_a_character_model_without_an_end_of_text(small, tmp_path, capsys):
    dump = tmp_path / "d.npz"
    status, printed = run(capsys, f"--model={small}", "--prompt=abc", f"--dump={dump}")
    assert status == 0, printed.err
    saved = np.load(dump)  # which refuses arrays of objects
    assert {name: array.dtype.kind for name, array in saved.items()} == {
        "prompt_ids": "i",
        "tokens": "i",
        "logits": "f",
    }
    text = "abc" + "".join(LETTERS[id] for id in saved["tokens"])
    assert len(text) == 9 and f"\n{text}\n(the end of the context: 8 tokens)\n" in printed.out
    expected = expected_logits(small, [*saved["prompt_ids"], *saved["tokens"]][:8])[2:]
    np.testing.assert_allclose(saved["logits"], expected, atol=1e-4)


def test_a_prompt_that_fills_the_context_gets_one_token_and_a_longer_one_none(small, capsys):
    status, printed = run(capsys, f"--model={small}", "--prompt=abcdefgh", "--max-new-tokens=5")
    assert status == 0 and re.search(r"\nabcdefgh[a-k]\n\(the end of the context: 8 tokens\)\n", printed.out)
    status, printed = run(capsys, f"--model={small}", "--prompt=abcdefghi")
    assert (status, printed.out, printed.err) == (2, "", "prompt must have at most ctx_len (8) tokens, got 9\n")


def test_an_empty_prompt_needs_an_end_of_text(small, capsys):
    status, printed = run(capsys, f"--model={small}", "--prompt=")
    assert (status, printed.err) == (2, "prompt must not be empty: this model has no <|endoftext|>\n")
