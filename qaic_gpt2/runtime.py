"""The compiled program in onnxruntime: on a CPU, what the card's runtime does on a card.

All arrays are bound by their addresses. A cache's input and output are the same memory, written in place, so that no
cache is ever copied, neither between two calls nor in one. Prompts are read one row at a time, each into its own part
of the cache and without padding; a decode step takes a token of every row.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime

from qaic_gpt2.files import PROGRAM, SIDECAR, SPECIALIZATIONS, ArtifactError, retained, sha256

ENGINE = f"onnxruntime {onnxruntime.__version__}"
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def read(folder):
    """(program, its record) of an artifact; an ArtifactError if a file is not what compile wrote."""
    try:
        record = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        program, expected = (folder / PROGRAM).read_bytes(), dict(record["sha256"])
        record["weights"] = folder / record["weights"]
        hashes = {name: sha256(folder / name) for name in {*expected, SPECIALIZATIONS}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{folder / SIDECAR}: {error}: remove the folder to recompile") from None
    hashes[PROGRAM] = hashlib.sha256(program).hexdigest()  # of the bytes that will run; the file may change
    if wrong := sorted(name for name, value in hashes.items() if value != expected.get(name)):
        raise ArtifactError(f"{folder / wrong[0]}: SHA-256 does not match {SIDECAR}: remove the folder to recompile")
    return program, record


class Session:
    """A compiled program and its KV cache: prefill(rows), then decode(tokens) for one token a row at a time."""

    def __init__(self, folder):
        folder = Path(folder)
        program, self.record = read(folder)
        self.session = start(program, self.record["weights"])
        shapes = json.loads((folder / SPECIALIZATIONS).read_text(encoding="utf-8"))["specializations"]
        sizes = {name: int(value) for name, value in shapes[0]["symbols"].items()}  # of Prefill
        self.batch_size, self.ctx_len, self.prefill_seq_len = sizes["batch_size"], sizes["ctx_len"], sizes["seq_len"]
        self.vocab_size = self.session.get_outputs()[0].shape[2]
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.cache = {
            name: np.zeros((self.batch_size, value.shape[1], self.ctx_len, value.shape[3]), NUMPY[value.type])
            for name, value in self.inputs.items()
            if name.startswith("past_")
        }
        self.positions = np.zeros(self.batch_size, np.int64)  # of each row's next token
        self.step = self._bind(slice(None), 1)

    def _bind(self, rows, seq_len):
        """(binding, its small inputs by name, logits) for calls of seq_len tokens of these rows."""
        cache = {name: array[rows] for name, array in self.cache.items()}
        batch = len(self.positions[rows])
        small = dict.fromkeys(("input_ids", "position_ids"), ((batch, seq_len), np.int64))
        small |= {"seqlens_k": (batch, np.int32), "total_sequence_length": (1, np.int32)}
        small = {name: np.zeros(*given) for name, given in small.items() if name in self.inputs}
        logits = np.zeros((batch, 1, self.vocab_size), np.float32)
        binding = self.session.io_binding()
        outputs = {"logits": logits} | {retained(name): array for name, array in cache.items()}
        for bind, arrays in (binding.bind_input, small | cache), (binding.bind_output, outputs):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding, small, logits

    def describe(self):
        casts = ", float16 in float32 (it has no float16 kernels for this CPU)"
        return ENGINE + (casts if self.record["casts_float16"] else "")

    def run(self, bound, ids, positions):
        """ids and positions (B, T) of a binding's rows -> logits (B, V), a view that its next call overwrites."""
        binding, small, logits = bound
        lengths = {"seqlens_k": positions[:, -1], "total_sequence_length": positions.max() + 1}
        for name, value in ({"input_ids": ids, "position_ids": positions} | lengths).items():
            if name in small:
                small[name][:] = value
        self.session.run_with_iobinding(binding)
        return logits[:, 0]

    def prefill(self, rows):
        """Lists of ids, one for each row -> the logits after each (B, V)."""
        self.positions[:] = [len(row) for row in rows]
        return np.concatenate([self._read(row, np.asarray(ids)) for row, ids in enumerate(rows)])

    def _read(self, row, ids):
        """The logits (1, V) after the ids of one row, in chunks of equal sizes."""
        parts = np.array_split(np.arange(len(ids)), -(-len(ids) // self.prefill_seq_len))
        for part in parts:
            logits = self.run(self._bind(slice(row, row + 1), len(part)), ids[None, part], part[None])
        return logits

    def decode(self, tokens):
        """The next token of each row (B) -> logits (B, V), a view that the next call overwrites."""
        logits = self.run(self.step, tokens[:, None], self.positions[:, None])
        self.positions += 1
        return logits


def start(program, weights):
    """The onnxruntime session of a program, which compile has optimized already."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    # a thread spins for 50 us, longer than between two operators, and then sleeps: without that limit a token took
    # 45 ms on busy cores instead of 12 to 26
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    return onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
