"""The datasets: what is written, what is downloaded and checked, what a machine without a network is told."""

import hashlib
import http.client
import io
import json
import subprocess
import sys
import urllib.error
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from jax_nanogpt.data import corpus
from jax_nanogpt.data.openwebtext import prepare as openwebtext
from jax_nanogpt.train import Config, cut, draw_starts
from shared.tokenizer import find_model, load_tokenizer

DATA = Path(corpus.__file__).parent
TEXT = "First Citizen:\nWe are accounted poor citizens, the patricians good; ünïcödé.\n\n" * 200


def prepare(name, tmp_path, *flags, folder=None):
    """data/NAME/prepare.py, in a copy of the project's layout, so that nothing is written into this checkout."""
    root = tmp_path / "root"
    target = root / "jax_nanogpt" / "data" / name
    target.mkdir(parents=True)
    (target / "prepare.py").write_text((DATA / name / "prepare.py").read_text(encoding="utf-8"), encoding="utf-8")
    for module in ("data/corpus.py", "configurator.py", "files.py"):
        (root / "jax_nanogpt" / module).write_text((DATA.parent / module).read_text(encoding="utf-8"), encoding="utf-8")
    (root / "shared").symlink_to(DATA.parents[1] / "shared")
    command = [sys.executable, target / "prepare.py", *map(str, flags)]
    return target, subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)


def splits_of(folder):
    tokenizer = load_tokenizer(folder)
    return [tokenizer.decode(np.fromfile(folder / f"{split}.bin", np.uint16).tolist()) for split in ("train", "val")]


@pytest.fixture
def local_copy(tmp_path):
    path = tmp_path / "copy.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "flags"),
    [("shakespeare_char", ()), ("shakespeare", ("--model", "gpt2-nano")), ("shakespeare", ())],
    ids=["characters", "nano's tokens", "GPT-2's tokens"],
)
def test_a_local_copy_becomes_bins_that_decode_to_it(name, flags, local_copy, tmp_path):
    folder, result = prepare(name, tmp_path, "--input", local_copy, *flags)
    assert result.returncode == 0, result.stderr
    assert "is not tiny Shakespeare as published" in result.stdout
    train, val = splits_of(folder)
    assert train + val == TEXT and len(train) == int(0.9 * len(TEXT))
    assert not [path for path in folder.iterdir() if path.suffix in (".pkl", ".part")]


def test_pythons_own_text_needs_nothing_and_repeats_little(tmp_path):
    folder, result = prepare("pydoc_char", tmp_path)
    assert result.returncode == 0, result.stderr
    train, val = splits_of(folder)
    assert len(train) > 200_000 and abs(len(val) / (len(train) + len(val)) - 0.1) < 0.001
    seen = corpus.shingles(train)
    assert len(seen) > 0.85 * len(train)


def test_nanos_data_holds_out_what_heldout_json_names(local_copy, tmp_path):
    folder, result = prepare("nano", tmp_path, "--input", local_copy)
    assert result.returncode == 0, result.stderr
    held = json.loads((folder / "heldout.json").read_text(encoding="utf-8"))
    names = held["pydoc_data.topics"]["topics"]
    train, val = splits_of(folder)
    assert val == "<|endoftext|>".join([TEXT[held["shakespeare"]["from_character"] :], *(topics[n] for n in names), ""])
    rest = set().union(*(corpus.shingles(text) for name, text in topics.items() if name not in names))
    for name in names:
        parts = corpus.shingles(topics[name])
        assert len(parts & rest) < 0.02 * len(parts)
        assert topics[name] not in train
    # 7.0 % of Python 3.11's text, 4.5 % of 3.12's, where more topics repeat others
    assert 0.04 < sum(len(topics[n]) for n in names) / sum(map(len, corpus.pydoc_topics().values())) <= 0.1


@pytest.mark.parametrize("name", ["shakespeare_char", "nano"])
def test_without_a_network_one_line_says_both_ways_on(name, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    folder, result = prepare(name, tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "--input FILE" in result.stderr and "data/pydoc_char/prepare.py" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["prepare.py"]


def test_a_text_too_short_to_split_is_refused_and_writes_nothing(tmp_path):
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    folder, result = prepare("shakespeare_char", tmp_path, "--input", tmp_path / "empty.txt")
    assert result.returncode == 2 and "with 0 characters; 100 or more are expected" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["prepare.py"]


def test_a_missing_local_copy_is_one_line(tmp_path):
    _, result = prepare("shakespeare_char", tmp_path, "--input", tmp_path / "nowhere")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--input is" in result.stderr


def test_a_download_is_tried_again_and_checked(monkeypatch, capsys):
    good, answers = b"the text", []

    def urlopen(url, timeout):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(corpus.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(corpus.time, "sleep", lambda seconds: None)
    sha256 = hashlib.sha256(good).hexdigest()
    answers[:] = [urllib.error.URLError("down"), b"half of the te", good]
    assert corpus.download("https://example.org", sha256) == good
    answers[:] = [http.client.IncompleteRead(b"half"), good]
    assert corpus.download("https://example.org", sha256) == good
    answers[:] = [b"forged"] * 3
    with pytest.raises(SystemExit):
        corpus.download("https://example.org", sha256)
    assert "its SHA-256 is not the expected one" in capsys.readouterr().err


def test_openwebtext_is_written_text_by_text(tmp_path):
    tokenizer = load_tokenizer(find_model("gpt2-nano").folder)
    openwebtext.write(({"text": f"text {number}"} for number in range(4001)), tokenizer, tmp_path)
    train, val = (
        tokenizer.decode(np.fromfile(tmp_path / f"{split}.bin", np.uint16).tolist()).split("<|endoftext|>")
        for split in ("train", "val")
    )
    assert val == ["text 1999", "text 3999", ""]
    assert train == [f"text {number}" for number in range(4001) if number not in (1999, 3999)] + [""]
    assert not list(tmp_path.glob("*.part"))


def test_openwebtext_that_is_interrupted_leaves_nothing(tmp_path):
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
    assert capsys.readouterr().err == "the package datasets is missing: pip install datasets\n"


def batches(text, config, first, count):
    return cut(text, draw_starts(len(text), config, first, count), config.block_size)


def test_an_epoch_shows_every_window_once_in_an_order_of_its_own():
    config = Config(draw="epochs", block_size=16, batch_size=4, gradient_accumulation_steps=2)
    text, windows = np.arange(1000, dtype=np.uint16), 1000 // 16 - 1
    examples = batches(text, config, 0, 20)
    assert examples.shape == (20, 2, 4, 17) and (np.diff(examples) == 1).all()
    starts = examples[..., 0].ravel()
    epochs = starts[:windows], starts[windows : 2 * windows]
    for epoch in epochs:  # side by side: together they are one unbroken stretch
        assert np.diff(np.sort(epoch)).tolist() == [16] * (windows - 1) and np.diff(epoch).min() < 0
    assert (epochs[0] // 16).tolist() != (epochs[1] // 16).tolist()
    np.testing.assert_array_equal(batches(text, config, 7, 3), examples[7:10])  # as a resumed run asks for them
    other = batches(text, replace(config, seed=1), 0, 20)
    assert (other != examples).any()


@pytest.mark.parametrize("draw", ["anywhere", "epochs"])
@pytest.mark.parametrize("tokens", [17, 18, 32, 33, 48])
def test_a_text_of_hardly_more_than_a_window_is_enough(draw, tokens):
    config = Config(draw=draw, block_size=16, batch_size=4, gradient_accumulation_steps=1)
    examples = batches(np.arange(tokens, dtype=np.uint16), config, 0, 50)
    assert examples.min() == 0 and examples.max() == tokens - 1
