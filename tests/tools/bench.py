"""Runs every project's bench.py on gpt2-nano and on GPT-2 124M's shape, and writes a table, a chart and a JSON file.

    python -m tests.tools.bench [--rounds N] [--new-tokens N] [--models gpt2-nano gpt2-random]

Each bench.py measures its engine and transformers, interleaved call by call; rounds interleave the projects. An
interrupted run continues from the results that it kept; a project whose code has changed is measured again.
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
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "D", "int8": "^"}


def measure(root: Path, folder: Path, models: list[str], rounds: int, new_tokens: int) -> list[str]:
    """Writes one file per run into folder; returns a line for each run that failed."""
    runs = [(number, model, name) for number in range(1, rounds + 1) for model in models for name in projects(root)]
    failed, pythons = [], {}
    for place, (number, model, name) in enumerate(runs, 1):
        print(f"\n[{place} of {len(runs)}] {name}, {TITLES[model]}, round {number}", end="", flush=True)
        words = ["bench.py", MODELS[model], f"--new-tokens={new_tokens}"]
        path, key = folder / f"{number}-{model}-{name}.json", fingerprint(root, name, words)
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["key"] == key:
            print(": measured by an earlier run", flush=True)
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
    """A hash of the command and of the code that it measures."""
    files = sorted([*(root / project).rglob("*.py"), *(root / "shared").glob("*.py")])
    return hashlib.sha256(b"\0".join([*map(str.encode, words), *(file.read_bytes() for file in files)])).hexdigest()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def run(python: Path, folder: Path, words: list[str]) -> dict:
    """Prints what bench.py prints; its last line is the results, and an earlier one has the memory bandwidth."""
    lines = []
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
        raise Failed(f"FAILED with exit status {process.returncode}")
    try:
        document = json.loads(lines[-1])
        results = document["results"]
    except (IndexError, ValueError, KeyError, TypeError):
        raise Failed("FAILED: its last line must be the JSON document of results") from None
    bandwidth = re.search(r"memory bandwidth ([\d.]+) GB/s", "".join(lines))
    return {
        "project": document.get("project", folder.name),
        "bandwidth_gb_s": float(bandwidth[1]) if bandwidth else None,
        "results": results,
    }


# -- the results of all runs


def gather(folder: Path, models: list[str]) -> list[dict]:
    """One row for each (model, project, work, dtype): medians over the rounds."""
    rows = {}
    for path in sorted(folder.glob("*-*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        for result in document["results"] if document["model"] in models else ():
            ours, bandwidth = result["tokens_per_s"], document["bandwidth_gb_s"]
            # tokens_per_s counts the tokens of all texts in the batch, which share the bytes of one step
            read = result.get("mbu") and ours and bandwidth and result["mbu"] * bandwidth * 1e9 / ours
            row = result | {"read_mb_a_token": read and round(read / 1e6, 1)}
            key = document["model"], document["project"], result["work"], result["dtype"], result["model"]
            rows.setdefault(key, []).append(row | {"peer_tokens_per_s": (result["peer"] or {}).get("tokens_per_s")})
    return [
        {"of": model, "project": project} | {name: median([row.get(name) for row in group]) for name in group[0]}
        for (model, project, *_), group in rows.items()
    ]


def median(values):
    """The median of numbers that every run gave, or else the first value."""
    return statistics.median(values) if all(type(value) in (int, float) for value in values) else values[0]


def one(rows, model, project, work):
    return next((row for row in rows if (row["of"], row["project"], row["work"]) == (model, project, work)), {})


def names_in(rows):
    return sorted({row["project"] for row in rows})


def table(rows: list[dict], models: list[str]) -> str:
    """Markdown: float32, one text."""
    lines = [
        "| model | project | decode | vs transformers | read per token | prefill | vs transformers | first token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in models:
        for project in names_in(rows):
            decode, prefill = one(rows, model, project, "decode"), one(rows, model, project, "prefill")
            cells = (
                (decode.get("tokens_per_s"), ",.0f", " tokens/s"),
                (decode.get("ratio"), ".2f", " x"),
                (decode.get("read_mb_a_token"), ",.0f", " MB"),
                (prefill.get("tokens_per_s"), ",.0f", " tokens/s"),
                (prefill.get("ratio"), ".2f", " x"),
                (prefill.get("ttft_ms"), ",.1f" if model == "gpt2-nano" else ",.0f", " ms"),
            )
            shown = ["" if value is None else f"{value:{digits}}{unit}" for value, digits, unit in cells]
            lines.append(f"| {TITLES[model]} | {project} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: list[dict], models: list[str], bandwidth: float) -> None:
    """A row of panels per model: tokens/s, time to the first token, and bytes read per token under the bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = names_in(rows)
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    figure, panels = plt.subplots(len(models), 3, figsize=(14, 3.6 * len(models)), squeeze=False, layout="constrained")
    for (speed, first, memory), model in zip(panels, models, strict=True):
        decode = [one(rows, model, name, "decode") for name in names]
        prefill = [one(rows, model, name, "prefill") for name in names]
        ours = [row.get("tokens_per_s") or 0 for row in decode]
        theirs = [row.get("peer_tokens_per_s") or 0 for row in decode]
        speed.set_title(f"{TITLES[model]}\ndecode, tokens/s", fontsize=10)
        bars(speed, colors, ours, theirs)
        length = next((row["prompt_tokens"] for row in prefill if row), 0)
        ours = [row.get("ttft_ms") or 0 for row in prefill]
        theirs = [1e3 * length / row["peer_tokens_per_s"] if row.get("peer_tokens_per_s") else 0 for row in prefill]
        first.set_title(f"time to first token after {length} tokens,\nms: less is better", fontsize=10)
        bars(first, colors, ours, theirs)
        first.set_yticklabels([])
        points = [row for row in rows if row["of"] == model and row["read_mb_a_token"] and row["batch"] == 1]
        memory.set_title(
            f"MB read per token, and tokens/s;\nthe line: {bandwidth / 1e9:.0f} GB/s, measured", fontsize=10
        )
        if points:
            under_bandwidth(memory, colors, points, bandwidth)
    handles = [plt.Line2D([], [], color=color, lw=6, label=name) for name, color in colors.items()]
    handles.append(plt.Line2D([], [], color="lightgrey", lw=6, label="transformers, interleaved"))
    dtypes = {row["dtype"] for row in rows if row["read_mb_a_token"]}
    for dtype, marker in MARKERS.items():
        if dtype in dtypes:
            handles.append(plt.Line2D([], [], color="grey", marker=marker, mec="black", mew=0.5, lw=0, label=dtype))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def bars(panel, colors, ours, theirs):
    places = np.arange(len(colors))[::-1]
    panel.barh(places + 0.2, ours, 0.38, color=[*colors.values()])
    panel.barh(places - 0.2, theirs, 0.38, color="lightgrey")
    for values, shift in (ours, 0.2), (theirs, -0.2):
        for place, value in zip(places, values, strict=True):
            if value:
                panel.text(value, place + shift, f" {value:,.{1 if value < 20 else 0}f}", va="center", fontsize=8)
    panel.set_yticks(places, [*colors])
    panel.set_xlim(0, 1.18 * max([*ours, *theirs, 1e-9]))
    panel.spines[["top", "right"]].set_visible(False)


def under_bandwidth(panel, colors, points, bandwidth):
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    for row in points:
        marker, color = MARKERS.get(row["dtype"], "*"), colors[row["project"]]
        panel.loglog(row["read_mb_a_token"], row["tokens_per_s"], marker, color=color, ms=8, mec="black", mew=0.5)
    sizes = [row["read_mb_a_token"] for row in points]
    line = np.array([min(sizes) / 1.6, max(sizes) * 1.6])
    panel.loglog(line, bandwidth / 1e6 / line, "k--", lw=1)
    for axis in panel.xaxis, panel.yaxis:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    panel.grid(alpha=0.3, which="both")


# -- this CPU


def best(call, times=10):
    took = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)


def machine(path: Path, floats: int = 2**26, side: int = 2048) -> dict:
    """The highest float32 read and multiply rates of this CPU, now or in an earlier run."""
    halves = np.split(np.ones(floats, np.float32), 2)
    matrix, vector = np.concatenate(halves).reshape(-1, 2**13), np.ones(2**13, np.float32)
    with ThreadPoolExecutor(2) as pool:  # of 256 MB
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
    """Writes bench.json, bench.md, bench.png and roofline.md; returns the tables."""
    rows, devices = gather(folder / "runs", models), roofline.devices(here)
    text, limits = table(rows, models), roofline.rows(devices)
    lines = ",\n".join(map(json.dumps, rows))
    write(folder / "bench.json", f'{{"machine": {json.dumps(here)}, "results": [\n{lines}\n]}}\n')
    write(folder / "bench.md", text)
    write(folder / "roofline.md", roofline.page(devices))
    draw(folder / "bench.png", rows, models, here["bandwidth"])
    return f"{text}\n{roofline.table(limits, ['gpt2', 'gpt2-xl'])}"


def main(root: Path, argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--to", type=Path, default=root / "results" / "bench", metavar="FOLDER")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {args.rounds}")
    if args.new_tokens < 2:
        parser.error(f"--new-tokens must be 2 or more, got {args.new_tokens}")
    here = machine(args.to / "machine.json")
    print(f"{here['cpu']}, {here['cores']} cores:", end=" ")
    print(f"reads {here['bandwidth'] / 1e9:.1f} GB/s, multiplies {here['float32'] / 1e9:,.0f} GFLOP/s in float32")
    print(f"Results are kept in {args.to}; remove it to measure everything again.")
    failed = measure(root, args.to / "runs", args.models, args.rounds, args.new_tokens)
    print(f"\n{report(args.to, args.models, here)}\nThe same with a chart, and as JSON: {args.to}")
    for line in failed:
        print(line)
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main(ROOT))
    except KeyboardInterrupt:
        sys.exit(130)
