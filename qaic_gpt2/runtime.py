"""The compiled program in onnxruntime: on a CPU, what the card's runtime does on a card.

All arrays are bound by their addresses. A cache's input and output are the same memory, written in place, so that no
cache is ever copied, neither between two calls nor in one. Prompts are read one row at a time, each into its own part
of the cache and without padding; a decode step takes a token of every row.
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime

from qaic_gpt2.files import PROGRAM, QPC, SIDECAR, SPECIALIZATIONS, ArtifactError, retained, sha256
from qaic_gpt2.threads import on_usable_cores, thread_count

ENGINE = f"onnxruntime {onnxruntime.__version__}"
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
FIRST_LOGITS = "first_logits"  # an input of the fused program: the place, from the end, of the first token with logits


def read(folder):
    """(program, its record) of an artifact; an ArtifactError if a file is not what compile wrote."""
    program_name = f"{QPC}/{PROGRAM}"
    try:
        record = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        program, expected = (folder / program_name).read_bytes(), dict(record["sha256"])
        record["weights"] = folder / record["weights"]
        hashes = {name: sha256(folder / name) for name in {*expected, SPECIALIZATIONS}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{folder / SIDECAR}: {error}: remove the folder to recompile") from None
    hashes[program_name] = hashlib.sha256(program).hexdigest()  # of the bytes that will run; the file may change
    if wrong := sorted(name for name, value in hashes.items() if value != expected.get(name)):
        raise ArtifactError(f"{folder / wrong[0]}: SHA-256 does not match {SIDECAR}: remove the folder to recompile")
    return program, record


class Session:
    """A compiled program and its KV cache: prefill(rows), then decode(tokens) for one token a row at a time."""

    tokens_per_call = None  # Drafting's

    def __init__(self, qpc_path):
        folder = Path(qpc_path).parent
        program, self.record = read(folder)
        self.session = start(program, self.record["weights"], self.record["casts_float16"])
        shapes = json.loads((folder / SPECIALIZATIONS).read_text(encoding="utf-8"))["specializations"]
        sizes = {name: int(value) for name, value in shapes[0]["symbols"].items()}  # of Prefill
        self.continuous = "full_batch_size" in sizes  # rows take a new prompt when their text has ended
        self.batch_size = sizes["full_batch_size" if self.continuous else "batch_size"]
        self.ctx_len, self.prefill_seq_len = sizes["ctx_len"], sizes["seq_len"]
        self.vocab_size = self.session.get_outputs()[0].shape[2]
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.cache = {
            name: np.zeros((self.batch_size, value.shape[1], self.ctx_len, value.shape[3]), NUMPY[value.type])
            for name, value in self.inputs.items()
            if name.startswith("past_")
        }
        self.positions = np.zeros(self.batch_size, np.int64)  # of each row's next token
        self.step = self._bind(slice(None), 1)
        self._bind_draft = functools.cache(lambda seq_len: self._bind(slice(0, 1), seq_len, seq_len))

    def _bind(self, rows: slice, seq_len: int, kept: int = 1):
        """(binding, its small inputs by name, logits) for calls of seq_len tokens of these rows.

        kept: of how many tokens, the last ones, there are logits; more than 1 for one row alone.
        """
        cache = {name: array[rows] for name, array in self.cache.items()}
        batch = len(self.positions[rows])
        small = dict.fromkeys(("input_ids", "position_ids"), ((batch, seq_len), np.int64))
        small |= {"seqlens_k": (batch, np.int32), "total_sequence_length": (1, np.int32), FIRST_LOGITS: (1, np.int64)}
        small = {name: np.zeros(*given) for name, given in small.items() if name in self.inputs}
        if FIRST_LOGITS in small:
            small[FIRST_LOGITS][:] = -kept
        logits = np.zeros((batch * kept, 1, self.vocab_size), np.float32)
        binding = self.session.io_binding()
        outputs = {"logits": logits} | {retained(name): array for name, array in cache.items()}
        for bind, arrays in (binding.bind_input, small | cache), (binding.bind_output, outputs):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding, small, logits

    def describe(self):
        casts = ", float16 computed in float32 (it has no float16 kernels for this CPU)"
        return ENGINE + (casts if self.record["casts_float16"] else "")

    @property
    def drafts(self) -> bool:
        """Whether verify gives decode's logits: for one row, by a program that was fused.

        With int8 and int4, a difference of 1e-6 makes the kernels round some activation to another integer.
        """
        return FIRST_LOGITS in self.inputs and self.batch_size == 1 and not self.record["bits"]

    def run(self, bound, ids, positions):
        """ids and positions (B, T) of a binding's rows -> logits (B, V), a view that its next call overwrites."""
        binding, small, logits = bound
        small["input_ids"][:], small["position_ids"][:] = ids, positions
        if "seqlens_k" in small:  # of the fused program
            small["seqlens_k"][:] = positions[:, -1]
            small["total_sequence_length"][:] = positions.max() + 1
        self.session.run_with_iobinding(binding)
        return logits[:, 0]

    def prefill(self, rows: list[list[int]]) -> np.ndarray:
        """Lists of ids, one for each row -> the logits after each (B, V)."""
        return np.concatenate([self.read(row, ids) for row, ids in enumerate(rows)])

    def read(self, row: int, ids: list[int]) -> np.ndarray:
        """The logits (1, V) after the ids of one row's new text, in chunks of equal sizes."""
        self.positions[row], ids = len(ids), np.asarray(ids)
        parts = np.array_split(np.arange(len(ids)), -(-len(ids) // self.prefill_seq_len))
        for part in parts:
            logits = self.run(self._bind(slice(row, row + 1), len(part)), ids[None, part], part[None])
        return logits

    def decode(self, tokens):
        """The next token of each row (B) -> logits (B, V), a view that the next call overwrites."""
        logits = self.run(self.step, tokens[:, None], self.positions[:, None])
        self.positions += 1
        return logits

    def verify(self, ids: list[int], position: int) -> np.ndarray:
        """The logits (T, V) after each of ids, the first at position, of the only row: one call for a draft."""
        positions = np.arange(position, position + len(ids))
        return self.run(self._bind_draft(len(ids)), np.array([ids]), positions[None])


def start(program: bytes, weights: Path, casts_float16: bool = False) -> onnxruntime.InferenceSession:
    """The onnxruntime session of a program, which compile has optimized already.

    casts_float16: it has a Cast for each float16 weight, which is done once here and not in every call.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = thread_count()
    # a thread spins for 100 us, longer than between two operators, and then sleeps: on two cores of which one is busy,
    # a token of GPT-2 takes 29 ms, and without that limit 38
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_BASIC if casts_float16 else level.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    with on_usable_cores():
        return onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
