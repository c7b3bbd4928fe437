"""A model's compiled functions, from the cache or compiled now, and the text that they make.

An executable holds its weights, and is a program: it is loaded only where its SHA-256 stands in the file beside it.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import nvtripy as tp

from shared.tokenizer import find_model
from tripy_nanogpt.model import GPT
from tripy_nanogpt.weight_loader import load_weights_from_hf, read_config, weight_files

HERE = Path(__file__).resolve().parent
EXECUTABLES = HERE / "executables"
CPU, GPU = tp.device("cpu"), tp.device("gpu")


def to_device(values):
    return tp.copy(tp.Tensor(np.asarray(values, np.int32)), GPU)


def to_host(tensor):
    return np.from_dlpack(tp.copy(tensor, CPU))


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(weights, *rest):
    """What executables depend on: the files of weights, the code here, and the rest, which is what else matters."""
    code = sorted([HERE / "model.py", HERE / "weight_loader.py", *HERE.glob("tripy_cpu/*.py")])
    parts = [*map(sha256, [*weights, *code]), *map(str, rest)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def load_engine(model_type, dtype, device, folder=EXECUTABLES):
    """An Engine for a model in the cache, in the repository or in a folder; device is choose_device's."""
    source, dtype = find_model(model_type).folder, getattr(tp, dtype)
    config = read_config(source, dtype)
    key = fingerprint(weight_files(source), config, device)
    return Engine(config, lambda: load_weights_from_hf(GPT(config), model_type, dtype), key, folder)


class Engine:
    def __init__(self, config, load_model, key, folder=EXECUTABLES):
        """load_model() gives the GPT, which is needed only where there is something to compile."""
        self.config, self.folder = config, Path(folder, key)
        self._load_model, self._model = load_model, None
        self._executables = {}
        self.compiled = []  # the names of those that were not in the cache

    # -- the three functions

    def forward(self, ids):
        """Logits at each position, (T, V)."""
        return to_host(self._get("forward")(to_device([ids])))[0]

    def prefill(self, ids):
        """Logits behind ids, (V,), and the cache, which stays on the device."""
        logits, *keys_and_values = self._get("prefill")(to_device([ids]))
        return to_host(logits)[0, 0], keys_and_values

    def decode(self, token, position, keys_and_values):
        """The same for one more token at position. What keys_and_values held before is gone."""
        cache = [keys_and_values[i : i + 2] for i in range(0, len(keys_and_values), 2)]
        logits, *keys_and_values = self._get("decode")(to_device([[token]]), to_device([position]), cache)
        return to_host(logits)[0, 0], keys_and_values

    # -- text

    def generate(self, prompt, count, sampler, cached=True):
        """(token, logits) for each of count new tokens, or of as many as the context has room for."""
        ids = list(prompt)
        for _ in range(count):
            if not cached:
                logits = self.forward(ids)[-1]
            elif len(ids) == len(prompt):
                logits, cache = self.prefill(ids)
            else:
                logits, cache = self.decode(ids[-1], len(ids) - 1, cache)
            ids.append(sampler(logits))
            yield ids[-1], logits
            if len(ids) > self.config.block_size:
                return

    # -- executables

    def _get(self, name):
        if name not in self._executables:
            self._executables[name] = self._load(name) or self._compile(name)
        return self._executables[name]

    def _compile(self, name):
        if self._model is None:
            self._model = self._load_model()
        S, H, D = self.config.block_size, self.config.n_head, self.config.n_embd // self.config.n_head
        text = tp.InputInfo((1, (1, max(1, S // 2), S)), dtype=tp.int32)
        part = tp.InputInfo((1, H, S, D), dtype=self.config.dtype)
        arguments = {
            "forward": [text],
            "prefill": [text],
            "decode": [
                tp.InputInfo((1, 1), dtype=tp.int32),
                tp.InputInfo((1,), dtype=tp.int32),
                [[part, part]] * self.config.n_layer,
            ],
        }
        executable = tp.compile(getattr(self._model, name), args=arguments[name])
        self.compiled.append(name)
        try:
            self._save(name, executable)
        except OSError as error:
            print(f"{self.folder} cannot be written, so the next run compiles again: {error}", file=sys.stderr)
        return executable

    def _save(self, name, executable):
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.json"
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            executable.save(str(part))
            digest = sha256(part)
            path.with_suffix(".sha256").unlink(missing_ok=True)  # until both files are new, there is no executable
            os.replace(part, path)
            part.write_text(digest + "\n")
            os.replace(part, path.with_suffix(".sha256"))
        finally:
            part.unlink(missing_ok=True)

    def _load(self, name):
        path = self.folder / f"{name}.json"
        try:
            expected = path.with_suffix(".sha256").read_text().strip()
            digest = sha256(path)
        except OSError:
            return None
        if digest != expected:
            print(f"{path} is not what {path.stem}.sha256 says: it is compiled again", file=sys.stderr)
            return None
        return tp.Executable.load(str(path))
