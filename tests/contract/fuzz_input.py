"""Bad input, drawn: words for a project's scripts, and what is done to their files first. fuzz_run.py tries it.

Flags are read from a script's own parser or configurator, so that a new one is tried without a line here.
"""

import argparse
import json
import os
import pickle
import shlex
import sys
from contextlib import redirect_stderr
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import hypothesis
import hypothesis.strategies as st
import numpy as np
from safetensors.numpy import load_file, save_file

MEGABYTE = 10**6


class Case(NamedTuple):
    kind: str
    script: str  # its path in the project
    words: tuple[str, ...]
    spoil: tuple = ()  # the name of a function below, and its arguments: done to the files first

    def __str__(self):
        words = " ".join(shlex.quote(word if len(word) < 200 else f"{word[:20]}...{len(word)}") for word in self.words)
        return f"{self.kind}: {self.script} {ascii(words)[1:-1]}" + f" after {self.spoil}" * bool(self.spoil)


class Flag(NamedTuple):
    spellings: list[str]
    dest: str
    type: type
    choices: list[str]
    takes: bool  # a value


class Asked(BaseException):
    """Carries a parser out of its script."""


def flags_of(script):
    def stop(parser, *_, **__):
        raise Asked(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", stop), redirect_stderr(sys.stdout):
        try:
            script.main([])
        except Asked as asked:
            actions = [action for action in asked.args[0]._actions if action.dest != "help"]
            return [
                Flag(a.option_strings, a.dest, a.type or str, [*map(str, a.choices or ())], a.nargs != 0)
                for a in actions
            ]
        except SystemExit:
            pass
    settings = fields(script.Config) if hasattr(script, "Config") else ()
    return [Flag([f"--{field.name}"], field.name, field.type, [], field.type is not bool) for field in settings]


# -- words


# a good run of a script, by what its flags are called: so that one bad word at a time is looked at
GOOD = {"model": "model", "model_type": "model", "init_from": "model", "max_new_tokens": 2, "new_tokens": 2}
GOOD |= {"prompt": "To be", "input_text": "To be", "start": "To be", "temperature": 0, "ignore_eos": None}
GOOD |= {"num_samples": 1, "dump": "dump.npz", "input": "text.txt", "calibration_data": "text.txt", "documents": 10}
TRAINING = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "batch_size": 2, "gradient_accumulation_steps": 1}
TRAINING |= {"max_iters": 2, "iters_per_call": 2, "eval_interval": 2, "eval_iters": 1, "dtype": "float32"}
TRAINING |= {"init_from": "scratch", "dataset": "dataset", "out_dir": "made"}
GOOD_OF = {"train.py": TRAINING, "weight_loader.py": {"out_dir": "out", "to": "made"}}
TEXTS = {"prompt", "input_text", "start"}
PLACES = {"model", "model_type", "init_from", "dump", "to", "out_dir", "input", "dataset", "calibration_data"}


def written(flag, value):
    return flag.spellings[0] if value is None else f"{flag.spellings[0]}={value}"


def good_words(name, flags, without=()):
    good = GOOD_OF.get(name, GOOD)
    return tuple(written(flag, good[flag.dest]) for flag in flags if flag.dest in good and flag.dest not in without)


# no slash: what a script writes stays in the case's folder; no NUL: a process's words cannot hold it
letters = st.characters(exclude_characters="/\0", categories=None)
text = st.text(letters, max_size=12)
junk = text | st.sampled_from(["", " ", "-", "--", "nan", "None", "[]", "{}", "'", '"', "(" * 5000, "@x", "..."])
integers = st.integers(-3, 5).map(str) | st.integers(-(2**70), 2**70).map(str)
integers |= st.sampled_from(
    ["1e3", "1.5", "0x10", "1_0", "\u0663", "+1", "9" * 5000, "65536", "2147483647", str(2**63)]
)
floats = st.floats(0, 2).map(str) | st.floats().map(str)
floats |= st.sampled_from(["inf", "-nan", "1e999", "1e-320", "1_0", "0x1p3"])
prompts = st.text(letters) | st.sampled_from("a \n^\u00e9\U0001f916\udc80").map(lambda letter: letter * MEGABYTE)
prompts |= st.sampled_from(
    ["", "\n", "\x1b[2J\x07", "<|endoftext|>", "<|endoftext|>" * 500, "\udcff", "\ud800x", "\r\n\t"]
)
places = st.sampled_from([
    "model", "model/", "model/config.json", "model/model.safetensors", "dataset", "out", "empty", "pickle", "device",
    "text.txt", "text.txt/below", "nothing", "nothing/at/all", ".", "x" * 300, "/proc/self/mem", "gpt2", "gpt2-nano",
    "", "FILE:text.txt", "FILE:model", "FILE:nothing", "FILE:pickle", "resume", "scratch", "good.py", "bad.py",
])  # fmt: skip


def values(flag):
    """Good and bad ones."""
    if flag.dest in PLACES or flag.type is Path:
        return places | places | text
    if flag.choices:
        return st.sampled_from(flag.choices) | junk
    numbers = {int: integers, float: floats}.get(flag.type)
    return prompts | junk | places if numbers is None else numbers | numbers | junk


@st.composite
def words_for(draw, name, flags):
    """Up to three flags otherwise than in a good run: another value, none, twice, cut short; or a stray word."""
    if not flags:
        return tuple(draw(st.lists(integers | junk | places, max_size=3)))
    chosen = draw(st.lists(st.sampled_from(flags), min_size=1, max_size=3))
    words = [*good_words(name, flags, {flag.dest for flag in chosen if draw(st.integers(0, 4))})]
    for flag in chosen:
        spelling = draw(st.sampled_from(flag.spellings))
        value = f"={draw(values(flag))}" if flag.takes else ""
        match draw(st.integers(0, 19)):
            case 0:
                words.append(spelling)  # its value is missing
            case 1:
                words += [spelling[: draw(st.integers(2, len(spelling)))] + value] * 2
            case 2:
                words.insert(0, draw(st.just("--no-such-flag") | junk | places | text.map("--{}=".format)))
            case 3:
                words.append(f"{spelling}={draw(junk)}")
            case 4 | 5 | 6:
                words += [spelling, *([value[1:]] if value else [])]
            case _:
                words.append(spelling + value)
    return tuple(words)


# -- what is done to files: each function is given the case's folder and what was drawn for it


class Payload:
    """What unpickling makes a folder of."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def flipped(data, where):
    at = len(data) * where // 101
    return data[:at] + bytes(byte ^ 1 << where % 8 for byte in data[at : at + 1]) + data[at + 1 :]


DAMAGE = {  # what becomes of a file's bytes; where is a percentage
    "cut": lambda data, where: data[: len(data) * where // 100],
    "flipped": flipped,
    "doubled": lambda data, _: data + data,
    "zeros": lambda data, _: bytes(len(data)),
    "pickle": lambda data, _: pickle.dumps(Payload()),
    "deep": lambda data, _: b"[" * MEGABYTE,
    "deep object": lambda data, _: b'{"a":' * MEGABYTE,
    "long number": lambda data, _: b"[" + b"9" * MEGABYTE + b"]",
    "header of 16 exabytes": lambda data, _: b"\xff" * 7 + b"\x7f{}",
    "latin-1": lambda data, _: b"\xe9" + data,
    "utf-16": lambda data, _: data.decode("utf-8", "replace").encode("utf-16"),
    "byte order mark": lambda data, _: b"\xef\xbb\xbf" + data,
    "CRLF": lambda data, _: data.replace(b"\n", b"\r\n"),
}


def damage(case, name, how, where=0):
    path = case / name
    data = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(DAMAGE[how](data, where))


def change_json(case, name, key, value):
    """One key's value, which need be no JSON."""
    path = case / name
    content = json.loads(path.read_text(encoding="utf-8")) | {key: "@"}
    path.write_text(json.dumps(content).replace('"@"', value), encoding="utf-8")


def change_tensor(case, which, how):
    path = case / "model" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[which % len(tensors)]
    tensor = tensors.pop(name)
    shapes = {"shorter": tensor[:-1], "empty": tensor[:0], "flat": tensor.reshape(-1), "turned": tensor.T}
    shapes |= {"scalar": tensor.reshape(-1)[0], "extra": tensor, "missing": tensor, "renamed": tensor}
    if how in ("nan", "inf", "1e30"):
        tensor = np.full_like(tensor, float(how))
    else:
        tensor = shapes[how] if how in shapes else tensor.astype(how)
    if how != "missing":
        tensors[name + "2" * (how == "renamed")] = np.ascontiguousarray(tensor)
    if how == "extra":
        tensors[f"../{name}"] = tensor
    save_file(tensors, path, {"format": "pt"})


def change_header(case, find, put):
    """Of the safetensors file, whose length in front is put right."""
    path = case / "model" / "model.safetensors"
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = data[8:size].replace(find.encode(), put.encode())
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[size:])


def add_index(case, shard):
    """An index that names its shards by their paths. The weights lie outside of the folder."""
    os.replace(case / "model" / "model.safetensors", case / "elsewhere.safetensors")
    content = {"metadata": {}, "weight_map": dict.fromkeys(("wte.weight", "transformer.wte.weight"), shard)}
    (case / "model" / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def add_characters(case, content):
    """A second tokenizer, which comes first and disagrees with the vocabulary."""
    (case / "model" / "meta.json").write_text(content, encoding="utf-8")


SPOIL = {f.__name__: f for f in (damage, change_json, change_tensor, change_header, add_index, add_characters)}
MODEL = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
KEYS = [
    "n_layer", "n_head", "n_embd", "n_positions", "n_ctx", "vocab_size", "n_inner", "activation_function", "auto_map",
    "model_type", "layer_norm_epsilon", "eos_token_id",
]  # fmt: skip
ODD = [
    "-1", "0", "1", "1.5", "true", "null", '""', r'"\ud800"', r'"\n"', "[]", "{}", "NaN", "1e999", "7", "1048576",
    "16777215", "9" * 400,
]  # fmt: skip
TENSORS = [
    "missing", "renamed", "extra", "nan", "inf", "1e30", "int64", "bool", "float64", "uint8", "complex64", "float16",
    "shorter", "empty", "flat", "turned", "scalar",
]  # fmt: skip
FIND = ['"data_offsets":[0,', '"F32"', '"shape":[', '"format"', "}}"]
PUT = ['"data_offsets":[1,', '"F8_E4M3"', '"I1"', '"shape":[-1,', '"shape":[99999999999,', "", "{", r'"\u0000"']
SHARDS = ["../elsewhere.safetensors", "/etc/passwd", "model.safetensors", "", "../elsewhere.safetensors\0"]
CHARACTERS = [
    "[]",
    "{}",
    '{"chars": 5}',
    '{"chars": ""}',
    '{"chars": "Tobe "}',
    '{"chars": "aa"}',
    r'{"chars": "\ud800"}',
]


def spoil(kind, *drawn):
    return st.tuples(st.just(kind), *(st.just(one) if isinstance(one, str) else one for one in drawn))


percent = st.integers(0, 100)
some = st.sampled_from
spoils = spoil("damage", some(MODEL).map("model/{}".format), some([*DAMAGE, "folder", "missing"]), percent)
spoils |= spoil("change_json", "model/config.json", some(KEYS), some(ODD))
spoils |= spoil("change_json", "model/vocab.json", some(["<|endoftext|>", "a", "zz", "\u0120the"]), some(ODD))
spoils |= spoil("change_tensor", st.integers(0, 40), some(TENSORS)) | spoil("change_header", some(FIND), some(PUT))
spoils |= spoil("add_index", some(SHARDS)) | spoil("add_characters", some(CHARACTERS))


# -- the cases of a project. flags: of each script by its path; made: files that a good run of the example left


def drawn(strategy, count, seed):
    """count cases, the same for the same seed."""
    cases = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=2 * count + 1,  # some come twice
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    @hypothesis.given(strategy)
    def collect(case):
        cases.append(case)

    collect()
    return [*dict.fromkeys(cases)][:count]


@st.composite
def any_case(draw, flags, example, made):
    kind = draw(some(["flags", "flags", "prompts", "files", "files", *["artifacts"] * bool(made)]))
    if kind == "flags":
        name = draw(some([*flags, *[name for name in flags if "/" not in name], *[example] * 6]))
        return Case(kind, name, draw(words_for(name, flags[name])))
    if kind == "prompts":
        flag = next(flag for flag in flags[example] if flag.dest in TEXTS)
        return Case(kind, example, (*good_words(example, flags[example], TEXTS), written(flag, draw(prompts))))
    if kind == "artifacts":
        spoilt = spoil("damage", st.integers(0, 999), some([*DAMAGE, "missing"]), percent)
        return Case(kind, example, reading(example, flags, made), draw(spoilt))
    readers = [name for name in flags if {flag.dest for flag in flags[name]} & {"model", "model_type", "init_from"}]
    name = draw(some([example] * 4 + readers))
    return Case(kind, name, good_words(name, flags[name]), draw(spoils))


def named(case, made):
    """An artifact is drawn by number, for some have other names each time, and the cases of a seed are the same."""
    if case.kind != "artifacts":
        return case
    what, number, *rest = case.spoil
    return case._replace(spoil=(what, made[number % len(made)], *rest))


def reading(example, flags, made):
    """The words of a run that reads what was made: jax_nanogpt's checkpoint stands in out."""
    if any(name.startswith("out/") for name in made):
        return (*good_words(example, flags[example], {"init_from"}), "--out_dir=out")
    return good_words(example, flags[example])


def found(example, flags, made):
    """What earlier runs found in one project or another, asked of all."""
    words = good_words(example, flags[example])
    prompt = next(flag for flag in flags[example] if flag.dest in TEXTS)
    without = good_words(example, flags[example], TEXTS)
    yield Case("found", example, (*without, written(prompt, "--")))  # of which argparse makes an empty list
    yield Case("found", example, (*words, f"--model={MEGABYTE * 'x'}", "--device=\n\n"))
    yield Case("found", example, (*words, "--dump=device"))  # which a file took the place of
    for flag in flags[example]:
        if flag.type is int:
            yield Case("found", example, (*words, written(flag, 2**63)))
    for key in "n_layer", "n_positions", "vocab_size":
        yield Case("found", example, words, ("change_json", "model/config.json", key, "1048576"))
    for name in made:
        how = "deep" if name.endswith(".json") else "cut"
        yield Case("found", example, reading(example, flags, made), ("damage", name, how))


def cuts(example, flags, every):
    """Each file of a checkpoint, cut at every so many percent."""
    words, parts = good_words(example, flags[example]), range(0, 101, every)
    return [Case("cuts", example, words, ("damage", f"model/{name}", "cut", part)) for name in MODEL for part in parts]
