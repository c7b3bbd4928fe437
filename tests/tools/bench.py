"""Every project's bench.py, on gpt2-nano and on the shape of GPT-2 124M: a table, a chart and a JSON file.

    python tests/tools/bench.py [--rounds N] [--new-tokens N] [--models gpt2-nano gpt2-random]

Each bench.py takes turns with transformers, call by call; the projects take turns by the round. What a bench.py printed
is kept, so that a run that was stopped goes on where it stopped; a project whose code has changed is measured again. To
start anew, remove the folder.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.conventions.rules import ROOT, projects
from tests.tools import roofline
from tests.tools.examples import Failed, python_of

MODELS = {"gpt2-nano": "--model=gpt2-nano", "gpt2-random": "--random=gpt2"}
TITLES = {"gpt2-nano": "gpt2-nano, 3.6M parameters", "gpt2-random": "GPT-2 124M's shape"}


def measure(root: Path, folder: Path, models: list[str], rounds: int, new_tokens: int) -> list[str]:
    """Fills folder with one file a run; returns a line for each that failed."""
    runs = [(number, model, name) for number in range(1, rounds + 1) for model in models for name in projects(root)]
    failed, pythons = [], {}
    for place, (number, model, name) in enumerate(runs, 1):
        print(f"\n[{place} of {len(runs)}] {name}, {TITLES[model]}, round {number}", end="", flush=True)
        words = ["bench.py", MODELS[model], f"--new-tokens={new_tokens}"]
        path, key = folder / f"{number}-{model}-{name}.json", fingerprint(root, name, words)
        if kept(path, key):
            print(": kept from before", flush=True)
            continue
        try:
            pythons[name] = pythons.get(name) or python_of(root, name)
            print(flush=True)
            document = run(pythons[name], root / name, words)
        except Failed as error:
            print(flush=True)
            failed.append(f"{name}, {TITLES[model]}: {error}")
            continue
        write(path, json.dumps(document | {"key": key, "model": model}, indent=1) + "\n")
    return failed


def fingerprint(root: Path, project: str, words: list[str]) -> str:
    """Of what makes the figures: the command, and the code."""
    files = sorted([*(root / project).rglob("*.py"), *(root / "shared").glob("*.py")])
    return hashlib.sha256(b"\0".join([*map(str.encode, words), *(file.read_bytes() for file in files)])).hexdigest()


def kept(path: Path, key: str) -> bool:
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["key"] == key


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def run(python: Path, folder: Path, words: list[str]) -> dict:
    """Shows what bench.py prints as it comes; its last line is the document, its first ones tell the bandwidth."""
    start, lines = time.perf_counter(), []
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUTF8": "1"}
    with subprocess.Popen(
        [python, *words], cwd=folder, env=environment, stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        try:
            for line in process.stdout:
                lines.append(line)
                if not line.startswith("{"):
                    print(f"  {line}", end="", flush=True)
        except KeyboardInterrupt:
            process.terminate()
            raise
    if process.returncode:
        raise Failed(f"FAILED with exit status {process.returncode} after {time.perf_counter() - start:.0f} s")
    try:
        document = json.loads(lines[-1])
        results = document["results"]
    except (IndexError, ValueError, KeyError, TypeError):
        raise Failed("FAILED, for its last line is not the JSON document of results") from None
    bandwidth = re.search(r"memory bandwidth ([\d.]+) GB/s", "".join(lines))
    return {
        "project": document.get("project", folder.name),
        "bandwidth_gb_s": float(bandwidth[1]) if bandwidth else None,
        "seconds": round(time.perf_counter() - start),
        "results": results,
    }


# -- what the runs say together


def gather(folder: Path, models: list[str]) -> list[dict]:
    """One row for each (model, project, work, dtype): medians over the rounds."""
    rows = {}
    for path in sorted(folder.glob("*-*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["model"] not in models:
            continue
        for result in document["results"]:
            ours, bandwidth = result["tokens_per_s"], document["bandwidth_gb_s"]
            # ours counts the tokens of all texts in the batch, which share what one step reads
            read = result.get("mbu") and ours and bandwidth and result["mbu"] * bandwidth * 1e9 / ours
            row = result | {"read_mb_a_token": read and round(read / 1e6, 1)}
            key = document["model"], document["project"], result["work"], result["dtype"], result["model"]
            rows.setdefault(key, []).append(row | {"peer_tokens_per_s": (result["peer"] or {}).get("tokens_per_s")})
    return [
        {"of": model, "project": project} | {name: middle([row.get(name) for row in group]) for name in group[0]}
        for (model, project, *_), group in rows.items()
    ]


def middle(values):
    """The median of numbers, which every run gave; of anything else, the first."""
    return statistics.median(values) if all(type(value) in (int, float) for value in values) else values[0]


def one(rows, model, project, work):
    found = [row for row in rows if (row["of"], row["project"], row["work"]) == (model, project, work)]
    return found[0] if found else {}


def shown(value, digits=0, ending=""):
    return "" if value is None else f"{value:,.{digits}f}{ending}"


def names_in(rows):
    return sorted({row["project"] for row in rows})


def table(rows: list[dict], models: list[str]) -> str:
    """Float32, one text: for people."""
    lines = [
        "| model | project | decoding | beside transformers | read a token | prefill | beside it | first token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in models:
        for project in names_in(rows):
            decode, prefill = one(rows, model, project, "decode"), one(rows, model, project, "prefill")
            cells = (
                shown(decode.get("tokens_per_s"), 0, " tokens/s"),
                shown(decode.get("ratio"), 2, " x"),
                shown(decode.get("read_mb_a_token"), 0, " MB"),
                shown(prefill.get("tokens_per_s"), 0, " tokens/s"),
                shown(prefill.get("ratio"), 2, " x"),
                shown(prefill.get("ttft_ms"), 0 if model != "gpt2-nano" else 1, " ms"),
            )
            lines.append(f"| {TITLES[model]} | {project} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: list[dict], models: list[str], bandwidth: float) -> None:
    """A row of panels a model: tokens/s, time to the first token, and bytes read a token under the bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    names = names_in(rows)
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    markers = {"float32": "o", "bfloat16": "s", "float16": "D", "int8": "^"}
    figure, panels = plt.subplots(len(models), 3, figsize=(14, 3.6 * len(models)), squeeze=False, layout="constrained")
    for (speed, first, memory), model in zip(panels, models, strict=True):
        places = np.arange(len(names))[::-1]
        decode = [one(rows, model, name, "decode") for name in names]
        prefill = [one(rows, model, name, "prefill") for name in names]
        ours = [row.get("tokens_per_s") or 0 for row in decode]
        theirs = [row.get("peer_tokens_per_s") or 0 for row in decode]
        speed.set_title(f"{TITLES[model]}\ndecoding, tokens/s", fontsize=10)
        bars(speed, names, places, ours, theirs, colors)
        length = next((row["prompt_tokens"] for row in prefill if row), 0)
        ours = [row.get("ttft_ms") or 0 for row in prefill]
        theirs = [1e3 * length / row["peer_tokens_per_s"] if row.get("peer_tokens_per_s") else 0 for row in prefill]
        first.set_title(f"to the first token behind {length},\nms: less is better", fontsize=10)
        bars(first, names, places, ours, theirs, colors)
        first.set_yticklabels([])

        points = [row for row in rows if row["of"] == model and row["read_mb_a_token"] and row["batch"] == 1]
        for row in points:
            x, y = row["read_mb_a_token"], row["tokens_per_s"]
            marker = markers.get(row["dtype"], "*")
            memory.loglog(x, y, marker, color=colors[row["project"]], ms=8, mec="black", mew=0.5)
        if points:
            sizes = [row["read_mb_a_token"] for row in points]
            line = np.array([min(sizes) / 1.6, max(sizes) * 1.6])
            memory.loglog(line, bandwidth / 1e6 / line, "k--", lw=1)
            for axis in memory.xaxis, memory.yaxis:
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        memory.set_title(f"MB read a token, and tokens/s;\nthe line: {bandwidth / 1e9:.0f} GB/s, measured", fontsize=10)
        memory.grid(alpha=0.3, which="both")
    handles = [plt.Line2D([], [], color=color, lw=6, label=name) for name, color in colors.items()]
    handles.append(plt.Line2D([], [], color="lightgrey", lw=6, label="transformers, in turns"))
    used = {row["dtype"] for row in rows if row["read_mb_a_token"]}
    for dtype, marker in markers.items():
        if dtype in used:
            handles.append(plt.Line2D([], [], color="grey", marker=marker, mec="black", mew=0.5, lw=0, label=dtype))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.png")
    figure.savefig(part, dpi=100)
    part.replace(path)
    plt.close(figure)


def bars(panel, names, places, ours, theirs, colors):
    panel.barh(places + 0.2, ours, 0.38, color=[colors[name] for name in names])
    panel.barh(places - 0.2, theirs, 0.38, color="lightgrey")
    for values, shift in (ours, 0.2), (theirs, -0.2):
        for place, value in zip(places, values, strict=True):
            if value:
                panel.text(value, place + shift, f" {value:,.{1 if value < 20 else 0}f}", va="center", fontsize=8)
    panel.set_yticks(places, names)
    panel.set_xlim(0, 1.18 * max([*ours, *theirs, 1e-9]))
    panel.spines[["top", "right"]].set_visible(False)


# -- this CPU


def best(call, times=10):
    took = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)


def machine(path: Path, floats: int = 2**26, side: int = 2048) -> dict:
    """This CPU: what it reads and multiplies a second, in float32, at its best, now or when an earlier run looked."""
    halves = np.split(np.ones(floats, np.float32), 2)
    matrix, vector = np.concatenate(halves).reshape(-1, 2**13), np.ones(2**13, np.float32)
    with ThreadPoolExecutor(2) as pool:  # of 256 MB; np.sum, by the projects' bench.py, is slower
        reads = [lambda: list(pool.map(np.max, halves)), lambda: list(pool.map(np.dot, halves, halves))]
        read_s = min(map(best, [*reads, lambda: matrix @ vector]))
    square = np.random.default_rng(0).random((side, side), np.float32)
    names = re.findall(r"^model name\s*: (.*)$", read_text(Path("/proc/cpuinfo")), re.M)
    here = {
        "cpu": names[0] if names else "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "bandwidth": round(4 * floats / read_s),
        "float32": round(2 * side**3 / best(lambda: square @ square, 5)),
    }
    before = json.loads(read_text(path) or "{}")
    if all(before.get(name) == here[name] for name in ("cpu", "cores")):
        here |= {name: max(here[name], before[name]) for name in ("bandwidth", "float32")}
    write(path, json.dumps(here) + "\n")
    return here


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def report(folder: Path, models: list[str], here: dict) -> str:
    """bench and roofline, each as .md and .json, and bench.png; returns the tables."""
    rows = gather(folder / "runs", models)
    devices = roofline.devices(here)
    text, limits = table(rows, models), roofline.rows(devices)
    lines = ",\n".join(map(json.dumps, rows))
    write(folder / "bench.json", f'{{"machine": {json.dumps(here)}, "results": [\n{lines}\n]}}\n')
    write(folder / "roofline.json", json.dumps(limits, indent=1) + "\n")
    write(folder / "bench.md", text)
    write(
        folder / "roofline.md",
        f"{roofline.__doc__.strip()}\n\n{roofline.table(limits)}\n{roofline.table_of_work()}\n{roofline.sources(devices)}",
    )
    draw(folder / "bench.png", rows, models, here["bandwidth"])
    return f"{text}\n{roofline.table(limits, ['gpt2', 'gpt2-xl'])}"


def main(root: Path, arguments: "list[str] | None" = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--to", type=Path, default=root / "results" / "bench", metavar="FOLDER")
    args = parser.parse_args(arguments)
    for name in ("rounds", "new_tokens"):
        if getattr(args, name) < (2 if name == "new_tokens" else 1):
            print(f"{name} is {getattr(args, name)}, which is too few", file=sys.stderr)
            return 2
    if not projects(root):
        print("There are no projects in this checkout yet: nothing to bench.")
        return 0
    here = machine(args.to / "machine.json")
    print(f"{here['cpu']}, {here['cores']} cores:", end=" ")
    print(f"reads {here['bandwidth'] / 1e9:.1f} GB/s, multiplies {here['float32'] / 1e9:,.0f} GFLOP/s in float32")
    print(f"What was measured is kept in {args.to}; remove it to start anew.")
    failed = measure(root, args.to / "runs", args.models, args.rounds, args.new_tokens)
    print(f"\n{report(args.to, args.models, here)}\nThe same with a chart, and as JSON: {args.to}")
    for line in failed:
        print(line)
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main(ROOT))
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept, and the next run goes on from there", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader has seen enough, as in `| head`; what is left must not be flushed there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"the results cannot be written: {error}", file=sys.stderr)
        sys.exit(2)
