"""shared/tokenizer.py against GPT-2's published ids and Hugging Face's own tokenizer on the same vocabulary."""

import hashlib
import http.client
import io
import json
import keyword
import os
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
import tiktoken_ext.openai_public
import transformers
from hypothesis import given
from hypothesis import strategies as st

from shared import tokenizer
from shared.tokenizer import Characters, Stream, gpt2_bpe, load_tokenizer

assert find_spec("whisper"), "openai-whisper, which includes GPT-2's ranks, must be in this environment"
GPT2 = gpt2_bpe()
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
TEXTS = {
    "english": "Do people really like using ONNX? They'd've said so, wouldn't they: 1,234.56% of THEM!",
    "code": "def f(x):\n\treturn {k: v for k, v in x.items() if v != 0}  # \\n\r\n" + " ".join(keyword.kwlist),
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 ☕️ naïve café — “quoted” … ½ ①",
    "chinese": "我能吞下玻璃而不伤身体。北京2026年，ＡＢＣ",
    "bytes": np.random.default_rng(0).bytes(10_000).decode("utf-8", errors="replace"),
    "latin": np.random.default_rng(1).bytes(10_000).decode("latin-1"),
    "blank": " \n\n   \t \u00a0\u3000\u2028 end   \n",
    "empty": "",
}
each_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")


def replace(path, before, after):
    text = path.read_text(encoding="utf-8")
    assert before in text
    write(path, text.replace(before, after, 1))


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """GPT-2's vocab.json and merges.txt, written from the ranks: each merge is the last step of its token's own BPE."""
    folder = tmp_path_factory.mktemp("gpt2")
    ranks = GPT2._encoding._mergeable_ranks
    spell = {byte: char for char, byte in tokenizer.byte_of_character().items()}

    def spelled(token):
        return "".join(spell[byte] for byte in token)

    def halves(token):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    vocab = {spelled(token): rank for token, rank in ranks.items()} | {"<|endoftext|>": 50256}
    merges = [" ".join(map(spelled, halves(token))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    write(folder / "vocab.json", json.dumps(vocab))
    write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    return folder


@pytest.fixture(scope="module")
def reference(gpt2_folder):
    return transformers.GPT2Tokenizer(*(str(gpt2_folder / name) for name in ("vocab.json", "merges.txt")))


def test_gpt2_gives_the_published_ids():
    assert GPT2.encode("hello world") == [31373, 995]
    assert GPT2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert GPT2.encode("Not all heroes wear capes.") == [3673, 477, 10281, 5806, 1451, 274, 13]
    assert (GPT2.n_vocab, GPT2.eot) == (50257, 50256)


@each_text
def test_gpt2_gives_hugging_faces_ids(gpt2_folder, reference, text):
    ids = GPT2.encode(text)
    assert ids == reference(text)["input_ids"]
    assert ids == load_tokenizer(gpt2_folder).encode(text)


@given(st.text())
def test_decoding_inverts_encoding(text):
    assert GPT2.decode(GPT2.encode(text)) == text
    assert GPT2.decode(GPT2.encode(text, special=True)) == text
    characters = Characters.from_text(text)
    assert characters.decode(characters.encode(text)) == text


@given(st.text().map(GPT2.encode), st.lists(st.integers(0, 50256)))
def test_a_stream_gives_what_decode_gives_and_never_half_a_character(ids, more_ids):
    stream = Stream(GPT2)
    pieces = [stream.push(id) for id in ids + more_ids]
    assert "".join(pieces) + stream.end() == GPT2.decode(ids + more_ids)


def test_the_end_of_text_in_a_text_is_text_unless_asked_for(gpt2_folder):
    for bpe in (GPT2, load_tokenizer(gpt2_folder)):
        assert bpe.encode("a<|endoftext|>b") == [64, 27, 91, 437, 1659, 5239, 91, 29, 65]
        assert bpe.encode("a<|endoftext|>b", special=True) == [64, 50256, 65]
        assert bpe.decode([64, 50256, 65]) == "a<|endoftext|>b"


def test_a_lone_surrogate_is_read_as_the_replacement_character():
    assert GPT2.decode(GPT2.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("letter", ["x", " ", "\n", "^", "我"])
def test_a_million_equal_characters_take_seconds(letter):
    """If the work grew with the square of the length, it would take a day."""
    text = letter * 1_000_000
    assert tokenizer._within(300, lambda: GPT2.decode(GPT2.encode(text))) == text


@pytest.mark.parametrize("id", [-1, 50257, 10**30])
def test_an_id_outside_the_vocabulary_is_an_unknown_character(id):
    """Some models pad their embedding; a run must not end at such a token."""
    assert GPT2.decode([0, id]) == "!\ufffd" and Stream(GPT2).push(id) == "\ufffd"
    assert Characters("ab").decode([0, id]) == "a\ufffd"


def test_ids_may_be_numpys():
    assert GPT2.decode(np.array([31373, 995])) == "hello world"
    assert Characters("ab").decode(np.array([1, 0], np.uint16)) == "ba"


# -- characters


def test_characters_are_saved_and_loaded(tmp_path):
    saved = Characters.from_text("hello, wörld 我")
    saved.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.chars, loaded.n_vocab, loaded.eot) == (saved.chars, 11, None)
    assert os.listdir(tmp_path) == ["meta.json"]
    assert (tmp_path / "meta.json").read_bytes().endswith(b"}\n")  # on every system


@pytest.mark.parametrize(("first", "last", "count"), [("b", "y", 24), ("\u4e00", "\u5dff", 4096)])
def test_an_unknown_character_is_named_with_one_line_of_the_known_ones(first, last, count):
    characters = Characters("".join(map(chr, range(ord(first), ord(last) + 1))))
    with pytest.raises(ValueError, match=f"^'Z' is not one of the {count} characters of this model: '{first}") as error:
        characters.encode(f"{first}Z")
    assert len(str(error.value)) < 200


def test_a_full_disk_leaves_the_previous_characters(tmp_path, monkeypatch):
    Characters("ab").save(tmp_path)
    write_text = Path.write_text

    def half(path, text, **more):
        write_text(path, text[:3], **more)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        Characters("abc").save(tmp_path)
    assert os.listdir(tmp_path) == ["meta.json"] and load_tokenizer(tmp_path).chars == "ab"


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"chars": 5}', '{"chars": ""}', '{"chars": "aba"}', '{"chars": "a\\ud800"}', "[" * 100_000]
)
def test_a_damaged_character_file_is_named(tmp_path, content):
    write(tmp_path / "meta.json", content)
    with pytest.raises(ValueError, match=r"meta\.json (cannot be read: |must hold )") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# -- a BPE's files


def test_gpt2s_weights_without_its_vocabulary_get_gpt2s_own(tmp_path):
    write(tmp_path / "config.json", '{"vocab_size": 50257}')
    assert load_tokenizer(tmp_path).encode("hello world") == [31373, 995]


@pytest.fixture
def small_folder(tmp_path):
    """256 bytes, three merges and the end of text."""
    tokens = [*tokenizer.byte_of_character(), "he", "ll", "hell", "<|endoftext|>"]
    write(tmp_path / "vocab.json", json.dumps({token: id for id, token in enumerate(tokens)}))
    write(tmp_path / "merges.txt", "#version: 0.2\nh e\nl l\nhe ll\n")
    return tmp_path


@pytest.mark.parametrize("file", [None, "vocab.json", "merges.txt"])
def test_a_small_vocabulary_is_read_with_any_systems_line_endings(small_folder, file, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    if file:
        write(small_folder / file, (small_folder / file).read_text(encoding="utf-8").replace("\n", "\r\n"))
    bpe = load_tokenizer(small_folder)
    assert bpe.encode("hello\r\n") == [258, *bpe.encode("o\r\n")]
    assert (bpe.n_vocab, bpe.eot) == (260, 259)
    assert bpe.encode("<|endoftext|>", special=True) == [259]
    assert os.listdir(cache) == []


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        ("vocab.json", '"he": 256', '"he": 257', "must number its 260 tokens from 0"),
        ("vocab.json", '"he": 256', '"he": "256"', "must number its 260 tokens from 0"),
        ("vocab.json", '"he": 256', '"he": 1000', "must number its 260 tokens from 0"),
        ("vocab.json", '"<|endoftext|>"', '"<|end|>"', r"lacks the token '<\|endoftext\|>'"),
        ("vocab.json", '"A"', '"AA"', "lacks the token 'A'"),
        ("vocab.json", '"he": 256', f'"he": {5000 * "1"}', "cannot be read: "),
        ("vocab.json", "259}", '259, "": 260}', "has the token '', which merges.txt does not produce"),
        ("vocab.json", "259}", '259, "\\ud800": 260}', r"has the token '\\ud800', which merges.txt does not produce"),
        ("merges.txt", "he ll\n", "", "has the token 'hell', which merges.txt does not produce"),
        ("merges.txt", "he ll", "h ell", "does not fit vocab.json at the line 'h ell'"),
        ("merges.txt", "he ll", "he ll\n<| endoftext|>", "does not fit vocab.json at the line '<. endoftext.>'"),
        ("vocab.json", "259}", "259", "cannot be read: "),
        ("merges.txt", "h e\nl l", "l l\nh e", "does not fit vocab.json at the line 'h e'"),
        ("merges.txt", "l l", "l x", "does not fit vocab.json at the line 'l x'"),
        ("merges.txt", "l l", "l l l", "does not fit vocab.json at the line 'l l l'"),
        ("merges.txt", "l l", "l\u4e00", "does not fit vocab.json at the line"),
    ],
)
def test_files_that_do_not_fit_are_named_with_the_place(small_folder, file, before, after, message):
    replace(small_folder / file, before, after)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(small_folder)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_utf8_is_named(small_folder):
    (small_folder / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"merges\.txt cannot be read"):
        load_tokenizer(small_folder)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_half_a_vocabulary_is_not_replaced_by_gpt2s(small_folder, missing):
    write(small_folder / "config.json", '{"vocab_size": 50257}')
    (small_folder / missing).unlink()
    with pytest.raises(ValueError, match=r"must hold both vocab\.json and merges\.txt, or neither$"):
        load_tokenizer(small_folder)


def test_a_folder_without_a_tokenizer_says_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_tokenizer(tmp_path)
    write(tmp_path / "config.json", '{"vocab_size": 65}')
    with pytest.raises(ValueError, match="must hold a tokenizer: meta.json, vocab.json and "):
        load_tokenizer(tmp_path)


@pytest.fixture
def saved_folder(small_folder, tmp_path_factory):
    """The same vocabulary, in the one file that transformers saves."""
    files = [str(small_folder / name) for name in ("vocab.json", "merges.txt")]
    transformers.GPT2Tokenizer(*files).save_pretrained(folder := tmp_path_factory.mktemp("saved"))
    assert not (folder / "vocab.json").exists()
    return folder


@each_text
def test_the_file_that_transformers_saves_gives_its_ids(saved_folder, text):
    write(saved_folder / "config.json", '{"vocab_size": 50257}')  # the size alone does not make it GPT-2's vocabulary
    ids = load_tokenizer(saved_folder).encode(f"hello{text}")
    assert ids == transformers.AutoTokenizer.from_pretrained(saved_folder)(f"hello{text}")["input_ids"]
    assert ids[0] == 258


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"type":"BPE"', '"type":"Unigram"'),
        ('"type":"ByteLevel"', '"type":"Whitespace"'),
        ('"add_prefix_space":false', '"add_prefix_space":true'),
        ('"use_regex":true', '"use_regex":false'),
        ('"normalizer":null', '"normalizer":{"type":"NFC"}'),
        ('"content":"<|endoftext|>"', '"content":"<pad>"'),
        ('"added_tokens":[', '"added_tokens":[{"id":260,"content":"<pad>"},'),
        ('"pre_tokenizer":', '"other":'),
        ('"model":', '"model":null,"other":'),
    ],
)
def test_another_kind_of_tokenizer_is_refused(saved_folder, before, after):
    path = saved_folder / "tokenizer.json"
    write(path, json.dumps(json.loads(path.read_text(encoding="utf-8")), separators=(",", ":")))
    replace(path, before, after)
    with pytest.raises(ValueError, match=r"tokenizer\.json must hold a byte-level BPE like GPT-2's"):
        load_tokenizer(saved_folder)


# -- GPT-2's ranks without the package that includes them


@pytest.fixture
def no_whisper(tmp_path, monkeypatch):
    """And nothing in tiktoken's caches, on disk or in memory."""
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


@pytest.fixture
def requested(no_whisper, monkeypatch):
    """The requests to the network, in order; the host answers, and tiktoken then returns GPT-2's encoding."""
    requested = []

    class Answer(io.BytesIO):
        def read(self, size=-1):
            requested.append(f"read {size}")
            return b""

    monkeypatch.setattr(
        urllib.request, "urlopen", lambda url, timeout: requested.append(f"{url} within {timeout} s") or Answer()
    )
    monkeypatch.setattr(
        tiktoken, "get_encoding", lambda name: requested.append(f"{name} from tiktoken") or GPT2._encoding
    )
    return requested


def test_a_host_that_answers_in_time_may_take_its_time(requested):
    """We ask it for one byte; tiktoken, which waits for a silent host without a limit, downloads the rest."""
    assert gpt2_bpe().encode("hello world") == [31373, 995]
    assert requested == [f"{URL}vocab.bpe within {tokenizer.DEADLINE_S} s", "read 1", "gpt2 from tiktoken"]
    assert tokenizer.DEADLINE_S < 3


def fail_with(error):
    def fail(*_, **__):
        raise error

    return fail


def long_error():
    """requests' own for a name that does not resolve."""
    inner = requests.packages.urllib3.exceptions.NameResolutionError("host", None, socket.gaierror(-2, "no such name"))
    outer = requests.packages.urllib3.exceptions.MaxRetryError(None, "https://host/" + 400 * "x", inner)
    return requests.exceptions.ConnectionError(outer)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (urllib.error.URLError(socket.gaierror(-2, "no such name")), "([Errno -2] no such name)"),
        (urllib.error.HTTPError("https://host", 403, "Forbidden", None, None), "HTTP Error 403: Forbidden"),
        (http.client.RemoteDisconnected("closed\nwithout a word"), "closed without a word"),
        (ConnectionResetError(), "ConnectionResetError"),
        (OSError(1000 * "x"), 200 * "x" + "..."),
        (long_error(), "Failed to resolve 'host' ([Errno -2] no such name)"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("place", [(urllib.request, "urlopen"), (tiktoken, "get_encoding")], ids=lambda place: place[1])
def test_an_unreachable_host_is_one_short_line_with_both_ways_out(requested, monkeypatch, place, error, says):
    monkeypatch.setattr(*place, fail_with(error))
    with pytest.raises(ValueError, match="^GPT-2's tokenizer is not in a local cache and cannot be fetched") as error:
        gpt2_bpe()
    line = str(error.value)
    assert says in line and line.isprintable() and len(line) < 450
    assert "set TIKTOKEN_CACHE_DIR to" in line and "pip install --no-deps openai-whisper" in line


def put_in_tiktokens_cache(folder, gpt2_folder, monkeypatch):
    """OpenAI's files hold the same tokens with other JSON spacing: tiktoken must expect the SHA-256 of ours."""
    sha256 = []
    for remote, local in (("vocab.bpe", "merges.txt"), ("encoder.json", "vocab.json")):
        data = (gpt2_folder / local).read_bytes()
        (folder / hashlib.sha1((URL + remote).encode()).hexdigest()).write_bytes(data)
        sha256.append(hashlib.sha256(data).hexdigest())
    load = tiktoken.load.data_gym_to_mergeable_bpe_ranks

    def expect_ours(vocab_bpe_file, encoder_json_file, **_):
        return load(vocab_bpe_file, encoder_json_file, *sha256)

    monkeypatch.setattr(tiktoken_ext.openai_public, "data_gym_to_mergeable_bpe_ranks", expect_ours)


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", None])
def test_tiktokens_cache_is_enough(no_whisper, gpt2_folder, tmp_path, monkeypatch, variable):
    monkeypatch.setattr(socket, "getaddrinfo", fail_with(AssertionError("this needs the network")))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    cache = tmp_path / "data-gym-cache"
    cache.mkdir()
    if variable:
        monkeypatch.setenv(variable, str(cache))
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    put_in_tiktokens_cache(cache, gpt2_folder, monkeypatch)
    assert gpt2_bpe().encode("hello world") == [31373, 995]


def test_half_of_tiktokens_cache_is_not_enough(requested, tmp_path, gpt2_folder, monkeypatch):
    put_in_tiktokens_cache(tmp_path, gpt2_folder, monkeypatch)
    gpt2_bpe()
    assert requested == ["gpt2 from tiktoken"]
    (tmp_path / hashlib.sha1(f"{URL}encoder.json".encode()).hexdigest()).unlink()
    gpt2_bpe()
    assert requested[1].startswith(URL)


def test_included_ranks_with_another_sha256_are_not_used(no_whisper, tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "gpt2.tiktoken").write_bytes(b"aGVsbG8= 0\n")

    class Spec:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr(tokenizer, "find_spec", lambda name: Spec)
    monkeypatch.setattr(urllib.request, "urlopen", fail_with(OSError("offline")))
    with pytest.raises(ValueError, match=r"not in a local cache and cannot be fetched \(offline\)"):
        gpt2_bpe()


def test_reading_the_included_ranks_does_not_import_whisper():
    """Nothing else in this process would import it."""
    assert not sys.modules.keys() & {"whisper", "numba"}
