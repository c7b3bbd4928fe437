"""The training iteration: ours, nanoGPT's compiled and eager, and llm.c's, in rounds that interleave them.

All train from the same weights on the same batches by the same AdamW. The losses of the first iterations are without
dropout: a row whose losses are not those of nanoGPT, eager, is void. nanoGPT and llm.c are cloned at a commit; NANOGPT
and LLM_C name a repository to clone instead of GitHub's, such as a local copy.
"""

import math
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from tests.tools.examples import Failed, make_environment
from tests.tools.peers import training_task
from tests.tools.process import Worker, last_line

OURS, REFEREE = "jax_nanogpt", "nanoGPT, eager"
# name -> (environment, module, ending of the dtype)
ENGINES = {
    REFEREE: ("peer-transformers", "tests.tools.peers.nanogpt", ""),
    "nanoGPT, compiled": ("peer-transformers", "tests.tools.peers.nanogpt", "-compiled"),
    "llm.c": ("jax", "tests.tools.peers.llmc", ""),
    OURS: ("jax", "tests.tools.peers.jax_training", ""),
}
SOURCES = {
    "nanoGPT": ("https://github.com/karpathy/nanoGPT", "3adf61e154c3fe3fca428ad6bc3818b27a3b8291"),
    "llm.c": ("https://github.com/karpathy/llm.c", "f1e2ace651495b74ae22d45d1723443fd00ecd3a"),
}
CHECKED = 2  # iterations whose losses are compared
WIDTHS = {"float32": 1e-3, "bfloat16": 2e-2}  # and how far the losses may be apart


@dataclass
class Model:
    shape: dict
    settings: dict
    batch: int
    tokens: int  # of each text
    iterations: int  # in a request
    checked: int = CHECKED  # of them before the rounds; without dropout the first round's are as good
    rounds: int = 3  # at most
    dropout: float = 0.0
    once: tuple[str, ...] = ()  # engines that are measured in the first round alone


ADAMW = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "grad_clip": 1.0}
MODELS = {
    # jax_nanogpt/config/train_shakespeare_char.py
    "shakespeare": Model(
        {"block_size": 96, "vocab_size": 65, "n_layer": 4, "n_head": 4, "n_embd": 192, "bias": False},
        ADAMW,
        batch=12,
        tokens=96,
        iterations=10,
        dropout=0.1,
    ),
    "gpt2": Model(
        {"block_size": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768, "bias": True},
        ADAMW | {"learning_rate": 6e-4, "beta2": 0.95},
        batch=4,
        tokens=256,
        iterations=1,
        checked=1,
        rounds=2,
        once=("llm.c",),  # half a minute
    ),
}


@dataclass
class Row:
    """One engine in one width, on one model."""

    name: str
    model: str
    width: str
    dropout: float
    seconds: list[float] = field(default_factory=list)
    first_s: float = 0.0  # of so many iterations, with the compilation
    first_iterations: int = 1
    peak_mb: int = 0
    losses: list[float] = field(default_factory=list)
    error: str = ""


def clone(name: str, folder: Path) -> None:
    """The peer's code at its commit."""
    url, commit = SOURCES[name]
    url = os.environ.get(re.sub(r"\W", "_", name).upper(), url)
    for words in ["clone", "--quiet", url, str(folder)], ["-C", str(folder), "checkout", "--quiet", commit]:
        run = subprocess.run(["git", *words], capture_output=True, encoding="utf-8")
        if run.returncode:
            raise Failed(f"{url} cannot be cloned at {commit:.7}: {last_line(run.stderr.splitlines())}")


def find_peers(folder: Path) -> dict[str, str]:
    """Clones each peer into folder; name -> why it cannot be had."""
    missing = {}
    for name in SOURCES:
        try:
            clone(name, folder / name)
        except Failed as error:
            missing[name] = str(error)
    return missing


def measure(root: Path, scratch: Path, rounds: int) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        folder = Path(temporary)
        missing = find_peers(folder)
        for name, model in MODELS.items():
            training_task.write(
                folder / name,
                model.shape,
                model.settings,
                (max(model.checked, model.iterations), model.batch, model.tokens + 1),
            )
            for width in WIDTHS:
                print(f"\ntraining {name}, {width}", flush=True)
                rows += measure_width(root, folder, name, width, missing, min(rounds, model.rounds))
            shutil.rmtree(folder / name)
    return rows


def measure_width(root: Path, folder: Path, name: str, width: str, missing: dict, rounds: int) -> list[dict]:
    engines = [engine for engine in ENGINES if width == "float32" or engine != "llm.c"]
    model, rows, workers = MODELS[name], [], {}
    try:
        for engine in engines:
            row = Row(engine, name, width, 0.0 if engine == "llm.c" else model.dropout)
            rows.append(row)
            try:
                if source := next((source for source in missing if engine.startswith(source)), None):
                    raise Failed(missing[source])
                workers[engine] = start(root, folder, row)
                check(row, rows)
            except Failed as error:
                row.error = str(error)
            print(f"  {row.name}: {row.error or f'{row.first_s:.1f} s for the first time'}", flush=True)
        for number in range(rounds):
            for row in rows:
                if not row.error and (number == 0 or row.name not in model.once):
                    measure_round(workers[row.name], row, rows)
    finally:
        for worker in workers.values():
            worker.__exit__()
    return finish(rows)


def start(root: Path, folder: Path, row: Row) -> Worker:
    """The worker, which has compiled what it needs; the losses without dropout."""
    environment, module, ending = ENGINES[row.name]
    python, home = make_environment(root, environment), folder / "home" / re.sub(r"\W+", "-", f"{row.name} {row.width}")
    words = [module, folder / row.model, f"{row.width}{ending}"]
    worker = Worker(root, python, words, home)
    try:
        model = MODELS[row.model]
        answer = worker.ask(train=model.checked, dropout=0.0)
        row.losses, row.first_iterations = answer["losses"], model.checked
        if row.dropout:
            row.first_iterations = model.iterations
            answer = worker.ask(train=row.first_iterations, dropout=row.dropout)
        row.first_s = answer["seconds"]
    except BaseException:
        worker.__exit__()
        raise
    return worker


def check(row: Row, rows: list[Row]) -> None:
    most, referee = WIDTHS[row.width], next(other for other in rows if other.losses and not other.error)
    for number, (ours, theirs) in enumerate(zip_longest(row.losses, referee.losses, fillvalue=math.nan), 1):
        if not abs(ours - theirs) <= most:
            raise Failed(f"void: the loss of iteration {number} is {ours:.4f}, that of {referee.name} {theirs:.4f}")


def measure_round(worker: Worker, row: Row, rows: list[Row]) -> None:
    model = MODELS[row.model]
    try:
        answer = worker.ask(train=model.iterations, dropout=row.dropout)
        row.seconds.append(answer["seconds"])
        row.peak_mb = answer["peak_mb"]
        if len(row.losses) < CHECKED:
            row.losses += answer["losses"]
            check(row, rows)
    except Failed as error:
        row.error = str(error)


def finish(rows: list[Row]) -> list[dict]:
    """Medians, and the median of the ratio to the best peer in the same rounds."""
    peers = [row for row in rows if row.name != OURS and not row.error]
    best = min(peers, key=lambda row: statistics.median(row.seconds), default=None)
    return [document(row, best) for row in rows]


def document(row: Row, best: Row | None) -> dict:
    about = {"name": row.name, "model": row.model, "width": row.width, "dropout": row.dropout, "ours": row.name == OURS}
    if row.error:
        return about | {"error": row.error}
    model, took_s = MODELS[row.model], statistics.median(row.seconds)
    pairs = zip(best.seconds, row.seconds, strict=False) if best else ()
    ratios = [theirs / ours for theirs, ours in pairs]
    return about | {
        "ms_per_iteration": round(1e3 * took_s / model.iterations, 1),
        "tokens_per_s": round(model.iterations * model.batch * model.tokens / took_s, 1),
        "ratio": round(statistics.median(ratios), 3) if ratios else None,
        "best_peer": best and best.name,
        "compile_s": round(max(0, row.first_s - took_s * row.first_iterations / model.iterations), 1),
        "peak_mb": row.peak_mb,
    }


# -- the table

COLUMNS = ["model", "width", "engine", "ms/iteration", "tokens/s", "vs the best peer", "compile", "memory"]


def table(rows: list[dict]) -> str:
    """Markdown: of each model and width the fastest first; what failed, last."""
    if not rows:
        return ""
    models, widths = [*MODELS], [*WIDTHS]

    def place(row):
        return models.index(row["model"]), widths.index(row["width"]), row.get("ms_per_iteration", math.inf)

    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, sorted(rows, key=place))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("|  |", "| |")


def cells(row: dict) -> list[str]:
    name = f"**{row['name']}**" if row["ours"] else row["name"]
    if not row["dropout"] and MODELS[row["model"]].dropout:
        name += ", which has no dropout"
    about = [row["model"], row["width"], name]
    if "error" in row:
        return [*about, row["error"], *[""] * 4]
    rate, ratio = f"{row['tokens_per_s']:,.0f}", "" if row["ratio"] is None else f"{row['ratio']:.2f} ×"
    return [
        *about,
        f"{row['ms_per_iteration']:,.1f}",
        rate,
        ratio,
        f"{row['compile_s']:.1f} s",
        f"{row['peak_mb']:,} MB",
    ]
