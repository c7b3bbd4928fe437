"""The tables and the chart of a benchmark's results, and where the documents show them.

    python -m tests.tools.tables [results/bench/bench.json]

That copies the results to tests/tools/figures, draws the chart there, and writes the tables into BENCHMARKS.md and the
READMEs: each after the line <!-- figures: NAME -->. Without an argument it takes the results kept there. It draws the
pictures of pictures.py too.
A link to a line of code, [`code`](file#L12), gets the number of the line that holds the code.
"""

import json
import re
import sys
from pathlib import Path

from tests.conventions.rules import ROOT, projects
from tests.tools import pictures, roofline, training

FIGURES = ROOT / "tests" / "tools" / "figures"
TITLES = {"gpt2-nano": "gpt2-nano, 3.6M parameters", "gpt2": "GPT-2 124M's shape"}
WIDTHS = {"float32": "o", "bfloat16": "s", "float16": "D", "float8": "P", "int8": "^", "int4": "v"}
NAMES = {
    "ctranslate2": "CTranslate2",
    "llama": "llama.cpp",
    "onnxruntime": "onnxruntime, fused operators",
    "openvino": "OpenVINO",
}
COLUMNS = ["decode, tokens/s", "of the bandwidth", "prefill, tokens/s", "cold start", "warm start", "memory"]
OPTIONAL = {"perplexity": "perplexity", "with one busy core": "busy_core"}  # and what the results call them
COLUMNS += OPTIONAL
LINK = re.compile(r"\[`([^`]+)`\]\(([\w./-]+)#L\d+\)")
MARKER = re.compile(r"(?<=<!-- figures: )([\w-]+)( -->\n)((?:\|.*\n)*)")


def title(row: dict) -> str:
    name = NAMES.get(row["name"], row["name"])
    return name if row["dtype"] == row["width"] else f"{name}, {row['dtype']}"


def rate(figures: dict | None, unit: str = "") -> str:
    if not figures:
        return ""
    ratio = "" if figures["ratio"] is None else f" ({figures['ratio']:.2f} ×)"
    return f"{figures['tokens_per_s']:,.{1 if figures['tokens_per_s'] < 200 else 0}f}{unit}{ratio}"


def line(row: dict) -> str:
    """For the terminal."""
    if "error" in row:
        return f"{title(row)}: {row['error']}"
    return (
        f"{title(row):40} decode {rate(row['decode'], ' tokens/s')}, {row['of_bandwidth']:.2f} of the bandwidth; "
        f"prefill {rate(row['prefill'], ' tokens/s')}"
    )


def cells(row: dict, all_rows: list[dict]) -> list[str]:
    if "error" in row:
        return [row["error"], *[""] * (len(COLUMNS) - 1)]
    same = [other for other in all_rows if all(other.get(key) == row[key] for key in ("name", "dtype"))]
    perplexity = next((other["perplexity"] for other in same if "perplexity" in other), None)
    return [
        rate(row["decode"]),
        f"{row['of_bandwidth']:.2f}",
        rate(row["prefill"]),
        f"{row['cold_s']:.1f} s",
        f"{row['warm_s']:.1f} s",
        f"{row['peak_mb']:,} MB",
        "" if perplexity is None else f"{perplexity:.3f}",
        rate(row.get("busy_core")),
    ]


def markdown(head: list[str], rows: list[list[str]], results: list[dict] | None = None) -> str:
    """Without columns of what the results do not have."""
    missing = {name for name, key in OPTIONAL.items() if results and not any(row.get(key) for row in results)}
    kept = [number for number, name in enumerate(head) if name not in missing]
    head, *rows = ([row[number] for number in kept] for row in [head, *rows])
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows]).replace("|  |", "| |")


def engines_table(rows: list[dict], model: str, width: str) -> str:
    """The fastest first; what failed, last."""
    chosen = [row for row in rows if (row["model"], row["width"]) == (model, width)]
    chosen.sort(key=lambda row: -row["decode"]["tokens_per_s"] if row["decode"] else 0)
    lines = [[f"**{title(row)}**" if row["ours"] else title(row), *cells(row, rows)] for row in chosen]
    return markdown(["", *COLUMNS], lines, rows)


def project_table(rows: list[dict], name: str) -> str:
    """One project's rows."""
    chosen = [row for row in rows if row["name"] == name]
    lines = [[TITLES[row["model"]], row["dtype"], *cells(row, rows)] for row in chosen]
    return markdown(["", "dtype", *COLUMNS], lines, rows)


def summary_table(rows: list[dict]) -> str:
    """GPT-2 124M's shape: the highest decode rate of each engine, by width."""
    rows = [row for row in rows if row["model"] == "gpt2"]
    widths = [width for width in WIDTHS if any(row["width"] == width for row in rows)]
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["decode"]:
            best = found.setdefault(row["name"], {}).get(row["width"])
            if best is None or row["decode"]["tokens_per_s"] > best["tokens_per_s"]:
                found[row["name"]][row["width"]] = row["decode"]
    ours = {row["name"] for row in rows if row["ours"]}
    lines = [
        [f"**{name}**" if name in ours else NAMES.get(name, name), *(rate(found[name].get(width)) for width in widths)]
        for name in sorted(found, key=lambda name: (name not in ours, name))
    ]
    return markdown(["decode, tokens/s", *widths], lines)


def tables(document: dict) -> dict[str, str]:
    """By the name that the documents' markers have."""
    rows, found = document["rows"], {}
    for model in TITLES:
        for width in WIDTHS:
            if any((row["model"], row["width"]) == (model, width) for row in rows):
                found[f"{model}-{width}"] = engines_table(rows, model, width)
    found["summary"] = summary_table(rows)
    found |= {name: project_table(rows, name) for name in sorted({row["name"] for row in rows if row["ours"]})}
    found["training"] = training.table(document["training"])
    found["gpu"] = gpu_table(json.loads((FIGURES / "gpu.json").read_text(encoding="utf-8")))
    found["machine"] = machine_table(document["machine"])
    limits = roofline.rows(roofline.devices(document["machine"]))
    limits = [row for row in limits if row["precision"] in ("float32", "float16", roofline.HALF)]
    return found | {"roofline": roofline.table(limits, ["gpt2", "gpt2-xl"])}


def gpu_table(document: dict) -> str:
    """What jax_nanogpt/benchmarks/gpu.py measured on a GPU."""
    lines = [
        [
            document["device"],
            row["work"],
            str(row["batch"]),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tflops']:.0f} TFLOP/s, MFU {row['mfu']:.1%}",
            f"{row['ratio']:.2f} × {row['peer']}",
            f"{document['date']}, {document['versions'].partition(',')[0]}",
        ]
        for row in document["results"]
    ]
    return markdown(["GPU", "work", "batch", "tokens/s", "arithmetic", "vs", "measured"], lines)


def machine_table(here: dict) -> str:
    rates = f"reads {here['bandwidth'] / 1e9:.1f} GB/s, multiplies {here['float32'] / 1e9:,.0f} GFLOP/s in float32"
    line = [here["cpu"], str(here["cores"]), ", ".join(here["instruction_sets"]), rates, here["date"]]
    return markdown(["CPU", "cores", "instruction sets", "rates", "date"], [line])


def fill(text: str, found: dict[str, str], folder: Path) -> str:
    """The document with the tables after its markers, and its links to lines of code."""
    text = LINK.sub(lambda match: f"{match[0].rpartition('L')[0]}L{line_of(folder / match[2], match[1])})", text)
    return MARKER.sub(lambda match: f"{match[1]}{match[2]}{found[match[1]]}", text)


def line_of(path: Path, code: str) -> int:
    """The first line that holds the code."""
    lines = path.read_text(encoding="utf-8").splitlines()
    numbers = [number for number, text in enumerate(lines, 1) if code in text]
    if not numbers:
        raise ValueError(f"{path} does not hold {code!r}, to which a document links")
    return numbers[0]


def documents(root: Path) -> list[Path]:
    return [root / "README.md", root / "BENCHMARKS.md", *(root / name / "README.md" for name in projects(root))]


def write(folder: Path, document: dict) -> str:
    """bench.json, bench.md and bench.png; returns the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f'"{key}": {json.dumps(document[key])}' for key in document if not isinstance(document[key], list)]
    lists = {key: ",\n".join(map(json.dumps, document[key])) for key in document if isinstance(document[key], list)}
    parts += [f'"{key}": [\n{lines}\n]' for key, lines in lists.items()]
    (folder / "bench.json").write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
    text = "\n".join(f"{name}\n\n{table}" for name, table in tables(document).items())
    (folder / "bench.md").write_text(text, encoding="utf-8")
    draw(folder / "bench.png", document)
    return text


def draw(path: Path, document: dict) -> None:
    """Decode rates over the bytes of weights that a token reads, under the line of the memory bandwidth."""
    rows = [row for row in document["rows"] if row["model"] == "gpt2" and row["decode"]]
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["name"] for row in rows))}
    filled = {row["name"]: colors[row["name"]] if row["ours"] else "none" for row in rows}
    figure, panel = plt.subplots(figsize=(8.3, 5.2), layout="constrained")
    for row in rows:
        style = {"mec": colors[row["name"]], "color": filled[row["name"]], "ms": 9, "mew": 1.6}
        panel.loglog(row["step_bytes"] / 1e6, row["decode"]["tokens_per_s"], WIDTHS[row["width"]], **style)
    bandwidth = document["machine"]["bandwidth"]
    sizes = [row["step_bytes"] / 1e6 for row in rows]
    ends = [min(sizes) / 1.3, max(sizes) * 1.3]
    panel.loglog(ends, [bandwidth / 1e6 / size for size in ends], "k--", lw=1)
    label(panel, bandwidth)
    handles = [
        plt.Line2D([], [], color=filled[name], mec=color, mew=1.6, marker="o", lw=0, label=NAMES.get(name, name))
        for name, color in colors.items()
    ]
    shown = {row["width"] for row in rows}
    shape = {"color": "none", "mec": "black", "lw": 0}
    handles += [plt.Line2D([], [], marker=WIDTHS[width], label=width, **shape) for width in WIDTHS if width in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def label(panel, bandwidth: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    for axis in panel.xaxis, panel.yaxis:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    panel.grid(alpha=0.3)
    panel.set_xlabel("weights that a token reads, MB")
    panel.set_ylabel("decode, tokens/s")
    panel.set_title(f"GPT-2 124M's shape; dashed: the memory's {bandwidth / 1e9:.0f} GB/s", fontsize=10)


def main(root: Path, results: str | None = None) -> None:
    if results:
        document = json.loads(Path(results).read_text(encoding="utf-8"))
        write(FIGURES, document)
    else:
        document = json.loads((FIGURES / "bench.json").read_text(encoding="utf-8"))
    for name, picture in pictures.draw(root, document).items():
        (FIGURES / name).write_text(picture, encoding="utf-8")
    (FIGURES / "roofline.md").write_text(roofline.page(roofline.devices(document["machine"])), encoding="utf-8")
    found = tables(document)
    for path in documents(root):
        path.write_text(fill(path.read_text(encoding="utf-8"), found, path.parent), encoding="utf-8")


if __name__ == "__main__":
    main(ROOT, *sys.argv[1:])
