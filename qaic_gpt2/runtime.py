"""The compiled program in onnxruntime: on a CPU, what the card's runtime does on a card.

All arrays are bound once, by their addresses. A cache's input and output are the same memory: the ScatterND between
them writes its rows in place, so that no cache is ever copied, neither between two calls nor in one.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from qaic_gpt2.compiler import PROGRAM, SIDECAR, SPECIALIZATIONS
from qaic_gpt2.exporter import retained
from qaic_gpt2.files import ArtifactError, sha256

ENGINE = f"onnxruntime {onnxruntime.__version__}"
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def read(folder):
    """(program, the folder of its weights) of an artifact; an ArtifactError if a file is not what compile wrote."""
    try:
        sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        program, expected = (folder / PROGRAM).read_bytes(), dict(sidecar["sha256"])
        weights = folder / sidecar["weights"]
        hashes = {name: sha256(folder / name) for name in {*expected, SPECIALIZATIONS}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{folder / SIDECAR}: {error}: remove the folder to recompile") from None
    hashes[PROGRAM] = hashlib.sha256(program).hexdigest()  # of the bytes that will run; the file may change
    if wrong := sorted(name for name, value in hashes.items() if value != expected.get(name)):
        raise ArtifactError(f"{folder / wrong[0]}: SHA-256 does not match {SIDECAR}: remove the folder to recompile")
    return program, weights


def casts_float16(graph):
    """Whether onnxruntime computes float16 in float32, as it does if it has no float16 kernels for this CPU."""
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    return any(node.op_type == "Cast" and node.input[0] in half for node in graph.node)


class Session:
    """A compiled program and its KV cache: prefill(rows), then decode(tokens) for one token a row at a time."""

    def __init__(self, folder):
        folder = Path(folder)
        program, self.weights = read(folder)
        self.casts_float16 = casts_float16(onnx.load_from_string(program).graph)
        self.session = start(program, self.weights)
        shapes = json.loads((folder / SPECIALIZATIONS).read_text(encoding="utf-8"))["specializations"]
        sizes = {name: int(value) for name, value in shapes[0]["symbols"].items()}  # of Prefill
        self.batch_size, self.ctx_len, self.prefill_seq_len = sizes["batch_size"], sizes["ctx_len"], sizes["seq_len"]
        self.vocab_size = self.session.get_outputs()[0].shape[2]
        self.logits = np.zeros((self.batch_size, 1, self.vocab_size), np.float32)
        self.cache = {
            value.name: np.zeros((self.batch_size, value.shape[1], self.ctx_len, value.shape[3]), NUMPY[value.type])
            for value in self.session.get_inputs()
            if value.name.startswith("past_")
        }
        self.programs = {length: self._bind(length) for length in {self.prefill_seq_len, 1}}
        self.positions = np.zeros(self.batch_size, np.int64)  # of each row's next token

    def _bind(self, seq_len):
        """(binding, input_ids, position_ids) for calls of seq_len tokens."""
        binding = self.session.io_binding()
        inputs = {name: np.zeros((self.batch_size, seq_len), np.int64) for name in ("input_ids", "position_ids")}
        outputs = {"logits": self.logits} | {retained(name): array for name, array in self.cache.items()}
        for bind, arrays in (binding.bind_input, inputs | self.cache), (binding.bind_output, outputs):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding, *inputs.values()

    def describe(self):
        return ENGINE + (", float16 in float32 (it has no float16 kernels for this CPU)" if self.casts_float16 else "")

    def run(self, ids, positions):
        """(B, T) each -> logits (B, V), a view that the next call overwrites."""
        binding, input_ids, position_ids = self.programs[ids.shape[1]]
        input_ids[:], position_ids[:] = ids, positions
        self.session.run_with_iobinding(binding)
        return self.logits[:, 0]

    def prefill(self, rows):
        """Lists of ids, one for each row -> the logits after each (B, V)."""
        self.positions[:] = [len(row) for row in rows]
        return prefill(self.run, rows, self.prefill_seq_len)

    def decode(self, tokens):
        """The next token of each row (B) -> logits (B, V), a view that the next call overwrites."""
        logits = self.run(tokens[:, None], self.positions[:, None])
        self.positions += 1
        return logits


def start(program, weights):
    """The onnxruntime session of a program, which compile has optimized already."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    # threads sleep while they wait: on idle cores as fast as spinning, next to other work 21 ms a token instead of 37
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    return onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])


def prefill(run, rows, chunk):
    """Lists of ids through run(ids, positions), chunk tokens at a time -> the logits after each row (B, V).

    The last chunk ends where the longest row ends, and recomputes what it shares with the chunk before it: padding
    after a row that fills the cache would overwrite the last slot.
    """
    lengths = np.array([len(row) for row in rows])
    padded = max(lengths.max(), chunk)
    positions = np.tile(np.arange(padded), (len(rows), 1))
    positions[positions >= lengths[:, None]] = -1  # right-padded
    ids = np.zeros_like(positions)
    ids[positions >= 0] = np.concatenate(rows)
    last = [None] * len(rows)
    for start in range(0, padded, chunk):
        start = min(start, padded - chunk)
        logits = run(ids[:, start : start + chunk], positions[:, start : start + chunk])
        for row in np.flatnonzero((start < lengths) & (lengths <= start + chunk)):  # short rows end early
            last[row] = logits[row].copy()
    return np.stack(last)
