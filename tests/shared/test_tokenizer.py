"""shared/tokenizer.py against GPT-2's published ids and Hugging Face's own tokenizer on the same vocabulary."""

import functools
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


bpe_once = functools.cache(gpt2_bpe)  # for hypothesis, whose examples take no fixture of a wider scope


@pytest.fixture(scope="module")
def gpt2():
    assert find_spec("whisper"), "openai-whisper, which carries GPT-2's ranks, belongs to this environment"
    return bpe_once()


@pytest.fixture(scope="module")
def gpt2_folder(gpt2, tmp_path_factory):
    """GPT-2's vocab.json and merges.txt, written from the ranks: each merge is the last step of its token's own BPE."""
    folder = tmp_path_factory.mktemp("gpt2")
    ranks = gpt2._encoding._mergeable_ranks
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
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def reference(gpt2_folder):
    files = (str(gpt2_folder / "vocab.json"), str(gpt2_folder / "merges.txt"))
    return transformers.GPT2Tokenizer(*files)


def test_gpt2_gives_the_ids_that_its_users_know(gpt2):
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert gpt2.encode("Not all heroes wear capes.") == [3673, 477, 10281, 5806, 1451, 274, 13]
    assert (gpt2.n_vocab, gpt2.eot) == (50257, 50256)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_gpt2_gives_hugging_faces_ids_and_the_text_back(gpt2, gpt2_folder, reference, text):
    ids = gpt2.encode(text)
    assert ids == reference(text)["input_ids"]
    assert ids == load_tokenizer(gpt2_folder).encode(text)
    assert gpt2.decode(ids) == text


@given(st.text())
def test_decoding_what_was_encoded_gives_the_text_back(text):
    assert bpe_once().decode(bpe_once().encode(text)) == text
    assert bpe_once().decode(bpe_once().encode(text, special=True)) == text
    characters = Characters.from_text(text)
    assert characters.decode(characters.encode(text)) == text


@given(st.lists(st.integers(0, 50256)))
def test_a_stream_says_what_decode_says_and_never_half_a_character(ids):
    stream = Stream(bpe_once())
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.end() == bpe_once().decode(ids)


def test_a_character_of_several_tokens_comes_whole(gpt2):
    ids = gpt2.encode("a👩‍👧b")
    stream = Stream(gpt2)
    pieces = [stream.push(id) for id in ids]
    assert len(ids) > 4
    assert "" in pieces
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == "a👩‍👧b"
    cut = Stream(gpt2)
    assert cut.push(gpt2.encode("👩")[0]) == ""
    assert cut.end() == "\ufffd"


def test_the_end_of_text_in_a_text_is_text_unless_asked_for(gpt2, gpt2_folder):
    for bpe in (gpt2, load_tokenizer(gpt2_folder)):
        assert bpe.encode("a<|endoftext|>b") == [64, 27, 91, 437, 1659, 5239, 91, 29, 65]
        assert bpe.encode("a<|endoftext|>b", special=True) == [64, 50256, 65]
        assert bpe.decode([64, 50256, 65]) == "a<|endoftext|>b"


def test_a_lone_surrogate_is_read_as_the_replacement_character(gpt2):
    assert gpt2.decode(gpt2.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("letter", ["x", " ", "\n", "^", "我"])
def test_a_million_equal_characters_come_to_an_end(gpt2, letter):
    """The work must not grow with the square of the length: it takes a second, and would take a day."""
    text = letter * 1_000_000
    assert tokenizer._within(300, lambda: gpt2.decode(gpt2.encode(text))) == text


@pytest.mark.parametrize("id", [-1, 50257, 10**30])
def test_an_id_outside_the_vocabulary_is_an_unknown_character(gpt2, id):
    """Some models pad their embedding; a run must not end at such a token."""
    assert gpt2.decode([0, id]) == "!\ufffd" and Stream(gpt2).push(id) == "\ufffd"
    assert Characters("ab").decode([0, id]) == "a\ufffd"


def test_ids_may_be_numpys(gpt2):
    assert gpt2.decode(np.array([31373, 995])) == "hello world"
    assert Characters("ab").decode(np.array([1, 0], np.uint16)) == "ba"


# -- folders


def test_a_folder_with_characters(tmp_path):
    made = Characters.from_text("hello, wörld 我")
    made.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("wörld") == made.encode("wörld")
    assert loaded.decode(loaded.encode("我, hello")) == "我, hello"
    assert (loaded.n_vocab, loaded.eot) == (len(set("hello, wörld 我")), None)
    assert os.listdir(tmp_path) == ["meta.json"]
    assert (tmp_path / "meta.json").read_bytes().endswith(b"}\n")  # on every system
    with pytest.raises(ValueError, match="'Z' is not one of the 11 characters that this model knows"):
        loaded.encode("heZ")


def test_an_unknown_character_is_named_with_a_line_of_those_known():
    characters = Characters("".join(map(chr, range(0x4E00, 0x5E00))))
    with pytest.raises(ValueError, match="'a' is not one of the 4096 characters") as error:
        characters.encode("a")
    assert len(str(error.value)) < 200


def test_a_disk_that_fills_leaves_the_characters_of_before(tmp_path, monkeypatch):
    Characters("ab").save(tmp_path)
    write = Path.write_text

    def half(path, text, **more):
        write(path, text[:3], **more)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        Characters("abc").save(tmp_path)
    assert load_tokenizer(tmp_path).chars == "ab"


def test_gpt2s_weights_without_its_vocabulary_get_gpt2s_own(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 50257}', encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("hello world") == [31373, 995]


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"chars": 5}', '{"chars": ""}', '{"chars": "aba"}', '{"chars": "a\\ud800"}', "[" * 100_000]
)
def test_a_damaged_character_file_is_named(tmp_path, content):
    (tmp_path / "meta.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"meta\.json (is not valid JSON|must hold)") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture
def small_folder(tmp_path):
    """256 bytes, three merges and the end of text."""
    alphabet = list(tokenizer.byte_of_character())
    tokens = [*alphabet, "he", "ll", "hell", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(tokens)}), "utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n", encoding="utf-8")
    return tmp_path


def test_a_small_vocabulary_is_read_line_by_line(small_folder):
    bpe = load_tokenizer(small_folder)
    assert bpe.encode("hello") == [258, bpe.encode("o")[0]]
    assert (bpe.n_vocab, bpe.eot) == (260, 259)
    assert bpe.encode("<|endoftext|>", special=True) == [259]


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_another_systems_line_endings_change_nothing(small_folder, file):
    before = load_tokenizer(small_folder)
    path = small_folder / file
    path.write_bytes(b"\r\n".join([*path.read_bytes().splitlines(), b""]))
    after = load_tokenizer(small_folder)
    assert after.encode("hello\r\nhell\n") == before.encode("hello\r\nhell\n")


def test_new_files_in_the_same_folder_are_read_anew(small_folder):
    assert load_tokenizer(small_folder).encode("ll") == [257]
    vocab = json.loads((small_folder / "vocab.json").read_text(encoding="utf-8"))
    vocab["lh"] = vocab.pop("ll")
    vocab["helh"] = vocab.pop("hell")
    (small_folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (small_folder / "merges.txt").write_text("h e\nl h\nhe lh\n", encoding="utf-8")
    bpe = load_tokenizer(small_folder)
    assert len(bpe.encode("ll")) == 2
    assert bpe.encode("helh") == [258]


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        ("vocab.json", '"he": 256', '"he": 257', "a number of its own"),
        ("vocab.json", '"he": 256', '"he": "256"', "a number of its own"),
        ("vocab.json", '"he": 256', '"he": 1000', "a number of its own"),
        ("vocab.json", '"<|endoftext|>"', '"<|end|>"', r"lacks the token '<\|endoftext\|>'"),
        ("vocab.json", '"A"', '"AA"', "lacks the token 'A'"),
        ("vocab.json", '"he": 256', f'"he": {5000 * "1"}', "is not valid JSON"),
        ("vocab.json", "259}", '259, "": 260}', "has the token '', which merges.txt does not make"),
        ("vocab.json", "259}", '259, "\\ud800": 260}', r"has the token '\\ud800', which merges.txt does not make"),
        ("merges.txt", "he ll\n", "", "has the token 'hell', which merges.txt does not make"),
        ("merges.txt", "he ll", "h ell", "does not fit vocab.json at the line 'h ell'"),
        ("merges.txt", "he ll", "he ll\n<| endoftext|>", "does not fit vocab.json at the line '<. endoftext.>'"),
        ("vocab.json", "259}", "259", "is not valid JSON"),
        ("merges.txt", "h e\nl l", "l l\nh e", "does not fit vocab.json at the line 'h e'"),
        ("merges.txt", "l l", "l x", "does not fit vocab.json at the line 'l x'"),
        ("merges.txt", "l l", "l l l", "does not fit vocab.json at the line 'l l l'"),
        ("merges.txt", "l l", "l\u4e00", "does not fit vocab.json at the line"),
    ],
)
def test_files_that_do_not_fit_are_named_with_the_place(small_folder, file, before, after, message):
    text = (small_folder / file).read_text(encoding="utf-8")
    assert before in text
    (small_folder / file).write_text(text.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(small_folder)
    assert "\n" not in str(error.value)


@pytest.fixture
def saved_folder(small_folder, tmp_path_factory):
    """The same vocabulary, in the one file that transformers saves."""
    files = [str(small_folder / name) for name in ("vocab.json", "merges.txt")]
    transformers.GPT2Tokenizer(*files).save_pretrained(folder := tmp_path_factory.mktemp("saved"))
    assert not (folder / "vocab.json").exists()
    return folder


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_transformers_saves_gives_its_ids(saved_folder, text):
    ids = load_tokenizer(saved_folder).encode(f"hello{text}")
    assert ids == transformers.AutoTokenizer.from_pretrained(saved_folder)(f"hello{text}")["input_ids"]
    assert ids[0] == 258


def test_another_vocabulary_of_gpt2s_size_is_not_taken_for_gpt2s(saved_folder):
    (saved_folder / "config.json").write_text('{"vocab_size": 50257}', encoding="utf-8")
    assert load_tokenizer(saved_folder).n_vocab == 260


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
def test_a_tokenizer_of_another_kind_is_refused(saved_folder, before, after):
    path = saved_folder / "tokenizer.json"
    text = json.dumps(json.loads(path.read_text(encoding="utf-8")), separators=(",", ":"))
    assert before in text
    path.write_text(text.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json must be GPT-2's kind: byte-level BPE"):
        load_tokenizer(saved_folder)


def test_a_file_that_is_no_utf8_is_named(small_folder):
    (small_folder / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"merges\.txt cannot be read"):
        load_tokenizer(small_folder)


def test_a_folder_without_a_tokenizer_says_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 65}', encoding="utf-8")
    with pytest.raises(ValueError, match="has no tokenizer: meta.json, vocab.json and merges.txt, or tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_half_a_vocabulary_is_not_taken_for_none(small_folder, missing):
    """GPT-2's own would be taken in its place, by its size."""
    (small_folder / "config.json").write_text('{"vocab_size": 50257}', encoding="utf-8")
    (small_folder / missing).unlink()
    with pytest.raises(ValueError, match=r"must hold both vocab\.json and merges\.txt, or neither$"):
        load_tokenizer(small_folder)


def test_reading_a_folder_writes_nothing_and_needs_no_cache(small_folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    load_tokenizer(small_folder)
    assert os.listdir(cache) == []


# -- GPT-2's ranks without the package that carries them


@pytest.fixture
def no_whisper(tmp_path, monkeypatch):
    """Nor anything in tiktoken's cache, which is in memory too."""
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


@pytest.fixture
def asked(no_whisper, gpt2, monkeypatch):
    """What is asked of the network, in turn. The host answers; what tiktoken then makes is GPT-2's encoding."""
    asked = []

    class Answer(io.BytesIO):
        def read(self, size=-1):
            asked.append(f"read {size}")
            return b""

    def urlopen(url, timeout=None):
        asked.append(f"{url} within {timeout} s")
        return Answer()

    def get_encoding(name):
        asked.append(f"{name} from tiktoken")
        return gpt2._encoding

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    return asked


def test_a_host_that_answers_in_time_is_left_all_the_time_it_takes(asked):
    """It is asked for a byte; tiktoken, which has no limit for a host that is silent, for the rest."""
    assert gpt2_bpe().encode("hello world") == [31373, 995]
    assert asked == [f"{URL}vocab.bpe within {tokenizer.DEADLINE_S} s", "read 1", "gpt2 from tiktoken"]
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
@pytest.mark.parametrize("place", ["urlopen", "get_encoding"])
def test_an_unreachable_host_is_named_in_few_words_with_both_ways_on(asked, monkeypatch, place, error, says):
    monkeypatch.setattr(*{"urlopen": (urllib.request,), "get_encoding": (tiktoken,)}[place], place, fail_with(error))
    with pytest.raises(ValueError, match="^GPT-2's tokenizer is in no cache and cannot be fetched") as error:
        gpt2_bpe()
    line = str(error.value)
    assert says in line and line.isprintable() and len(line) < 450
    assert "set TIKTOKEN_CACHE_DIR to a folder" in line and "pip install --no-deps openai-whisper" in line


def put_in_tiktokens_cache(folder, gpt2_folder, monkeypatch):
    """OpenAI's files hold the same tokens in other JSON spacing: tiktoken is made to expect ours."""
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
def test_tiktokens_cache_serves_without_network(no_whisper, gpt2_folder, tmp_path, monkeypatch, variable):
    monkeypatch.setattr(socket, "getaddrinfo", fail_with(AssertionError("the network is asked")))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    cache = tmp_path / "cache" if variable else tmp_path / "data-gym-cache"
    cache.mkdir()
    if variable:
        monkeypatch.setenv(variable, str(cache))
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    put_in_tiktokens_cache(cache, gpt2_folder, monkeypatch)
    assert gpt2_bpe().encode("hello world") == [31373, 995]


def test_half_of_tiktokens_cache_is_none(asked, tmp_path, gpt2_folder, monkeypatch):
    put_in_tiktokens_cache(tmp_path, gpt2_folder, monkeypatch)
    gpt2_bpe()
    assert asked == ["gpt2 from tiktoken"]
    (tmp_path / hashlib.sha1(f"{URL}encoder.json".encode()).hexdigest()).unlink()
    gpt2_bpe()
    assert asked[1].startswith(URL)


def test_a_carried_file_with_other_ranks_is_not_believed(no_whisper, tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "gpt2.tiktoken").write_bytes(b"aGVsbG8= 0\n")

    class Spec:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr(tokenizer, "find_spec", lambda name: Spec)
    monkeypatch.setattr(urllib.request, "urlopen", fail_with(OSError("offline")))
    with pytest.raises(ValueError, match=r"in no cache and cannot be fetched \(offline\)"):
        gpt2_bpe()


def test_reading_the_carried_ranks_imports_neither_whisper_nor_its_dependencies(gpt2):
    """Nothing else in this process would import them."""
    assert not sys.modules.keys() & {"whisper", "numba"}
