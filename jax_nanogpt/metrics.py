"""What a run reports: log lines; metrics.jsonl, one JSON object per line; and loss.png, plotted from it."""

import json
import sys

from matplotlib.figure import Figure
from tqdm import tqdm

from jax_nanogpt.device import is_main_process
from jax_nanogpt.files import write_file, write_text


def log(text, file=None):
    if is_main_process():
        tqdm.write(text, file=file)  # above the progress bar
        (file or sys.stdout).flush()


class Metrics:
    def __init__(self, out_dir, rows):
        self.file, self.chart, self.rows = out_dir / "metrics.jsonl", out_dir / "loss.png", rows
        if is_main_process():
            write_text(self.file, "".join(json.dumps(row) + "\n" for row in rows))

    @classmethod
    def resume(cls, out_dir, iteration):
        """Keeps the rows up to iteration: a killed run may have recorded more after its last checkpoint."""
        file = out_dir / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if iteration and file.exists() else ()
        return cls(out_dir, [row for row in map(json.loads, lines) if row["iter"] <= iteration])

    def add(self, **row):
        if is_main_process():
            self.rows.append(row)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def plot(self):
        if not is_main_process():
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for key, style in ("loss", "0.8"), ("train_loss", "tab:blue"), ("val_loss", "tab:orange"):
            points = [(row["iter"], row[key]) for row in self.rows if key in row]
            axes.plot(*zip(*points, strict=True) if points else ((), ()), color=style, label=key.replace("_", " "))
        axes.set(xlabel="iteration", ylabel="cross-entropy, nats/token")
        axes.grid(alpha=0.3)
        axes.legend()
        write_file(self.chart, lambda path: figure.savefig(path, format="png", dpi=120))
