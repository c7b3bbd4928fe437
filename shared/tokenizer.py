"""Text to token ids and back, and the folder of a model: the tokenizer's files are in the same folder as the weights.

    found = find_model("gpt2-nano")         # or "gpt2", a folder, or None for the default
    tokenizer = load_tokenizer(found.folder)
    ids = tokenizer.encode("Hi there!!")
    stream = Stream(tokenizer)              # prints whole characters only
    print("".join(stream.push(id) for id in ids) + stream.end())

BPE and Characters have the same interface: encode, decode, to_bytes, n_vocab, eot.

`<|endoftext|>` in a text is encoded as those 13 characters, unless the caller says `encode(text, special=True)`: what a
user types must not end the text. (transformers' AutoTokenizer encodes it as the special id.) A lone surrogate, which
UTF-8 cannot encode, is U+FFFD to BPE and an unknown character to Characters.

What a user can get wrong (a name, a folder, a damaged file, a character) raises a ValueError whose message is one line.
"""

import base64
import codecs
import hashlib
import http.client
import json
import os
import re
import tempfile
import threading
import urllib.request
from collections.abc import Iterable
from concurrent.futures import Future, wait
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
NANO = "gpt2-nano"
HUB_FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")  # the last completes the model
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\ufffd".encode()  # for a token id beyond the vocabulary: some models pad their embedding
DEADLINE_S = 2.0  # for a host to answer
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = ("vocab.bpe", "encoder.json")  # which tiktoken builds its "gpt2" from
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
FETCH_ERRORS = (OSError, ValueError, http.client.HTTPException)


# -- tokenizers


class BPE:
    """GPT-2's byte-level BPE, by tiktoken."""

    def __init__(self, encoding: tiktoken.Encoding):
        self._encoding = encoding
        self.n_vocab = encoding.n_vocab
        self.eot = encoding.eot_token

    @classmethod
    def from_ranks(cls, ranks: dict[bytes, int], eot: int) -> "BPE":
        special = {END_OF_TEXT: eot}
        return cls(tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special))

    def encode(self, text: str, special: bool = False) -> list[int]:
        if special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def to_bytes(self, id: int) -> bytes:
        return self._encoding.decode_single_token_bytes(id) if 0 <= id < self.n_vocab else UNKNOWN

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8, such as part of a character, become U+FFFD."""
        return b"".join(map(self.to_bytes, ids)).decode("utf-8", errors="replace")


class Characters:
    """One token per character; kept in meta.json in the same folder as the data and the weights."""

    eot = None

    def __init__(self, chars: str):
        self.chars = chars
        self.n_vocab = len(chars)
        self._ids = {char: id for id, char in enumerate(chars)}

    @classmethod
    def from_text(cls, text: str) -> "Characters":
        return cls("".join(sorted(set(text))))

    def save(self, folder: str | os.PathLike) -> None:
        path = Path(folder, "meta.json")
        temporary = path.with_name(f"meta.json.{os.getpid()}.part")
        try:
            temporary.write_text(json.dumps({"chars": self.chars}) + "\n", encoding="utf-8", newline="\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def encode(self, text: str, special: bool = False) -> list[int]:
        for char in text:
            if char not in self._ids:
                chars = self.chars if self.n_vocab <= 100 else self.chars[:100] + "…"
                raise ValueError(f"{char!r} is not one of the {self.n_vocab} characters of this model: {chars!r}")
        return [self._ids[char] for char in text]

    def to_bytes(self, id: int) -> bytes:
        return self.chars[id].encode("utf-8") if 0 <= id < self.n_vocab else UNKNOWN

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.to_bytes, ids)).decode("utf-8")


class Stream:
    """Decodes one id at a time; the pieces, joined, are what decode gives for all the ids."""

    def __init__(self, tokenizer: BPE | Characters):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The characters that this id completes, if any."""
        return self._decoder.decode(self._tokenizer.to_bytes(id))

    def end(self) -> str:
        """U+FFFD if the last character is incomplete."""
        return self._decoder.decode(b"", final=True)


def encode_prompt(tokenizer: BPE | Characters, text: str, vocab_size: int) -> list[int]:
    """A prompt's token ids for a model with vocab_size rows; an empty prompt starts from <|endoftext|>."""
    ids = tokenizer.encode(text) or [tokenizer.eot]
    if ids == [None]:
        raise ValueError("prompt must not be empty: this model has no <|endoftext|>")
    if max(ids) >= vocab_size:
        raise ValueError(f"prompt must have token ids below vocab_size ({vocab_size}), got {max(ids)}")
    return ids


# -- tokenizer files


def load_tokenizer(folder: str | os.PathLike) -> BPE | Characters:
    """The tokenizer of a checkpoint's folder: meta.json, vocab.json and merges.txt, tokenizer.json, or GPT-2's own."""
    folder = Path(folder)
    if (folder / "meta.json").exists():
        return _read_characters(folder / "meta.json")
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if vocab.exists() != merges.exists():
        raise ValueError(f"{folder} must hold both vocab.json and merges.txt, or neither")
    if vocab.exists():
        return _read_vocabulary(vocab, merges)
    if (folder / "tokenizer.json").exists():  # transformers 5 saves no other file
        return _read_tokenizer_json(folder / "tokenizer.json")
    if _read_json(folder / "config.json").get("vocab_size") == 50257:  # GPT-2's weights without its vocabulary
        return gpt2_bpe()
    raise ValueError(f"{folder} must hold a tokenizer: meta.json, vocab.json and merges.txt, or tokenizer.json")


def gpt2_bpe() -> BPE:
    """GPT-2's own BPE: from the package openai-whisper, which includes its ranks, else tiktoken's cache or download."""
    whisper = find_spec("whisper")  # importing it would need numba
    for folder in (whisper.submodule_search_locations or ()) if whisper else ():
        path = Path(folder, "assets", "gpt2.tiktoken")
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() == GPT2_SHA256:
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}
            return BPE.from_ranks(ranks, len(ranks))
    try:
        if not _in_tiktokens_cache():  # tiktoken would wait for the host without a limit
            _within(DEADLINE_S, lambda: _get(GPT2_URL + GPT2_FILES[0], 1))
        return BPE(tiktoken.get_encoding("gpt2"))
    except FETCH_ERRORS as error:
        raise ValueError(
            f"GPT-2's tokenizer is not in a local cache and cannot be fetched ({_in_a_line(error)}): set "
            "TIKTOKEN_CACHE_DIR to tiktoken's cache, or run: pip install --no-deps openai-whisper"
        ) from None


def _in_tiktokens_cache() -> bool:
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    keys = [hashlib.sha1((GPT2_URL + name).encode()).hexdigest() for name in GPT2_FILES]
    return all(os.path.exists(os.path.join(folder, key)) for key in keys)


def _read_characters(path: Path) -> Characters:
    chars = _read_json(path).get("chars")
    if not isinstance(chars, str) or not chars or len(set(chars)) != len(chars) or re.search("[\ud800-\udfff]", chars):
        raise ValueError(f'{path} must hold "chars", a text of distinct characters')
    return Characters(chars)


def _read_vocabulary(vocab_path: Path, merges_path: Path) -> BPE:
    """GPT-2's file format. (tiktoken's own reader copies each local file to a cache, which may be read-only.)"""
    lines = _read(merges_path).split("\n")
    lines = lines[lines[0].startswith("#version") :]
    return _bpe(_read_json(vocab_path), [line for line in lines if line], vocab_path, merges_path)


def _read_tokenizer_json(path: Path) -> BPE:
    """The same in one file, the format of the package tokenizers, which has other kinds of tokenizer too."""
    content = _read_json(path)
    try:
        model, split, special = content["model"], content["pre_tokenizer"], content["added_tokens"]
        vocab = model["vocab"] | {token["content"]: token["id"] for token in special}
        lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        names = model["type"], split["type"], *(token["content"] for token in special)
        other = not split.get("use_regex", True) or split.get("add_prefix_space") or content["normalizer"]
        known = names == ("BPE", "ByteLevel", END_OF_TEXT) and not other
    except (TypeError, KeyError):
        known = False
    if not known:
        raise ValueError(f"{path} must hold a byte-level BPE like GPT-2's, with no special token but {END_OF_TEXT}")
    return _bpe(vocab, lines, path, path)


def _bpe(vocab: dict[str, int], lines: list[str], vocab_path: Path, merges_path: Path) -> BPE:
    """tiktoken merges the pair whose token has the lowest id; the order of the merges must agree with the ids, or text
    would be tokenized differently than in training."""
    if {*map(type, vocab.values())} != {int} or sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{vocab_path} must number its {len(vocab)} tokens from 0, each once")
    byte_of = byte_of_character()
    tokens, last = set(byte_of), -1
    for line in lines:
        left, _, right = line.partition(" ")
        token = left + right
        if left not in tokens or right not in tokens or token == END_OF_TEXT or vocab.get(token, -1) <= last:
            raise ValueError(f"{merges_path} does not fit {vocab_path.name} at the line {line!r}")
        tokens.add(token)
        last = vocab[token]
    for token in (*byte_of, END_OF_TEXT):
        if token not in vocab:
            raise ValueError(f"{vocab_path} lacks the token {token!r}")
    if extra := vocab.keys() - tokens - {END_OF_TEXT}:
        raise ValueError(f"{vocab_path} has the token {min(extra)!r}, which {merges_path.name} does not produce")
    return BPE.from_ranks({bytes(map(byte_of.get, token)): vocab[token] for token in tokens}, vocab[END_OF_TEXT])


def byte_of_character() -> dict[str, int]:
    """GPT-2's files write each byte as a visible character: itself if it is visible, else the next from U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


# -- models by name


class Found(NamedTuple):
    name: str
    folder: Path
    why: str  # for the first line that a script prints


def find_model(name: str | None = None) -> Found:
    """The folder of a model: one of GPT-2's names, gpt2-nano, or a folder in Hugging Face's format.

    The default is gpt2 if it is in the local cache or the hub answers, else gpt2-nano. Deciding takes under 3 s, even
    without a network; a download, once started, has no limit.
    """
    if name is None:
        return _find_default()
    if name in GPT2_NAMES:
        return _find_on_hub(name)
    folder = CHECKPOINTS / NANO if name == NANO else Path(name)
    if name == "" or (name != NANO and not os.path.isdir(name)):  # Path.is_dir raises if a name is too long
        raise ValueError(f"model must be {', '.join(GPT2_NAMES)}, {NANO} or a folder, got {name!r}")
    if not os.path.isfile(folder / "config.json"):
        raise ValueError(f"{folder} must hold config.json")
    if not any(os.path.isfile(folder / file) for file in WEIGHTS):
        raise ValueError(f"{folder} must hold {' or '.join(WEIGHTS)}: weights are read from no other format")
    return Found(name, folder, "in the repository" if name == NANO else "a folder")


def _find_default() -> Found:
    try:
        found = _find_on_hub("gpt2")
        load_tokenizer(found.folder)  # the cache may hold the weights without a tokenizer
        return found
    except ValueError as error:
        why = str(error)
    try:
        return find_model(NANO)._replace(why=why)
    except ValueError as error:
        raise ValueError(f"{why}, and {error}") from None


def find_in_cache(name: str) -> Path | None:
    """The folder of one of GPT-2's names in the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache  # an import of 0.3 s, only for models by name

    for repo in (f"openai-community/{name}", name):
        try:
            paths = [try_to_load_from_cache(repo, file) for file in ("config.json", "model.safetensors")]
        except OSError as error:
            raise ValueError(f"{name} is in the local cache, which cannot be read: {_in_a_line(error)}") from None
        if all(isinstance(path, str) for path in paths):
            return Path(paths[0]).parent
    return None


def _find_on_hub(name: str) -> Found:
    if folder := find_in_cache(name):
        return Found(name, folder, "in the local cache")
    from huggingface_hub import constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{name} is not in the local cache and HF_HUB_OFFLINE is set")
    repo = f"openai-community/{name}"
    try:
        # the hub's client would retry for half a minute; a captive portal answers, but not with JSON
        answer = _within(DEADLINE_S, lambda: _get(f"{constants.ENDPOINT}/{repo}/resolve/main/config.json"))
        json.loads(answer)
    except FETCH_ERRORS as error:
        raise ValueError(f"{name} is not in the local cache and cannot be fetched ({_in_a_line(error)})") from None
    try:
        # after Ctrl-C Python waits for the threads of snapshot_download, but not for this one
        paths = _within(None, lambda: [hf_hub_download(repo, file) for file in HUB_FILES])
    except Exception as error:  # the client, its transports and the disk each have classes of their own
        raise ValueError(f"{name} could not be downloaded ({_in_a_line(error)})") from error
    return Found(name, Path(paths[0]).parent, "downloaded from the hub")


# -- files and hosts


def _read(path: Path, parse=str):
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {_in_a_line(error)}") from None


def _read_json(path: Path) -> dict:
    content = _read(path, json.loads)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _get(url: str, size: int = -1) -> bytes:
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
        return answer.read(size)


def _within(seconds: float | None, call):
    """What call() returns or raises, or a TimeoutError: looking up a host's name has no time-out of its own."""
    future = Future()

    def work():
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([future], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return future.result()


def _in_a_line(error: BaseException) -> str:
    """The innermost error's own words: urllib and requests wrap theirs, and requests writes 500 characters."""
    while isinstance(inner := getattr(error, "reason", None) or next(iter(error.args), None), BaseException):
        error = inner
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
