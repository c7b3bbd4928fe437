"""Bad input, as hypothesis' strategies: words for a project's scripts, and damage to the files that they read."""

import json
import os
import pickle
import shutil
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.contract.odd import Payload, write_checkpoint
from tests.contract.parity import NANO

TOKENIZER = ("vocab.json", "merges.txt")
SIZES = {"n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 1408}
KEYS = [
    *SIZES,
    "n_ctx",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "model_type",
    "auto_map",
    "eos_token_id",
]


def write_files(folder: Path) -> None:
    """What a script finds: a model of 0.07M parameters, a dataset, and things that are neither."""
    for name in "tmp", "executables", "dataset", "model":
        (folder / name).mkdir(parents=True)
    write_checkpoint(folder / "model", SIZES)
    for name in TOKENIZER:
        for place in "model", "dataset":
            shutil.copy(NANO / name, folder / place)
    end_early(folder / "model" / "model.safetensors")
    for split in "train", "val":
        np.arange(200, dtype=np.uint16).tofile(folder / "dataset" / f"{split}.bin")
    (folder / "text.txt").write_text(40 * "To be, or not to be, that is the question. ", encoding="utf-8")
    (folder / "good.py").write_text("max_iters = 1\n", encoding="utf-8")
    (folder / "bad.py").write_text("import os\nos.mkdir('executed')\n", encoding="utf-8")
    (folder / "pickle").write_bytes(pickle.dumps(Payload()))
    (folder / "device").symlink_to(os.devnull)


def end_early(path: Path) -> None:
    """From position 8 on the model writes <|endoftext|>, so that a run for 2**63 tokens ends."""
    tensors = load_file(path)
    tensors["transformer.wpe.weight"][8:] = 100 * tensors["transformer.wte.weight"][SIZES["vocab_size"] - 1]
    save_file(tensors, path, {"format": "pt"})


# -- words

# no slash: what a script writes stays in its folder
letters = st.characters(exclude_characters="/\0")
text = st.text(letters, max_size=12)
junk = text | st.sampled_from(["", " ", "-", "nan", "None", "[]", "{}", "'", '"', "(" * 5000, "@x", "\ud800", "é\n"])
# in between, a size would be good and ask for gigabytes
integers = st.integers(-3, 5) | st.integers(max_value=-(2**31)) | st.integers(min_value=2**31)
numbers = integers.map(str) | st.floats(0, 2).map(str) | st.floats().map(str)
numbers |= st.sampled_from(["-nan", "1e999", "1e-320", "1.5", "0x10", "1_0", "\u0663", "+1", "9" * 5000, str(2**63)])
prompts = st.text(letters) | st.sampled_from("a \n^é🤖\udc80").map(lambda letter: 10**6 * letter)
prompts |= st.sampled_from(["", "\x1b[2J\x07", "<|endoftext|>", 500 * "<|endoftext|>", "\udcff", "\ud800x", "\r\n\t"])
places = st.sampled_from([
    "model", "model/config.json", "model/model.safetensors", "dataset", "out", "pickle", "device", "text.txt", ".", "",
    "text.txt/below", "nothing", "nothing/at/all", "x" * 300, "/proc/self/mem", "gpt2", "resume", "scratch", "good.py",
    "bad.py", "FILE:text.txt", "FILE:model", "FILE:nothing", "FILE:pickle",
])  # fmt: skip
values = numbers | junk | places


@st.composite
def bad_words(draw, flags: dict[str, str]):
    """One to three flags, each with any value, or without one; or words that are no flag of this script."""
    names = draw(st.lists(st.sampled_from(sorted(flags)), min_size=1, max_size=3, unique=True))
    words = []
    for name in names:
        strategy, kind = values, flags[name]
        if "{" in kind:
            strategy |= st.sampled_from(kind.strip("{}").split(","))
        if name in ("--prompt", "--start", "--input-text"):
            strategy |= prompts | prompts
        if "max" in name and len(names) > 1:  # the others may let it go on past <|endoftext|>
            strategy = st.integers(-3, 5).map(str) | junk
        if kind:
            words.append(
                draw(st.just(name) | strategy.map(f"{name}={{}}".format) | strategy.map(f"{name}={{}}".format))
            )
        else:
            words.append(name)
    return words + draw(st.just([]) | st.just([]) | st.lists(junk | st.just("--no-such-flag"), max_size=1))


# -- files

percent = st.integers(0, 100)
json_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=3)
json_values |= st.lists(st.none() | st.integers(), max_size=2)
json_values |= st.sampled_from([{}, 1.5, 7, 2**20, 2**24 - 1, 10**400, "\n"])
DAMAGE = {  # of a file's bytes; where is a percentage
    "cut": lambda data, where: data[: len(data) * where // 100],
    "last byte cut": lambda data, _: data[:-1],
    "doubled": lambda data, _: data + data,
    "zeros": lambda data, _: bytes(len(data)),
    "pickle": lambda data, _: pickle.dumps(Payload()),
    "deep": lambda data, _: b"[" * 10**6,
    "deep object": lambda data, _: b'{"a":' * 10**6,
    "long number": lambda data, _: b"[" + b"9" * 10**6 + b"]",
    "header of 16 exabytes": lambda data, _: b"\xff" * 7 + b"\x7f{}",
    "latin-1": lambda data, _: b"\xe9" + data,
    "utf-16": lambda data, _: data.decode("utf-8", "replace").encode("utf-16"),
    "byte order mark": lambda data, _: b"\xef\xbb\xbf" + data,
    "CRLF": lambda data, _: data.replace(b"\n", b"\r\n"),
}
names = st.sampled_from(["config.json", "model.safetensors", *TOKENIZER]).map("model/{}".format)
in_bytes = st.tuples(st.sampled_from([*DAMAGE, "flipped", "missing", "folder"]), names, percent)
in_json = st.tuples(st.just("json"), st.just("model/config.json"), st.sampled_from(KEYS), json_values)
in_json |= st.tuples(st.just("json"), st.just("model/vocab.json"), st.sampled_from(["a", "<|endoftext|>"]), json_values)
chars = st.sampled_from(["", "aa", "\ud800", 5, None, [], {}])
in_json |= st.tuples(st.just("json"), st.just("model/meta.json"), st.just("chars"), chars)
fields = st.sampled_from(["dtype", "shape", "data_offsets", "extra"])
dtypes = st.sampled_from(["F8_E4M3", "I64", "BOOL", "F16", "\0"])
in_header = st.tuples(st.just("header"), st.just("model/model.safetensors"), percent, fields, json_values | dtypes)
cuts = st.tuples(st.just("cut") | st.just("last byte cut"), names, percent)


def damages(made: list[str]):
    """To the model, and to what a run made of it."""
    in_made = st.tuples(st.sampled_from([*DAMAGE, "flipped", "missing"]), st.sampled_from(made), percent)
    return in_bytes | in_json | in_header | in_made


def damage(folder: Path, how: str, name: str, *drawn) -> None:
    path = folder / name
    data = path.read_bytes() if path.exists() else b"{}"
    path.unlink(missing_ok=True)
    match how:
        case "folder":
            path.mkdir()
        case "json":
            key, value = drawn
            path.write_text(json.dumps(json.loads(data) | {key: value}), encoding="utf-8")
        case "header":
            path.write_bytes(change_header(data, *drawn))
        case "flipped":
            path.write_bytes(flip(data, *drawn))
        case _ if how in DAMAGE:
            path.write_bytes(DAMAGE[how](data, *drawn))


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def change_header(data: bytes, where: int, field: str, value) -> bytes:
    """One field of one tensor in a safetensors file."""
    header = json.loads(data[8 : header_end(data)])
    tensor = sorted(header)[(len(header) - 1) * where // 100]
    header[tensor] |= {field: value}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[header_end(data) :]


def flip(data: bytes, where: int) -> bytes:
    """One bit; of safetensors in the header, for another weight may be as good as any."""
    size = min(len(data), header_end(data)) if data[8:9] == b"{" else len(data)
    at = size * where // 100
    return data[:at] + bytes(byte ^ 1 << where % 8 for byte in data[at : at + 1]) + data[at + 1 :]
