"""checkpoints/gpt2-nano: its size and shape, what transformers makes of it, and how well it predicts."""

import json
import math
import re
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jax_nanogpt import weight_loader
from jax_nanogpt.data import corpus
from jax_nanogpt.data.nano.bits import bits
from jax_nanogpt.model import GPT, GPTConfig, count_params, init_params
from shared.tokenizer import find_model, load_tokenizer

FOLDER = find_model("gpt2-nano").folder
HELD = json.loads((FOLDER / "heldout.json").read_text(encoding="utf-8"))
TOKENIZER = load_tokenizer(FOLDER)
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model():
    return weight_loader.load(FOLDER)


def test_it_is_small_and_stored_in_float16(model):
    config, _ = model
    assert count_params(config) <= 4_700_000 and config.block_size >= 256
    assert config.n_embd % 128 == 0 and config.vocab_size % 128 == 0
    tensors = load_file(FOLDER / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float16"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in FOLDER.iterdir())


def test_the_vocabulary_is_gpt2s_format_with_end_of_text_last(model):
    vocab = json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8"))
    merges = (FOLDER / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert vocab["<|endoftext|>"] == TOKENIZER.eot == model[0].vocab_size - 1 == 256 + len(merges)
    assert 1024 <= len(merges) <= 4096
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert {config[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {TOKENIZER.eot}


def test_transformers_loads_it_as_it_is_and_gives_the_same_logits(model, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config, params = model
    assert transformers.AutoModelForCausalLM.from_pretrained(FOLDER).dtype == torch.float16
    reference = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokens = np.array([TOKENIZER.encode(topics["assert"])[:256]])
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits
    logits, _ = jax.jit(GPT(config).apply)({"params": params}, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.fixture(scope="module")
def auto_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


def test_autotokenizer_gives_the_same_ids_for_real_text(auto_tokenizer):
    for text in [*list(topics.values())[:10], "Grüße, 世界! 🙂\r\n\t  x  ", ""]:
        assert auto_tokenizer(text)["input_ids"] == TOKENIZER.encode(text)
        assert auto_tokenizer.decode(TOKENIZER.encode(text), clean_up_tokenization_spaces=False) == text
    assert auto_tokenizer.eos_token == auto_tokenizer.bos_token == auto_tokenizer.pad_token == "<|endoftext|>"
    assert auto_tokenizer("<|endoftext|>")["input_ids"] == [TOKENIZER.eot]  # here they part, and the card says so
    assert TOKENIZER.eot not in TOKENIZER.encode("<|endoftext|>")


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_autotokenizer_gives_the_same_ids_for_any_text(auto_tokenizer, text):
    assert auto_tokenizer(text)["input_ids"] == TOKENIZER.encode(text)


def test_the_held_out_topics_hardly_share_text_with_the_rest():
    names = HELD["pydoc_data.topics"]["topics"]
    rest = set().union(*(corpus.shingles(text) for name, text in topics.items() if name not in names))
    for name in set(names) & topics.keys():
        parts = corpus.shingles(topics[name])
        assert len(parts & rest) < 0.02 * len(parts), name


def test_it_predicts_the_held_out_help_as_well_as_its_card_says(model):
    """Python's texts differ a little between versions, and so does the figure."""
    texts = [topics[name] for name in HELD["pydoc_data.topics"]["topics"] if name in topics]
    found = sum(bits(*model, TOKENIZER, text) for text in texts) / sum(len(text.encode("utf-8")) for text in texts)
    (stated,) = re.findall(r"Python's help: (\d\.\d+) bits a byte", CARD)
    assert found == pytest.approx(float(stated), abs=0.05)


@pytest.mark.parametrize("length", [1, 2, 300, 1500])
def test_bits_count_every_token_once_and_from_half_a_context(length):
    config = GPTConfig(block_size=256, vocab_size=TOKENIZER.n_vocab, n_layer=1, n_head=1, n_embd=16)
    params = jax.tree.map(lambda x: 10 * x, init_params(config, jax.random.key(0)))  # so that the context matters
    text = Path(corpus.__file__).read_text(encoding="utf-8")[:length]
    ids = [TOKENIZER.eot, *TOKENIZER.encode(text)]
    forward, expected = jax.jit(GPT(config).apply), 0.0
    for place in range(1, len(ids)):
        start = max(0, (place - 1) // 128 - 1) * 128
        window = np.zeros((1, 256), np.int32)
        window[0, : place - start] = ids[start:place]
        logits, _ = forward({"params": params}, window)
        expected -= float(jax.nn.log_softmax(logits[0, place - start - 1])[ids[place]]) / math.log(2)
    assert bits(config, params, TOKENIZER, text) == pytest.approx(expected, rel=1e-4)
