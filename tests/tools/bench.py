"""Measures every project's engine in turns with transformers or, with --peers, with all that a user would pick instead.

    python -m tests.tools.bench [--peers] [--models gpt2-nano gpt2] [--rounds N] [--only NAME ...]

Each engine runs in a process and an environment of its own (tests/tools/worker.py). It starts without and with what it
stores on disk; then each round asks all of them, in an order of its own. In float32 all must choose the tokens that
transformers chooses, or their row is void. results/bench gets one JSON file, the tables and a chart.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from shared.tokenizer import load_tokenizer
from tests.conventions.rules import ROOT, env_of, projects
from tests.tools import machine, tables, training
from tests.tools.examples import Failed, make_environment
from tests.tools.process import Worker, environment, error_line, last_line
from tests.tools.random_model import write_random

NANO = ROOT / "checkpoints" / "gpt2-nano"
REFEREE = "transformers"
PEERS = (REFEREE, "ctranslate2", "llama", "onnxruntime", "openvino")
PROMPT, NEW_TOKENS, WARM_STARTS = 16, 64, 1
WARM_UP_TOKENS = 2  # enough to compile
TURN_S = 0.25  # short texts are repeated for so long: the first ones wait for threads, and for a core to wake up
EXACT = ("float32", "bfloat16", "float16")  # of these, a peer's perplexity is not measured
BUSY = 0.15  # of the CPUs' time
UNMEASURED = {"decode": None, "prefill": None}  # null in the results of an engine that fails, beside the error
# not measured: each takes half a minute or more to start, and says the same on the other model
SKIPPED = {("gpt2", "int4-awq-fast"), ("gpt2", "float8"), ("gpt2-nano", "compiled")}


@dataclass
class Engine:
    """One engine in one dtype, on one model; what was measured of it."""

    name: str
    module: str
    python: Path
    dtype: str
    width: str
    folder: Path  # of the model, or of what was converted from it
    home: Path  # where it stores what it compiles
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"decode": [], "prefill": []})
    row: dict = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.name not in PEERS

    def fail(self, error: Exception) -> None:
        self.row["error"] = str(error)
        print(f"  {self.name} {self.dtype}: {error}", flush=True)


def run_worker(engine: Engine, root: Path) -> Worker:
    return Worker(root, engine.python, [engine.module, engine.folder, engine.dtype], engine.home)


def run_python(root: Path, home: Path, python: Path, code: str, *words) -> str:
    home.mkdir(parents=True, exist_ok=True)
    command = [python, "-c", code, *words]
    run = subprocess.run(command, cwd=home, env=environment(root, home), capture_output=True, encoding="utf-8")
    if run.returncode:
        raise Failed(f"FAILED: {error_line(run.stderr.splitlines())}")
    return run.stdout


# -- which engines


def make_environments(root: Path, names: list[str]) -> dict[str, Future[Path]]:
    """Of each name its environment's python, or why it cannot be made. Two at a time."""
    environments = {name: f"peer-{name}" if name in PEERS else env_of(name) for name in names}
    with ThreadPoolExecutor(2) as pool:
        return {name: pool.submit(make_environment, root, env) for name, env in environments.items()}


def find_engines(root: Path, scratch: Path, model: str, folder: Path, pythons: dict) -> tuple[list, list]:
    """An Engine for each dtype of each name, and a row for each name that cannot run here."""
    engines, failed = [], []
    for name, made in pythons.items():
        ours = name not in PEERS
        module = f"{name}.bench" if ours else f"tests.tools.peers.{name}"
        home = scratch / model / name
        try:
            python = made.result()
            code = f"import json; from {module} import DTYPES; print(json.dumps(DTYPES))"
            widths = json.loads(last_line(run_python(root, home, python, code).splitlines()))
            own = folder if ours or name == REFEREE else convert(root, home, python, module, folder)
        except Failed as error:
            print(f"  {name}: {error}", flush=True)
            about = {"model": model, "name": name, "dtype": "all", "width": "float32", "ours": ours}  # in one table
            failed.append(about | UNMEASURED | {"error": str(error)})
            continue
        for dtype, width in widths.items():
            if (model, dtype) not in SKIPPED:
                engines.append(Engine(name, module, python, dtype, width, own, home / dtype))
    return engines, failed


def convert(root: Path, home: Path, python: Path, module: str, folder: Path) -> Path:
    converted, start = home / "converted", time.perf_counter()
    code = f"import sys; from pathlib import Path; from {module} import convert; convert(*map(Path, sys.argv[1:]))"
    run_python(root, home, python, code, folder, converted)
    print(f"  {module.rpartition('.')[2]}: converted in {time.perf_counter() - start:.0f} s", flush=True)
    return converted


# -- what is measured


def prompts(folder: Path) -> dict[str, dict]:
    """The requests for decode after a short prompt, and for prefill of half a context."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    context, vocabulary = config.get("n_positions", 1024), config.get("vocab_size", 50257)
    ids = np.random.default_rng(1).integers(vocabulary - 1, size=context // 2).tolist()
    return {
        "decode": {"prompt": ids[:PROMPT], "new_tokens": NEW_TOKENS},
        "prefill": {"prompt": ids, "new_tokens": 1},
    }


def start(engine: Engine, root: Path, prompt: list[int]) -> Worker:
    """The worker of an engine that has made its first token; the seconds from the start of a process to there, with
    nothing stored on disk (cold) and then (warm)."""
    shutil.rmtree(engine.home, ignore_errors=True)
    times = []
    while True:
        begin = time.perf_counter()
        worker = run_worker(engine, root)
        try:
            answer = worker.ask(prompt=prompt, new_tokens=1)
            times.append(time.perf_counter() - begin)
            if len(times) > WARM_STARTS:
                break
            worker.ask(prompt=prompt, new_tokens=WARM_UP_TOKENS)  # stores what more tokens take
        except BaseException:
            worker.__exit__()
            raise
        worker.close()
    facts = {"engine": answer["engine"], "step_bytes": answer["step_bytes"], "peak_mb": answer["peak_mb"]}
    engine.row |= facts | {"cold_s": round(times[0], 2), "warm_s": round(statistics.median(times[1:]), 2)}
    return worker


def measure(engines: list[Engine], root: Path, requests: dict, expected: dict, args: argparse.Namespace) -> float:
    """Starts the engines of one width, and asks each in turns; the memory's bandwidth meanwhile, the rounds' median."""
    workers, bandwidths = {}, []
    try:
        for engine in engines:
            try:
                workers[engine.home] = start(engine, root, requests["decode"]["prompt"])
                print(f"  {engine.name} {engine.dtype}: first token after {engine.row['cold_s']:.1f} s cold,", end=" ")
                print(f"{engine.row['warm_s']:.1f} s warm, {engine.row['peak_mb']:,} MB", flush=True)
            except Failed as error:
                engine.fail(error)
        warm_up = requests | {"decode": requests["decode"] | {"new_tokens": WARM_UP_TOKENS}}
        order = random.Random(0)  # a host's memory is faster for some seconds now and then
        for number in range(-1, args.rounds):
            bandwidths.append(machine.bandwidth())
            for engine in order.sample(engines, len(engines)) if number >= 0 else engines:
                if "error" not in engine.row:
                    asked = requests if number >= 0 or engine.name == REFEREE else warm_up
                    measure_round(engine, workers[engine.home], asked, expected, timed=number >= 0)
        if args.busy_core:
            with spinning():
                for engine in engines:
                    if "error" not in engine.row:
                        measure_beside(engine, workers[engine.home], requests["decode"])
    finally:
        for worker in workers.values():
            worker.__exit__()
    return statistics.median(bandwidths)


def measure_round(engine: Engine, worker: Worker, requests: dict, expected: dict, timed: bool) -> None:
    try:
        for work, request in requests.items():
            answer = worker.ask(**request)
            seconds = [answer["seconds"]]
            if engine.name == REFEREE and engine.dtype == "float32":
                expected[work] = answer["tokens"]
            elif engine.width == "float32":
                check(work, answer["tokens"], expected.get(work, [])[: request["new_tokens"]])
            if timed:
                while sum(seconds) < TURN_S:
                    seconds.append(worker.ask(**request)["seconds"])
                engine.seconds[work].append(statistics.median(seconds))
    except Failed as error:
        engine.fail(error)


@contextlib.contextmanager
def spinning() -> Iterator[None]:
    """Another process computes on one core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure_beside(engine: Engine, worker: Worker, request: dict) -> None:
    try:
        seconds = statistics.median(worker.ask(**request)["seconds"] for _ in range(3))
        engine.row["busy_core"] = {"tokens_per_s": round(request["new_tokens"] / seconds, 1), "ratio": None}
    except Failed as error:
        engine.fail(error)


def check(work: str, tokens: list[int], expected: list[int]) -> None:
    if not expected:
        raise Failed(f"void: there are no tokens of {REFEREE} to compare with")
    if tokens != expected:
        pairs = enumerate(zip(tokens, expected, strict=False))
        place = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(tokens), len(expected)))
        raise Failed(f"void: token {place + 1} of {work} is not that of {REFEREE}")


def finish(engines: list[Engine], model: str, requests: dict, bandwidth: float) -> list[dict]:
    """Rows of one width: rates, ratios to the best peer within the same rounds, parts of the bandwidth."""
    good = [engine for engine in engines if "error" not in engine.row]
    for work, request in requests.items():
        count = request["new_tokens"] if work == "decode" else len(request["prompt"])
        peers = [engine for engine in good if not engine.ours]
        peer = min(peers, key=lambda engine: statistics.median(engine.seconds[work]), default=None)
        for engine in good:
            took, ratio = engine.seconds[work], None
            if peer:
                pairs = zip(peer.seconds[work], took, strict=True)
                ratio = round(statistics.median(theirs / ours for theirs, ours in pairs), 3)
            rate = count / statistics.median(took)
            engine.row[work] = {"tokens_per_s": round(rate, 1), "ratio": ratio, "best_peer": peer and peer.name}
    for engine in good:
        rate = engine.row["decode"]["tokens_per_s"]
        of_bandwidth = round(engine.row["step_bytes"] * rate / bandwidth, 3)
        engine.row |= {"bandwidth": round(bandwidth), "of_bandwidth": of_bandwidth}
    about = [{"model": model, "name": e.name, "dtype": e.dtype, "width": e.width, "ours": e.ours} for e in engines]
    return [about | UNMEASURED | engine.row for about, engine in zip(about, engines, strict=True)]


# -- perplexity


def held_out() -> list[list[int]]:
    """Windows of the help texts that gpt2-nano was not trained on; each text begins with <|endoftext|>."""
    tokenizer = load_tokenizer(NANO)
    names = json.loads((NANO / "heldout.json").read_text(encoding="utf-8"))["pydoc_data.topics"]["topics"]
    texts = [[tokenizer.eot, *tokenizer.encode(topics[name])] for name in names if name in topics]
    return [text[i : i + 257] for text in texts for i in range(0, len(text) - 1, 256)]


def perplexity(engine: Engine, root: Path, windows: list[list[int]]) -> None:
    """Of gpt2-nano, token by token with the cache; an engine that shows no logits has none."""
    try:
        with run_worker(engine, root) as worker:
            nats = sum(worker.ask(score=window)["nats"] for window in windows)
    except Failed as error:
        if "has no attribute 'score'" not in str(error):
            engine.fail(error)
        return
    engine.row["perplexity"] = round(float(np.exp(nats / sum(len(window) - 1 for window in windows))), 4)
    print(f"  {engine.name} {engine.dtype}: perplexity {engine.row['perplexity']:.3f}", flush=True)


# -- all of it


def measure_model(root: Path, scratch: Path, model: str, pythons: dict, args) -> list[dict]:
    folder = NANO
    if model != "gpt2-nano":
        write_random(folder := scratch / f"{model}-random", model)
        for name in "vocab.json", "merges.txt":  # to calibrate int4-awq on some tokens
            shutil.copy(NANO / name, folder)
    engines, rows = find_engines(root, scratch, model, folder, pythons)
    requests, expected = prompts(folder), {}
    for width in dict.fromkeys(engine.width for engine in engines):
        group = [engine for engine in engines if engine.width == width]
        print(f"\n{tables.TITLES[model]}, {width}", flush=True)
        bandwidth = measure(group, root, requests, expected, args)
        if model == "gpt2-nano":
            windows = held_out()[::6]
            for engine in group:
                if "error" not in engine.row and (engine.ours or width not in EXACT):
                    perplexity(engine, root, windows)
        group_rows = finish(group, model, requests, bandwidth)
        for row in group_rows:
            print(f"  {tables.line(row)}", flush=True)
        rows += group_rows
        for engine in group:
            shutil.rmtree(engine.home, ignore_errors=True)  # what all engines store at 124M takes 20 GB
    shutil.rmtree(scratch / model, ignore_errors=True)
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peers", action="store_true", help="all peers, and the training step (default: transformers alone)")
    add("--models", nargs="+", choices=tables.TITLES, default=[*tables.TITLES])
    add("--rounds", type=int, default=4, help="the median of so many (default: %(default)s)")
    add("--only", nargs="+", metavar="NAME", help="these engines, beside transformers")
    add("--busy", action="store_true", help="measure beside other work too")
    add("--busy-core", action="store_true", help="decode once more while another process computes on one core")
    add("--to", type=Path, default=ROOT / "results" / "bench", metavar="FOLDER")
    return parser


def main(root: Path, argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    names = [*(PEERS if args.peers else (REFEREE,)), *projects(root)]
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {args.rounds}")
    if unknown := {*(args.only or ())} - {*names, *PEERS, "training"}:
        parser.error(f"--only must be of {', '.join(names)}, training, got {', '.join(sorted(unknown))}")
    if args.only:
        names = [REFEREE, *(name for name in (*PEERS[1:], *projects(root)) if name in args.only)]
    pythons = make_environments(root, names)
    used = machine.share_used()
    if used > BUSY and not args.busy:
        parser.error(f"other work uses {used:.0%} of the CPUs: wait for it, or give --busy")
    here = machine.about() | {"load": os.getloadavg()[0], "command": f"bench {' '.join(argv or sys.argv[1:])}".strip()}
    print(f"{here['cpu']}, {here['cores']} cores, {', '.join(here['instruction_sets'])}:", end=" ")
    print(f"reads {here['bandwidth'] / 1e9:.1f} GB/s, multiplies {here['float32'] / 1e9:,.0f} GFLOP/s in float32")
    document = {"machine": here, "rows": [], "training": []}
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            document["rows"] += measure_model(root, Path(scratch), model, pythons, args)
            bandwidths = [row["bandwidth"] for row in document["rows"] if "bandwidth" in row]
            here["bandwidth"] = statistics.median(bandwidths or [here["bandwidth"]])
            tables.write(args.to, document)
        if args.peers and not args.only or "training" in (args.only or ()):
            document["training"] = training.measure(root, Path(scratch), args.rounds)
    print(f"\n{tables.write(args.to, document)}\nThe same as JSON, with a chart: {args.to}")
    failed = [row for row in [*document["rows"], *document["training"]] if row.get("error")]
    for row in failed:
        about = row["name"], tables.TITLES.get(row["model"], row["model"]), row.get("dtype") or row["width"]
        print(f"{', '.join(filter(None, about))}: {row['error']}")
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main(ROOT))
    except KeyboardInterrupt:
        sys.exit(130)
