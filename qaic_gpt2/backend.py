"""Chooses QEFFAutoModelForCausalLM: QEfficient's if a card is ready, else the one of auto_model.py.

from qaic_gpt2.backend import QEFFAutoModelForCausalLM     # QEfficient's if a card is ready
cls = choose("cpu")                                        # or by name: auto, cpu, qaic
"""

import importlib
import platform
import subprocess
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

DEVICES = ("auto", "cpu", "qaic")
SDK = Path("/opt/qti-aic")
SDK_PAGE = "https://quic.github.io/cloud-ai-sdk-pages"


class CardError(RuntimeError):
    """An error of QEfficient, its compiler or the card, in one line."""


@contextmanager
def card_errors(device):
    """Around QEfficient's own calls: on a card their errors become a CardError; on a CPU nothing changes."""
    try:
        yield
    except (RuntimeError, ImportError) as error:  # such as the compiler's words, for another version of the SDK
        if device == "cpu":
            raise
        raise CardError(f"QEfficient: {' '.join(str(error).split())}") from error


def missing(compile_only: bool = False) -> str | None:
    """What a run on a card lacks, and how to install it; None if a card is ready. compile_only needs no card."""
    if find_spec("QEfficient") is None:
        return "QEfficient is not installed: pip install -r requirements.txt"
    if not (SDK / "exec/qaic-compile").is_file():
        return f"{SDK}/exec/qaic-compile is missing: install the Cloud AI Apps SDK, {SDK_PAGE}"
    if compile_only:
        return None
    library = SDK / "dev/lib" / platform.machine()
    if find_spec("qaicrt") is None and not any(library.glob("qaicrt*")):
        return f"{library} has no qaicrt: install the Cloud AI Platform SDK, {SDK_PAGE}"
    try:
        listed = subprocess.run([SDK / "tools/qaic-util", "-q"], capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{SDK}/tools/qaic-util -q fails ({type(error).__name__}): install the Cloud AI Platform SDK, {SDK_PAGE}"
    if listed.returncode or "Status:Ready" not in listed.stdout:
        return f"{SDK}/tools/qaic-util -q lists no card that is ready"
    return None


def choose_device(name: str = "auto", compile_only: bool = False) -> tuple[str, str]:
    """(cpu or qaic, why). A card that is requested by name and missing is an error, never a run on the CPU.

    compile_only: qaic is also a host with the compiler and without a card.
    """
    if name not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}, got {name!r}")
    if name == "cpu":
        return "cpu", "as requested"
    lack = missing(compile_only)
    if name == "qaic" and lack:
        raise ValueError(f"--device must be auto or cpu here, got qaic: {lack}")
    return ("cpu", "no Cloud AI 100 found") if lack else ("qaic", "a card is ready")


def choose(name="auto"):
    device, _ = choose_device(name)
    module = importlib.import_module("QEfficient" if device == "qaic" else "qaic_gpt2.auto_model")
    return module.QEFFAutoModelForCausalLM


def describe(device, why):
    if device == "qaic":
        return f"qaic: QEfficient {importlib.import_module('QEfficient').__version__}"
    from qaic_gpt2.runtime import ENGINE

    return f"cpu: {ENGINE}, {why}"


def card_logits(qpc_path: Path, rows: list[list[int]], device_ids: list[int] | None = None) -> np.ndarray:
    """The logits after each row of ids from a card, through the session that QEfficient's generate uses."""
    from QEfficient.generation.cloud_infer import QAICInferenceSession

    session = QAICInferenceSession(qpc_path, device_ids)
    session.skip_buffers([name for name in session.input_names + session.output_names if name.startswith("past_")])
    place = session.binding_index_map
    shapes = [{name: shape[place[name]][1] for name in ("input_ids", "logits")} for shape in session.allowed_shapes]
    session.set_buffers({"logits": np.zeros(shapes[0]["logits"], np.float32)})

    def run(ids, positions):
        return session.run({"input_ids": ids, "position_ids": positions})["logits"][:, 0]

    return prefill(run, rows, max(shape["input_ids"][1] for shape in shapes))


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


def __getattr__(name):
    if name == "QEFFAutoModelForCausalLM":
        return choose()
    raise AttributeError(f"module {__name__} has no {name}")
