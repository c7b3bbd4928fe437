"""A model's compiled functions, from the cache or compiled now, and the text that they make.

An executable holds its weights, and is a program: it is loaded only where its SHA-256 stands in the file beside it.
"""

import sys
from pathlib import Path

import numpy as np
import nvtripy as tp
from safetensors import safe_open
from safetensors.torch import load_file

from shared.tokenizer import find_model
from tripy_nanogpt.files import HERE, fingerprint, sha256, write_beside
from tripy_nanogpt.model import GPT
from tripy_nanogpt.quantization import CNN
from tripy_nanogpt.weight_loader import fill, hashed_files, load_weights_from_hf, quantized_file, read_config

EXECUTABLES = HERE / "executables"
CPU, GPU = tp.device("cpu"), tp.device("gpu")


def to_device(values):
    return tp.copy(tp.Tensor(np.asarray(values, np.int32)), GPU)


def to_host(tensor):
    return np.from_dlpack(tp.copy(tensor, CPU))


def load_engine(model_type, dtype, device, quant_mode=None, dataset_name=CNN, folder=EXECUTABLES):
    """An Engine for a model in the cache, in the repository or in a folder; device is choose_device's.

    With a quant_mode, ModelOpt quantizes the weights, unless it did so before.
    """
    source, dtype = find_model(model_type).folder, getattr(tp, dtype)
    config = read_config(source, dtype, quant_mode)
    if quant_mode is None:
        files, calibrated_on = hashed_files(source), ""

        def load():
            return load_weights_from_hf(GPT(config), model_type, dtype)
    else:
        files = [quantized_file(source, quant_mode, dataset_name, folder)]
        with safe_open(files[0], "pt") as file:
            calibrated_on = file.metadata()["calibrated_on"]

        def load():
            return fill(GPT(config), load_file(files[0]), dtype)

    engine = Engine(config, load, fingerprint(files, config, device), folder)
    engine.calibrated_on = calibrated_on
    return engine


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
        return to_host(self.executable("forward")(to_device([ids])))[0]

    def prefill(self, ids):
        """Logits behind ids, (V,), and the cache, which stays on the device."""
        logits, *keys_and_values = self.executable("prefill")(to_device([ids]))
        return to_host(logits)[0, 0], keys_and_values

    def decode(self, token, position, keys_and_values):
        """The same for one more token at position. What keys_and_values held before is gone."""
        cache = [keys_and_values[i : i + 2] for i in range(0, len(keys_and_values), 2)]
        logits, *keys_and_values = self.executable("decode")(to_device([[token]]), to_device([position]), cache)
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

    def executable(self, name):
        """The compiled function of that name; what is wrong with the weights is said when the first is compiled."""
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
            if len(self.compiled) == 1:  # the others fare alike
                print(f"the next run compiles again: {error}", file=sys.stderr)
        return executable

    def _save(self, name, executable):
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.executable"
        digest = path.with_suffix(".sha256")
        digest.unlink(missing_ok=True)  # until both files are new, there is no executable
        made = []

        def write(part):
            executable.save(str(part))
            made.append(sha256(part))

        write_beside(path, write)
        write_beside(digest, lambda part: part.write_text(f"{made[0]}\n", encoding="utf-8"))

    def _load(self, name):
        path = self.folder / f"{name}.executable"
        try:
            expected = path.with_suffix(".sha256").read_text(encoding="utf-8").strip()
            digest = sha256(path)
        except OSError:
            return None
        if digest != expected:
            print(f"{path} is not what {path.stem}.sha256 says: it is compiled again", file=sys.stderr)
            return None
        return tp.Executable.load(str(path))
