"""GPT-2 compiled by nvtripy: executables that are kept on disk, and the KV cache from call to call.

An executable is a program and holds the weights: it is loaded only if its SHA-256 matches the file next to it.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from threading import Lock

import numpy as np
import nvtripy as tp

from tripy_nanogpt.device import choose_device
from tripy_nanogpt.files import HERE, fingerprint, known_hashes, sha256, write_file
from tripy_nanogpt.model import GPT, init_cache
from tripy_nanogpt.quantization import NOT_QUANTIZED, check_mode
from tripy_nanogpt.quantized_weights import prepare
from tripy_nanogpt.weight_loader import fill, hashed_files, read_config, read_state

DTYPES = ("float32", "float16", "bfloat16")
EXECUTABLES = HERE / "executables"
CPU, GPU = tp.device("cpu"), tp.device("gpu")


def load(folder, dtype="float16", device="auto", quantization=NOT_QUANTIZED, executables=EXECUTABLES):
    """The engine of a checkpoint folder; a ValueError or OSError says what is wrong with the checkpoint or a setting.

    ModelOpt and the compiler run later, when a function is called whose executable is not on disk.
    """
    mode = check_mode(quantization.mode) if quantization.mode else None
    config = replace(read_config(folder), dtype=getattr(tp, dtype), quant_mode=mode)
    device = choose_device(device, quantization.fast, mode)
    if mode:
        key, weights, calibrated_on = prepare(folder, config, quantization.calibration_data, executables)
    else:
        key, calibrated_on = fingerprint([], *known_hashes(hashed_files(folder), executables)), ""
        weights = partial(read_state, folder, config)
    load_model = cache(lambda: fill(GPT(config), weights(), config.dtype))
    artifacts = Path(executables, fingerprint([], key, config, device))
    if not mode and not artifacts.exists():
        load_model()  # reads and checks the weights now; those in executables/ were checked when they were compiled
    return Engine(config, device, artifacts, load_model, calibrated_on)


class Engine:
    """prefill and decode, of one row, and forward. Each is compiled when it is first called, or loaded from folder."""

    def __init__(self, config, device, folder, load_model, calibrated_on=""):
        """load_model() -> GPT; it is called only if a function has to be compiled."""
        self.config, self.device, self.folder, self.calibrated_on = config, device, folder, calibrated_on
        self.compiled = []  # names of the functions that were not on disk
        self.position = 0  # of the next token; cache slots from there on are not read
        self.load_model, self._executables, self._cache = load_model, {}, None
        self._saves, self._saving = [], Lock()

    def describe(self):
        return self.device

    def prefill(self, rows):
        """Logits after the last token, [1, V]; the KV cache stays on the device."""
        logits, *self._cache = self.executable("prefill")(to_device(rows))
        self.position = len(rows[0])
        return to_host(logits)[:, 0]

    def decode(self, tokens):
        """Logits after one more token, [1, V]."""
        layers = [self._cache[i : i + 2] for i in range(0, len(self._cache), 2)]
        logits, *self._cache = self.executable("decode")(to_device([tokens]), to_device([self.position]), layers)
        self.position += 1
        return to_host(logits)[:, 0]

    def forward(self, rows):
        """Logits at each position, [1, T, V], without a cache."""
        return to_host(self.executable("forward")(to_device(rows)))

    def executable(self, name):
        if name not in self._executables:
            self._executables[name] = self._load(name) or self._compile(name)
        return self._executables[name]

    def _compile(self, name):
        S = self.config.block_size
        text = tp.InputInfo((1, (1, max(1, S // 2), S)), dtype=tp.int32)  # least, typical and largest length
        token, position = tp.InputInfo((1, 1), dtype=tp.int32), tp.InputInfo((1,), dtype=tp.int32)
        args = [token, position, init_cache(self.config)] if name == "decode" else [text]
        executable = tp.compile(getattr(self.load_model(), name), args=args)
        self.compiled.append(name)
        saver = ThreadPoolExecutor(1)  # a text does not wait for the disk
        self._saves.append(saver.submit(self._save, name, executable))
        saver.shutdown(wait=False)  # the thread ends, and torch's for it: if they outnumber the cores, all wait asleep
        return executable

    def _save(self, name, executable):
        path, digest = self.folder / f"{name}.executable", self.folder / f"{name}.sha256"
        try:
            with self._saving:  # one at a time: executables share a file of constants
                self.folder.mkdir(parents=True, exist_ok=True)
                digest.unlink(missing_ok=True)  # without it no executable is loaded, until both files are written
                write_file(path, lambda temporary: executable.save(str(temporary)))
                write_file(digest, lambda temporary: temporary.write_text(f"{sha256(path)}\n", encoding="utf-8"))
        except OSError as error:
            if name == self.compiled[0]:  # the others would fail likewise
                print(f"the next run compiles again: {error}", file=sys.stderr)

    def wait(self):
        """Until all that was compiled is on disk; the end of the process waits, too."""
        for save in self._saves:
            save.result()

    def _load(self, name):
        path, digest = self.folder / f"{name}.executable", self.folder / f"{name}.sha256"
        try:
            matches = digest.read_bytes().strip() == sha256(path).encode()
        except OSError:
            return None
        if not matches:
            print(f"{path} does not match {digest.name}: recompiled", file=sys.stderr)
            return None
        try:
            return tp.Executable.load(str(path))
        except tp.TripyException:
            print(f"{path} lacks its weights: recompiled", file=sys.stderr)
            return None


def to_device(values):
    return tp.copy(tp.Tensor(np.asarray(values, np.int32)), GPU)


def to_host(tensor):
    return np.from_dlpack(tp.copy(tensor, CPU))
