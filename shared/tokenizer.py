"""Text to token ids and back, and the folder that a model's name stands for: the tokenizer stands beside the weights.

    found = find_model("gpt2-nano")         # or "gpt2", a folder, or None for the default
    tokenizer = load_tokenizer(found.folder)
    ids = tokenizer.encode("Hi there!!")
    stream = Stream(tokenizer)              # prints what is whole: no half of a character
    print("".join(stream.push(id) for id in ids) + stream.end())

Two kinds of tokenizer have the same few names: encode, decode, to_bytes, n_vocab, eot.

`<|endoftext|>` in a text is those 13 characters, unless the caller says `encode(text, special=True)`: what a user
types must not end the text. (transformers' AutoTokenizer turns it into the special id.) A lone surrogate, which no
UTF-8 file holds, is U+FFFD to the BPE and an unknown character to a character vocabulary.

What a user can get wrong (a name, a folder, a damaged file, a character, an id) raises a ValueError of one line.
"""

import base64
import codecs
import hashlib
import http.client
import json
import os
import queue
import re
import tempfile
import threading
import urllib.request
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
NANO = "gpt2-nano"
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\ufffd".encode()  # of a token id beyond the vocabulary: some models pad their embedding
DEADLINE_S = 2.0  # for a host to answer
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = ("vocab.bpe", "encoder.json")  # what tiktoken makes its "gpt2" of
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


# -- tokenizers


class BPE:
    """GPT-2's byte-level BPE, by tiktoken."""

    def __init__(self, encoding: tiktoken.Encoding):
        self._encoding = encoding
        self.n_vocab = encoding.n_vocab
        self.eot = encoding.eot_token

    @classmethod
    def from_ranks(cls, ranks: dict[bytes, int], special: dict[str, int]) -> "BPE":
        return cls(tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special))

    def encode(self, text: str, special: bool = False) -> list[int]:
        if special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def to_bytes(self, id: int) -> bytes:
        return self._encoding.decode_single_token_bytes(id) if 0 <= id < self.n_vocab else UNKNOWN

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are no UTF-8, as at a character cut in two, become U+FFFD."""
        return b"".join(map(self.to_bytes, ids)).decode("utf-8", errors="replace")


class Characters:
    """A token a character, for the character-level models; kept in meta.json beside their data and weights."""

    eot = None

    def __init__(self, chars: str):
        self.chars = chars
        self.n_vocab = len(chars)
        self._ids = {char: id for id, char in enumerate(chars)}

    @classmethod
    def from_text(cls, text: str) -> "Characters":
        return cls("".join(sorted(set(text))))

    def save(self, folder: "str | os.PathLike") -> None:
        path = Path(folder, "meta.json")
        beside = path.with_name(f"meta.json.{os.getpid()}.part")
        try:
            beside.write_text(json.dumps({"chars": self.chars}) + "\n", encoding="utf-8", newline="\n")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def encode(self, text: str, special: bool = False) -> list[int]:
        try:
            return [self._ids[char] for char in text]
        except KeyError as error:
            char = error.args[0]
            known = self.chars if self.n_vocab <= 100 else self.chars[:100] + "…"
            raise ValueError(
                f"{char!r} is not one of the {self.n_vocab} characters that this model knows: {known!r}"
            ) from None

    def to_bytes(self, id: int) -> bytes:
        return self.chars[id].encode("utf-8") if 0 <= id < self.n_vocab else UNKNOWN

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.to_bytes, ids)).decode("utf-8")


class Stream:
    """Decodes one id at a time; the pieces, joined, are what decode gives for all the ids."""

    def __init__(self, tokenizer: "BPE | Characters"):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The characters that this id completes; none while one is still half there."""
        return self._decoder.decode(self._tokenizer.to_bytes(id))

    def end(self) -> str:
        """What was left: U+FFFD for a character that never came whole."""
        return self._decoder.decode(b"", final=True)


def encode_prompt(tokenizer: "BPE | Characters", text: str, vocab_size: int) -> list[int]:
    """A prompt's token ids for a model with vocab_size rows; an empty one starts from <|endoftext|>."""
    ids = tokenizer.encode(text) or [tokenizer.eot]
    if ids == [None]:
        raise ValueError("prompt must not be empty: this model has no <|endoftext|>")
    if max(ids) >= vocab_size:
        raise ValueError(f"prompt must have token ids below vocab_size ({vocab_size}), got {max(ids)}")
    return ids


def load_tokenizer(folder: "str | os.PathLike") -> "BPE | Characters":
    """The tokenizer of a checkpoint's folder: meta.json, vocab.json and merges.txt, tokenizer.json, or GPT-2's own."""
    folder = Path(folder)
    if (folder / "meta.json").exists():
        chars = _read_json(folder / "meta.json").get("chars")
        if not isinstance(chars, str) or not chars or len(set(chars)) != len(chars) or _SURROGATE.search(chars):
            raise ValueError(f'{folder / "meta.json"} must hold "chars", a text of distinct characters')
        return Characters(chars)
    here = [(folder / name).exists() for name in ("vocab.json", "merges.txt")]
    if all(here):
        return BPE.from_ranks(*_read_vocabulary(folder / "vocab.json", folder / "merges.txt"))
    if any(here):
        raise ValueError(f"{folder} must hold both vocab.json and merges.txt, or neither")
    if (folder / "tokenizer.json").exists():  # all that transformers 5 saves
        return BPE.from_ranks(*_read_tokenizer(folder / "tokenizer.json"))
    if _read_json(folder / "config.json").get("vocab_size") == 50257:  # GPT-2's weights without its vocabulary
        return gpt2_bpe()
    raise ValueError(f"{folder} has no tokenizer: meta.json, vocab.json and merges.txt, or tokenizer.json")


def gpt2_bpe() -> BPE:
    """GPT-2's own BPE: from the package openai-whisper, which carries its ranks, else tiktoken's cache or download."""
    whisper = find_spec("whisper")  # importing it would need numba
    for folder in (whisper.submodule_search_locations or ()) if whisper else ():
        path = Path(folder, "assets", "gpt2.tiktoken")
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() == GPT2_SHA256:
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}
            return BPE.from_ranks(ranks, {END_OF_TEXT: len(ranks)})
    try:
        if not _in_tiktokens_cache():
            _within(DEADLINE_S, lambda: _get(GPT2_URL + GPT2_FILES[0], 1))  # tiktoken would wait for it without a limit
        return BPE(tiktoken.get_encoding("gpt2"))
    except _FETCH_ERRORS as error:
        raise ValueError(
            f"GPT-2's tokenizer is in no cache and cannot be fetched ({_in_a_line(error)}): set TIKTOKEN_CACHE_DIR to "
            "a folder where tiktoken has cached it, or run: pip install --no-deps openai-whisper"
        ) from None


def _in_tiktokens_cache() -> bool:
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    keys = [hashlib.sha1((GPT2_URL + name).encode()).hexdigest() for name in GPT2_FILES]
    return all(os.path.exists(os.path.join(folder, key)) for key in keys)


def _read_vocabulary(vocab_path: Path, merges_path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ranks and special tokens from GPT-2's file format.

    Read here and not by tiktoken's reader, which keeps a copy of each local file in a cache that may be read-only.
    """
    lines = _read_text(merges_path).split("\n")
    lines = lines[lines[0].startswith("#version") :]
    return _ranks(_read_json(vocab_path), [line for line in lines if line], vocab_path, merges_path)


def _read_tokenizer(path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """The same from one file, of the package tokenizers, which can hold other kinds too."""
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
        raise ValueError(f"{path} must be GPT-2's kind: byte-level BPE, and no special token but {END_OF_TEXT}")
    return _ranks(vocab, lines, path, path)


def _ranks(vocab: dict, lines: list[str], vocab_path: Path, merges_path: Path):
    """tiktoken merges the pair whose token has the lowest id, and merges have an order too: they must agree, line by
    line and to the last token, or text would be cut in another way than in training."""
    if {*map(type, vocab.values())} != {int} or sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{vocab_path} must number its tokens from 0 on, each with a number of its own")
    byte_of = byte_of_character()
    made, last = set(byte_of), -1
    for line in lines:
        left, _, right = line.partition(" ")
        token = left + right
        if left not in made or right not in made or token == END_OF_TEXT or vocab.get(token, -1) <= last:
            raise ValueError(f"{merges_path} does not fit {vocab_path.name} at the line {line!r}")
        made.add(token)
        last = vocab[token]
    for token in (*byte_of, END_OF_TEXT):
        if token not in vocab:
            raise ValueError(f"{vocab_path} lacks the token {token!r}")
    if unmade := vocab.keys() - made - {END_OF_TEXT}:
        raise ValueError(f"{vocab_path} has the token {min(unmade)!r}, which {merges_path.name} does not make")
    ranks = {bytes(byte_of[char] for char in token): vocab[token] for token in made}
    return ranks, {END_OF_TEXT: vocab[END_OF_TEXT]}


def byte_of_character() -> dict[str, int]:
    """GPT-2's files spell each byte as one visible character: itself where it is one, else the next from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


# -- models by name


class Found(NamedTuple):
    name: str
    folder: Path
    why: str  # for the first line that a script prints


def find_model(name: "str | None" = None) -> Found:
    """The folder of a model: one of GPT-2's names, gpt2-nano, or a folder in Hugging Face's format.

    Without a name it is gpt2 where that is in the local cache or the hub answers, else gpt2-nano. Deciding takes
    under 3 s, also on a machine without a network; a download, once begun, takes what it takes.
    """
    if name is None:
        try:
            found = _find_on_hub("gpt2")
            load_tokenizer(found.folder)  # which the cache may lack, and an example without a tokenizer says nothing
            return found
        except ValueError as error:
            why = str(error)
        try:
            return find_model(NANO)._replace(why=why)
        except ValueError as error:
            raise ValueError(f"{why}, and {error}") from None
    if name in GPT2_NAMES:
        return _find_on_hub(name)
    folder = CHECKPOINTS / NANO if name == NANO else Path(name)
    if name == NANO and not folder.is_dir():
        raise ValueError(f"model {NANO} is missing from {CHECKPOINTS}: is this checkout whole?")
    if name == "" or not os.path.isdir(folder):
        raise ValueError(f"model {name!r} is neither one of {', '.join(GPT2_NAMES)}, {NANO} nor a folder")
    if not os.path.isfile(folder / "config.json"):
        raise ValueError(f"model {name!r} is a folder without config.json")
    if not any(os.path.isfile(folder / file) for file in _WEIGHTS):
        raise ValueError(f"model {name!r} is a folder without {' or '.join(_WEIGHTS)}")
    return Found(name, folder, "in the repository" if name == NANO else "a folder")


def find_in_cache(name: str) -> "Path | None":
    """The folder of one of GPT-2's names in the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache  # here, for it takes 0.3 s that a folder's user need not wait

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
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{name} is not in the local cache and HF_HUB_OFFLINE is set")
    repo = f"openai-community/{name}"
    try:
        # the hub's client would retry for half a minute; a portal that answers in its place sends no such JSON
        answer = _within(DEADLINE_S, lambda: _get(f"{constants.ENDPOINT}/{repo}/resolve/main/config.json"))
        json.loads(answer)
    except _FETCH_ERRORS as error:
        raise ValueError(f"{name} is not in the local cache and cannot be fetched ({_in_a_line(error)})") from None
    try:
        # not here: it waits for its threads, so that a Ctrl-C would have to wait for the last byte
        folder = _within(None, lambda: snapshot_download(repo, allow_patterns=_FILES))
    except Exception as error:  # the client, its transports and the disk each have kinds of their own
        raise ValueError(f"{name} could not be downloaded ({_in_a_line(error)})") from error
    return Found(name, Path(folder), "downloaded from the hub")


# -- files and hosts

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_FILES = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
_SURROGATE = re.compile("[\ud800-\udfff]")
_FETCH_ERRORS = (OSError, ValueError, http.client.HTTPException)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {_in_a_line(error)}") from None


def _read_json(path: Path) -> dict:
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {_in_a_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _get(url: str, size: int = -1) -> bytes:
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
        return answer.read(size)


def _within(seconds: "float | None", call):
    """What call() returns or raises, or a TimeoutError: looking up a host's name takes no time-out of its own."""
    results = queue.SimpleQueue()

    def work():
        try:
            results.put((call(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error:
        raise error
    return result


def _in_a_line(error: BaseException) -> str:
    """The innermost error's own words: urllib and requests put theirs around it, and requests 500 characters."""
    while isinstance(inner := getattr(error, "reason", None) or next(iter(error.args), None), BaseException):
        error = inner
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
