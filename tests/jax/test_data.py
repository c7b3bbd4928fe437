"""The datasets: what is written, what is downloaded and checked, the message without a network, and the batches."""

import hashlib
import http.client
import io
import json
import sys
import urllib.error
from dataclasses import replace
from importlib import import_module
from pydoc_data.topics import topics

import numpy as np
import pytest

from jax_nanogpt.batches import cut, draw_starts
from jax_nanogpt.data import corpus
from jax_nanogpt.data.nano import prepare as nano
from jax_nanogpt.data.openwebtext import prepare as openwebtext
from jax_nanogpt.train import Config
from shared.tokenizer import find_model, load_tokenizer

TEXT = "First Citizen:\nWe are accounted poor citizens, the patricians good; ünïcödé.\n\n" * 200


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """data/NAME/prepare.py, which writes into a folder of tmp_path: -> (folder, exit status, what it printed)."""

    def call(name, *flags):
        module, folder = import_module(f"jax_nanogpt.data.{name}.prepare"), tmp_path / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(module, "HERE", folder)
        try:
            status = module.main([*map(str, flags)]) or 0
        except SystemExit as error:
            status = error.code
        return folder, status, capsys.readouterr()

    return call


def splits_of(folder):
    tokenizer = load_tokenizer(folder)
    return [tokenizer.decode(np.fromfile(folder / f"{split}.bin", np.uint16).tolist()) for split in ("train", "val")]


@pytest.fixture
def local_copy(tmp_path):
    path = tmp_path / "copy.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def downloads(monkeypatch):
    """What urlopen returns or raises, one after another."""
    responses = []

    def urlopen(url, timeout):
        response = responses.pop(0)
        if isinstance(response, Exception):
            raise response
        return io.BytesIO(response)

    monkeypatch.setattr(corpus.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(corpus.time, "sleep", lambda seconds: None)
    return responses


def test_a_local_copy_becomes_bins_that_decode_to_it(local_copy, prepare):
    """In characters; in gpt2-nano's tokens; and in GPT-2's, in the folder that had nano's."""
    for name, flags, vocabulary in (
        ("shakespeare_char", (), len(set(TEXT))),
        ("shakespeare", ("--model", "gpt2-nano"), 1408),
        ("shakespeare", (), 50257),
    ):
        folder, status, printed = prepare(name, "--input", local_copy, *flags)
        assert status == 0 and "is not tiny Shakespeare as published" in printed.out
        train, val = splits_of(folder)
        assert train + val == TEXT and len(train) == int(0.9 * len(TEXT))
        assert load_tokenizer(folder).n_vocab == vocabulary
        assert not [path for path in folder.iterdir() if path.suffix in (".pkl", ".part")]


def test_pythons_own_text_needs_no_download_and_repeats_little(prepare):
    folder, status, _ = prepare("pydoc_char")
    train, val = splits_of(folder)
    assert status == 0 and len(train) > 200_000 and abs(len(val) / (len(train) + len(val)) - 0.1) < 0.001
    assert len(corpus.shingles(train)) > 0.85 * len(train)


def test_nanos_data_holds_out_what_heldout_json_names(local_copy, prepare, monkeypatch):
    monkeypatch.setattr(nano, "COPIES", 1)
    folder, status, _ = prepare("nano", "--input", local_copy)
    held = json.loads((folder / "heldout.json").read_text(encoding="utf-8"))
    names = held["pydoc_data.topics"]["topics"]
    train, val = splits_of(folder)
    assert status == 0
    assert val == "<|endoftext|>".join([TEXT[held["shakespeare"]["from_character"] :], *(topics[n] for n in names), ""])
    assert not any(topics[name] in train for name in names)
    # 7.0 % of Python 3.11's text, 4.5 % of 3.12's, where more topics repeat others
    assert 0.04 < sum(len(topics[n]) for n in names) / sum(map(len, corpus.pydoc_topics().values())) <= 0.1
    committed = json.loads((find_model("gpt2-nano").folder / "heldout.json").read_text(encoding="utf-8"))
    for held_out in names, committed["pydoc_data.topics"]["topics"]:
        rest = set().union(*(corpus.shingles(text) for name, text in topics.items() if name not in held_out))
        for name in set(held_out) & topics.keys():
            shingles = corpus.shingles(topics[name])
            assert len(shingles & rest) < 0.02 * len(shingles), name


@pytest.mark.parametrize("name", ["shakespeare_char", "nano"])
def test_without_a_network_one_line_names_both_remedies(name, prepare, downloads):
    downloads[:] = [urllib.error.URLError("no route to host")] * 3
    folder, status, printed = prepare(name)
    assert status == 2 and printed.err.count("\n") == 1 and "no route to host" in printed.err
    assert "--input FILE" in printed.err and "data/pydoc_char/prepare.py" in printed.err
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["shakespeare_char", "nano"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "--input must have 100 characters or more, got 0 in"),
        (b"\xff" * 200, "--input must be a UTF-8 text file, got"),
        (None, "--input must be a UTF-8 text file, got"),
    ],
)
def test_a_local_copy_that_cannot_be_used_is_refused_in_one_line(name, content, message, prepare, tmp_path):
    if content is not None:
        (tmp_path / "copy.txt").write_bytes(content)
    folder, status, printed = prepare(name, "--input", tmp_path / "copy.txt")
    assert status == 2 and message in printed.err and printed.err.count("\n") == 1
    assert not list(folder.iterdir())


def test_a_download_is_retried_and_checked(downloads):
    good = b"the text"
    sha256 = hashlib.sha256(good).hexdigest()
    downloads[:] = [urllib.error.URLError("down"), b"half of the te", good, http.client.IncompleteRead(b"half"), good]
    assert corpus.download("https://example.org", sha256) == corpus.download("https://example.org", sha256) == good
    downloads[:] = [b"forged"] * 3
    with pytest.raises(OSError, match="its SHA-256 does not match"):
        corpus.download("https://example.org", sha256)


def test_openwebtext_is_written_text_by_text(tmp_path):
    tokenizer = load_tokenizer(find_model("gpt2-nano").folder)
    openwebtext.write(({"text": f"text {number}"} for number in range(4001)), tokenizer, tmp_path)
    openwebtext.copy_tokenizer(tmp_path, find_model("gpt2-nano").folder)
    train, val = (text.split("<|endoftext|>") for text in splits_of(tmp_path))
    assert val == ["text 1999", "text 3999", ""]
    assert train == [f"text {number}" for number in range(4001) if number not in (1999, 3999)] + [""]


def test_openwebtext_that_is_interrupted_leaves_no_files(tmp_path):
    def documents():
        yield {"text": "text"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        openwebtext.write(documents(), load_tokenizer(find_model("gpt2-nano").folder), tmp_path)
    assert not list(tmp_path.iterdir())


def test_openwebtext_without_datasets_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit) as caught:
        openwebtext.main([])
    assert caught.value.code == 2
    message = "OpenWebText is not available: the package datasets is missing: pip install datasets\n"
    assert capsys.readouterr().err.endswith(message)


def batches(text, config, first, count):
    return cut(text, draw_starts(len(text), config, first, count), config.block_size)


@pytest.mark.parametrize("draw", ["anywhere", "epochs"])
def test_a_resumed_run_sees_the_examples_that_an_unbroken_one_would(draw):
    config = Config(draw=draw, block_size=16, batch_size=4, gradient_accumulation_steps=2)
    text = np.arange(1000, dtype=np.uint16)
    examples = batches(text, config, 0, 20)
    np.testing.assert_array_equal(batches(text, config, 7, 3), examples[7:10])
    assert len(np.unique(examples[..., 0])) > 40  # of 160: iterations do not repeat one another
    assert (batches(text, replace(config, seed=1), 0, 20) != examples).any()


def test_an_epoch_shows_every_window_once_in_its_own_order():
    config = Config(draw="epochs", block_size=16, batch_size=4, gradient_accumulation_steps=2)
    text, windows = np.arange(1000, dtype=np.uint16), 1000 // 16 - 1
    examples = batches(text, config, 0, 20)
    assert examples.shape == (20, 2, 4, 17) and (np.diff(examples) == 1).all()
    starts = examples[..., 0].ravel()
    epochs = starts[:windows], starts[windows : 2 * windows]
    for epoch in epochs:  # adjacent windows
        assert np.diff(np.sort(epoch)).tolist() == [16] * (windows - 1) and np.diff(epoch).min() < 0
    assert (epochs[0] // 16).tolist() != (epochs[1] // 16).tolist()


@pytest.mark.parametrize("draw", ["anywhere", "epochs"])
@pytest.mark.parametrize("tokens", [17, 18, 32, 33, 48])
def test_a_text_hardly_longer_than_a_window_is_enough(draw, tokens):
    config = Config(draw=draw, block_size=16, batch_size=4, gradient_accumulation_steps=1)
    examples = batches(np.arange(tokens, dtype=np.uint16), config, 0, 50)
    assert examples.min() == 0 and examples.max() == tokens - 1
