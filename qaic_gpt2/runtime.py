"""The compiled program in onnxruntime: what the card's runtime does, on a CPU.

All arrays are bound once, by their addresses. A cache's input and output are the same memory: the ScatterND between
them then writes its rows in place, and nothing copies a cache, neither between two calls nor in one.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from qaic_gpt2.compiler import PROGRAM, SIDECAR, SPECIALIZATIONS
from qaic_gpt2.files import sha256

ENGINE = f"onnxruntime {onnxruntime.__version__}"
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def read(folder):
    """(program, the folder of its weights) of an artifact whose files are those that compile noted; a ValueError for
    others."""
    try:
        sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        program, noted, weights = (folder / PROGRAM).read_bytes(), dict(sidecar["sha256"]), folder / sidecar["weights"]
        hashes = {name: sha256(folder / name) for name in {*noted, SPECIALIZATIONS}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder} is no artifact that can be read ({error}): remove it, to compile anew") from None
    hashes[PROGRAM] = hashlib.sha256(program).hexdigest()  # of what will run, and not of what lies there later
    if wrong := sorted(name for name, value in hashes.items() if value != noted.get(name)):
        raise ValueError(f"{folder}: {wrong[0]} is not what was compiled (SHA-256): remove the folder, to compile anew")
    return program, weights


def casts_float16(graph):
    """Whether onnxruntime computes in float32 what is float16, as it does where it has no kernels for this CPU."""
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    return any(node.op_type == "Cast" and node.input[0] in half for node in graph.node)


class Session:
    """program(ids, positions) -> logits; the cache is kept from call to call."""

    def __init__(self, folder):
        folder = Path(folder)
        program, self.weights = read(folder)
        self.casts_float16 = casts_float16(onnx.load_from_string(program).graph)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        # threads wait asleep: on idle cores as fast as spinning, beside other work 21 ms a token where that takes 37
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # compile did it
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.weights))
        self.session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        shapes = json.loads((folder / SPECIALIZATIONS).read_text(encoding="utf-8"))["specializations"]
        sizes = {shape["name"]: {key: int(value) for key, value in shape["symbols"].items()} for shape in shapes}
        self.batch_size, self.ctx_len, self.prefill_seq_len = (
            sizes["Prefill"][key] for key in ("batch_size", "ctx_len", "seq_len")
        )
        inputs = {value.name: value for value in self.session.get_inputs()}
        self.caches = {
            name: np.zeros((self.batch_size, value.shape[1], self.ctx_len, value.shape[3]), NUMPY[value.type])
            for name, value in inputs.items()
            if name.startswith("past_")
        }
        vocab_size = self.session.get_outputs()[0].shape[2]
        self.logits = np.zeros((self.batch_size, 1, vocab_size), np.float32)
        self.programs = {length: self._bind(length) for length in {self.prefill_seq_len, 1}}

    def _bind(self, seq_len):
        """(binding, input_ids, position_ids) for calls of seq_len tokens."""
        binding = self.session.io_binding()
        given = {name: np.zeros((self.batch_size, seq_len), np.int64) for name in ("input_ids", "position_ids")}
        made = {"logits": self.logits} | {f"{name}_RetainedState": cache for name, cache in self.caches.items()}
        for bind, arrays in (binding.bind_input, given | self.caches), (binding.bind_output, made):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding, *given.values()

    def __call__(self, ids, positions):
        """(batch, seq_len) each -> (batch, vocab), a view that the next call overwrites."""
        binding, input_ids, position_ids = self.programs[ids.shape[1]]
        input_ids[:], position_ids[:] = ids, positions
        self.session.run_with_iobinding(binding)
        return self.logits[:, 0]

    def prefill(self, prompts):
        return prefill(self, prompts, self.prefill_seq_len)


def prefill(program, prompts, chunk):
    """Lists of ids, one a row, through a program of chunk tokens at once -> the logits behind each (batch, vocab).

    The last chunk ends where the longest prompt does, and computes again what it shares with the one before: padding
    behind a prompt that fills the cache would overwrite its last slot.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = max(lengths.max(), chunk)
    positions = np.tile(np.arange(padded), (len(prompts), 1))
    positions[positions >= lengths[:, None]] = -1  # right-padded
    ids = np.zeros_like(positions)
    ids[positions >= 0] = np.concatenate(prompts)
    behind = [None] * len(prompts)
    for start in range(0, padded, chunk):
        start = min(start, padded - chunk)
        logits = program(ids[:, start : start + chunk], positions[:, start : start + chunk])
        for row in np.flatnonzero((start < lengths) & (lengths <= start + chunk)):  # short rows end early
            behind[row] = logits[row].copy()
    return np.stack(behind)
