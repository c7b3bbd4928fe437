"""checkpoints/gpt2-nano: its size and format, the same ids from transformers, and its bits per byte."""

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jax_nanogpt import eval, weight_loader
from jax_nanogpt.data import corpus
from jax_nanogpt.eval import text_losses
from jax_nanogpt.model import GPT, GPTConfig, count_params, init_params
from shared.tokenizer import find_model, load_tokenizer
from tests.jax.reference import forward

FOLDER = find_model("gpt2-nano").folder
TOKENIZER = load_tokenizer(FOLDER)
AUTO_TOKENIZER = transformers.AutoTokenizer.from_pretrained(FOLDER)


def read_json(name):
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_it_is_small_and_in_gpt2s_format():
    config, vocab = weight_loader.read_config(FOLDER), read_json("vocab.json")
    assert count_params(config) <= 4_700_000 and config.block_size >= 256
    assert config.n_embd % 128 == 0 and config.vocab_size % 128 == 0
    assert {str(tensor.dtype) for tensor in load_file(FOLDER / "model.safetensors").values()} == {"float16"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in FOLDER.iterdir())
    merges = (FOLDER / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert vocab["<|endoftext|>"] == TOKENIZER.eot == config.vocab_size - 1 == 256 + len(merges)
    assert {read_json("config.json")[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {TOKENIZER.eot}


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|endoftext|>" not in text))
@example(text="".join(list(topics.values())[:10]))
def test_autotokenizer_gives_the_same_ids_for_any_text(text):
    assert AUTO_TOKENIZER(text)["input_ids"] == TOKENIZER.encode(text)


def test_autotokenizer_has_the_same_end_of_text():
    assert AUTO_TOKENIZER.eos_token == AUTO_TOKENIZER.bos_token == AUTO_TOKENIZER.pad_token == "<|endoftext|>"
    assert AUTO_TOKENIZER("<|endoftext|>")["input_ids"] == [TOKENIZER.eot]  # in a text, unlike ours, as the card says
    assert TOKENIZER.eot not in TOKENIZER.encode("<|endoftext|>")


def test_it_predicts_the_held_out_help_as_well_as_its_card_says(capsys):
    """Python's texts differ a little between versions, and so does the figure."""
    eval.main(["--model=gpt2-nano"])
    (found,) = re.findall(r" (\d\.\d+) bits per byte$", capsys.readouterr().out, re.M)
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"Python's help: (\d\.\d+) bits per byte", card)
    assert float(found) == pytest.approx(float(stated), abs=0.05)


@pytest.mark.parametrize("length", [1, 2, 1500])
def test_a_texts_losses_are_of_every_token_once_and_from_half_a_context(length):
    config = GPTConfig(block_size=256, vocab_size=TOKENIZER.n_vocab, n_layer=1, n_head=1, n_embd=16)
    params = jax.tree.map(lambda x: 10 * x, init_params(config, jax.random.key(0)))  # so that the context matters
    text = Path(corpus.__file__).read_text(encoding="utf-8")[:length]
    ids = [TOKENIZER.eot, *TOKENIZER.encode(text)]
    expected = []
    for place in range(1, len(ids)):
        start = max(0, (place - 1) // 128 - 1) * 128
        window = np.zeros((1, 256), np.int32)
        window[0, : place - start] = ids[start:place]
        logits = forward(config, params, window)
        expected.append(-float(jax.nn.log_softmax(logits[0, place - start - 1])[ids[place]]))
    np.testing.assert_allclose(text_losses(GPT(config), params, np.array(ids)), expected, rtol=1e-3)
