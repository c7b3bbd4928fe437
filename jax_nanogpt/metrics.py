"""What a run reports: log lines; metrics.jsonl, one JSON object per line; and loss.png, plotted from it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
from tqdm import tqdm

from jax_nanogpt.files import write_file, write_text
from jax_nanogpt.runtime import is_main_process

# of a device in bfloat16, dense, from the data sheets; a device has the first of the names that its kind contains
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L4": 121}
PEAK_TFLOPS |= {"TPU v4": 275, "TPU v5 lite": 197, "TPU v5": 459, "TPU v6 lite": 918}


def peak_tflops(device: jax.Device, dtype: str) -> float | None:
    """None where it is not known."""
    return next(
        (peak for name, peak in PEAK_TFLOPS.items() if name in device.device_kind and dtype == "bfloat16"), None
    )


def log(text: str, file: TextIO | None = None) -> None:
    if is_main_process():
        tqdm.write(text, file=file)  # above the progress bar
        (file or sys.stdout).flush()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. What a kill left of a last line is ignored; damage before it is logged."""
    rows: list[dict[str, Any]] = []
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            int(row["iter"])
            rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            log(f"{file}:{number} is damaged: its losses are left out", sys.stderr)
    return rows


class Metrics:
    def __init__(self, out_dir: Path, rows: list[dict[str, Any]]) -> None:
        self.file, self.chart, self.rows = out_dir / "metrics.jsonl", out_dir / "loss.png", rows
        if is_main_process():
            write_text(self.file, "".join(json.dumps(row) + "\n" for row in rows))

    @classmethod
    def resume(cls, out_dir: Path, iteration: int) -> "Metrics":
        """Keeps the rows up to iteration: a killed run may have recorded more after its last checkpoint."""
        rows = read_rows(out_dir / "metrics.jsonl") if iteration else []
        return cls(out_dir, [row for row in rows if row["iter"] <= iteration])

    def add(self, **row: float) -> None:
        if is_main_process():
            self.rows.append(row)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def plot(self) -> None:
        if not is_main_process():
            return
        from matplotlib.figure import Figure  # here, since importing Matplotlib takes a second

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for key, style in ("loss", "0.8"), ("train_loss", "tab:blue"), ("val_loss", "tab:orange"):
            points = [(row["iter"], row[key]) for row in self.rows if key in row]
            axes.plot(*zip(*points, strict=True) if points else ((), ()), color=style, label=key.replace("_", " "))
        axes.set(xlabel="iteration", ylabel="cross-entropy, nats/token")
        axes.grid(alpha=0.3)
        axes.legend()
        write_file(self.chart, lambda path: figure.savefig(path, format="png", dpi=120))


def trace_calls(folder: str) -> Iterator[None]:
    """--profile=DIR: next() comes before each call. jax.profiler traces the second to the fourth, since the first one
    compiles."""
    yield
    if folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                yield
    while True:
        yield
