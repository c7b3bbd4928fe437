"""The pictures of README.md and BENCHMARKS.md, as SVG: the four attentions' code, rooflines, and a run over time.

tests/tools/tables.py writes them into tests/tools/figures: the code is that of each model.py, and the figures are the
benchmark's.
"""

import ast
import html
import keyword
import math
import re
from pathlib import Path
from textwrap import dedent

from tests.tools import roofline

WIDTH = 830  # pixels, of a README on GitHub
INK, LINE_COLOR, PANEL, FILL = "#1f2328", "#8c959f", "#f6f8fa", "#2da44e"
MONO = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", radius: float = 0) -> str:
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}"'
    return f'<rect {shape} fill="{fill}" stroke="{stroke}"/>'


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """kind: bold, small or code, whose text is SVG."""
    text = text if kind == "code" else html.escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}" xml:space="preserve">{text}</text>'


def page(height: float, body: list[str]) -> str:
    style = f"text {{ font: 12px sans-serif; fill: {INK} }} .bold {{ font-weight: bold }} .small {{ font-size: 11px }} "
    style += f".code {{ font: 11px {MONO} }}"
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>'
    return "\n".join([head, box(0, 0, WIDTH, height, "#ffffff"), *body, "</svg>\n"])


def legend(y: float, entries: dict[str, str]) -> list[str]:
    drawn = []
    for number, (color, text) in enumerate(entries.items()):
        x = 8 + 150 * number
        drawn += [box(x, y, 14, 14, color, LINE_COLOR), words(x + 20, y + 11.5, text)]
    return drawn


# -- the code of the four attentions

SHOWN = {  # of each project's model.py
    "tripy_nanogpt": ["CausalSelfAttention.forward"],
    "neuron_nanogpt": ["CausalSelfAttention.attend"],
    "qaic_gpt2": ["CausalSelfAttention.forward", "Scatter.symbolic"],
    "jax_nanogpt": ["update_cache", "attend"],
}
CACHE, MASK = "#fff1c2", "#d6ebff"
MARKS = {  # the color of lines that hold one of these
    CACHE: ("tp.where(at_position", ".scatter(2, index", "Scatter.apply(", '"ScatterND"', "dynamic_update_slice("),
    MASK: ("tp.where(visible", "attn_mask=visible", "torch.where(visible", "jnp.where(visible"),
}
COLORS = {"comment": "#6e7781", "string": "#0a3069", "number": "#0550ae", "word": "#cf222e", "name": "#8250df"}
TOKEN = rf'(?P<comment>#.*)|(?P<string>"[^"]*")|(?P<number>\b\d[\w.]*)|(?P<word>\b(?:{"|".join(keyword.kwlist)})\b)'
TOKEN = re.compile(TOKEN + r"|(?P<name>(?<=\bdef )\w+)")
LETTERS, LINE = 58, 15.5  # of a line of code: its length before it is wrapped, and its height


def source_of(text: str, name: str) -> list[str]:
    """The lines of a function, or of a class's method, without its docstring and decorators."""
    scope = ast.parse(text).body
    for part in name.split("."):
        node = next(node for node in scope if getattr(node, "name", "") == part)
        scope = node.body
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node):
        del lines[scope[0].lineno - node.lineno : scope[0].end_lineno - node.lineno + 1]
    return dedent("\n".join(line for line in lines if line)).splitlines()


def wrap(line: str) -> list[str]:
    """A long line loses its comment, and is wrapped at spaces."""
    more = 8 if line.startswith("def ") else 4
    indent, parts = " " * (len(line) - len(line.lstrip()) + more), []
    line = line if len(line) <= LETTERS else line.partition("  # ")[0]
    while len(line) > LETTERS:
        end = line.rfind(" ", len(indent), LETTERS + 1)
        if end < 0:
            break
        parts.append(line[:end])
        line = indent + line[end + 1 :]
    return [*parts, line]


def highlighted(line: str) -> str:
    def color(token: re.Match) -> str:
        return f'<tspan fill="{COLORS[token.lastgroup]}">{token[0]}</tspan>'

    return TOKEN.sub(color, html.escape(line, quote=False))


def marked_lines(root: Path, project: str) -> list[tuple[str, str | None]]:
    """(line, its mark), with an empty line between functions."""
    text, rows = (root / project / "model.py").read_text(encoding="utf-8"), []
    for name in SHOWN[project]:
        rows += [("", None)] if rows else []
        for line in source_of(text, name):
            mark = next((color for color, parts in MARKS.items() if any(part in line for part in parts)), None)
            rows += [(part, mark) for part in wrap(line)]
    return rows


def draw_attention(root: Path) -> str:
    """Two panels next to each other, and two below."""
    found = {project: marked_lines(root, project) for project in SHOWN}
    projects, body, top, half = list(found), [], 8, WIDTH / 2
    for pair in projects[:2], projects[2:]:
        height = (max(len(found[project]) for project in pair) + 1.9) * LINE
        for number, project in enumerate(pair):
            x, y, width = number * half + 4, top, half - 8
            body += [box(x, y, width, height, PANEL, "#d0d7de", 6), words(x + 8, y + 16, f"{project}/model.py", "bold")]
            for line, mark in found[project]:
                y += LINE
                body += [box(x + 1, y + 8, width - 2, LINE, mark)] if mark else []
                body += [words(x + 8, y + 19, highlighted(line), "code")] if line else []
        top += height + 11
    return page(top + 24, [*body, *legend(top, {CACHE: "the cache update", MASK: "the mask"})])


# -- what the devices allow, and what was measured


def measured(document: dict) -> list[dict]:
    """The projects' rows of GPT-2 124M's shape in float32."""
    rows = [row for row in document["rows"] if row["ours"] and (row["model"], row["dtype"]) == ("gpt2", "float32")]
    return [row for row in rows if row.get("decode")]


def bars(document: dict, work: str) -> list[tuple[str, float, float]]:
    """(name, allowed, measured) in tokens/s. The results are of this CPU alone."""
    limits = [row for row in roofline.rows(roofline.devices(document["machine"])) if row["model"] == "gpt2"]
    limits = [row for row in limits if row["work"] == work]
    half = [row for row in limits if row["precision"] in ("float16", roofline.HALF)]
    here = next(row["tokens_per_s"] for row in limits if row["device"].startswith("this CPU"))
    found = [(row["device"], row["tokens_per_s"], 0) for row in half]
    return found + [(f"this CPU: {row['name']}", here, row[work]["tokens_per_s"]) for row in measured(document)]


def draw_roofline(document: dict) -> str:
    rows, top, width = 24, 40, 200  # of a bar: its row, the first one's place, the longest
    body, height = [], top + rows * len(bars(document, "decode")) + 8
    for work, left, start, decades in ("decode", 205, 10, 3.5), ("prefill", 535, 100, 5):
        body.append(words(left, 26, f"{work}, tokens/s", "bold"))
        for number, (name, allowed, rate) in enumerate(bars(document, work)):
            y, end = top + rows * number, width / decades * math.log10(allowed / start)
            if rate:
                body.append(box(left, y, width / decades * math.log10(rate / start), 18, FILL))
            text = f"{rate:,.0f} of {roofline.short(allowed)}" if rate else roofline.short(allowed)
            body += [box(left, y, end, 18, "none", INK), words(left + end + 5, y + 13, text, "small")]
            body += [words(left - 8, y + 13, name, "small", "end")] if work == "decode" else []
    note = (
        "GPT-2 124M's shape, one text: devices in 16 bits, this CPU in float32. Logarithmic, from 10 and 100 tokens/s."
    )
    key = legend(height + 18, {"#ffffff": "allowed", FILL: "measured"})
    return page(height + 40, [*body, words(8, height + 6, note, "small"), *key])


# -- a run over time

STARTS = {  # what happens before the first token
    "tripy_nanogpt": "trace, compile by TensorRT",
    "neuron_nanogpt": "trace, compile by neuronx-cc",
    "qaic_gpt2": "export, compile by qaic-compile",
    "jax_nanogpt": "trace, compile by XLA",
}
HOST, DEVICE = "#ddf4ff", "#ffe3b8"
PREFILL = 512  # tokens of the prompt: half a context


def labelled(x: float, y: float, width: float, fill: str, *lines: str) -> list[str]:
    """A box with words in its middle."""
    first = y + 20 - 7 * (len(lines) - 1)
    text = [words(x + width / 2, first + 14 * number, line, "small", "middle") for number, line in enumerate(lines)]
    return [box(x, y, width, 32, fill, LINE_COLOR, 3), *text]


def draw_timeline(document: dict) -> str:
    """Two lanes for each stack; the sizes of the boxes mean nothing."""
    rows, body, top = {row["name"]: row for row in measured(document)}, [], 8
    for name, start in STARTS.items():
        if name not in rows:
            continue
        row, host, device = rows[name], top + 24, top + 60
        body += [box(4, top, WIDTH - 8, 100, PANEL, "#d0d7de", 6), words(12, top + 16, name, "bold")]
        body += [words(12, host + 20, "host", "small"), words(12, device + 20, "device", "small")]
        body += labelled(60, host, 205, HOST, start, f"{row['cold_s']:.1f} s cold, {row['warm_s']:.1f} s warm")
        prefill = f"{1000 * PREFILL / row['prefill']['tokens_per_s']:,.0f} ms"
        body += labelled(270, device, 130, DEVICE, f"prefill of {PREFILL}", prefill)
        step = f"{1000 / row['decode']['tokens_per_s']:.1f} ms"
        if name == "jax_nanogpt":  # its loop is in the program
            body += labelled(405, device, 330, DEVICE, "one program: decode and sample each token", f"{step} each")
            body += labelled(740, host, 78, HOST, "text")
        else:
            for x in 405, 540, 675:
                body += labelled(x, host, 60, HOST, "sample")
                body += labelled(x + 65, device, 66, DEVICE, "decode", step)
        top += 108
    note = "Schematic: sizes mean nothing. Times: GPT-2 124M's shape in float32 on a CPU, which is host and device."
    return page(top + 20, [*body, words(8, top + 8, note, "small")])


def draw(root: Path, document: dict) -> dict[str, str]:
    """By the names of their files."""
    drawn = {"roofline.svg": draw_roofline(document), "timeline.svg": draw_timeline(document)}
    return drawn | {"attention.svg": draw_attention(root)}
