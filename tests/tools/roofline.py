"""The highest tokens/s that a device's datasheet allows (its roofline), for one text at a time.

    python -m tests.tools.roofline

A step takes at least the time to move its bytes to or from the device's memory, and at least the time to multiply; the
longer of the two is the limit. Each step reads all weights once, in the given precision, but of the position embeddings
only one row per token. Decode also reads the KV cache; prefill writes it. A device that keeps weights and cache in
on-chip memory from step to step can be faster than its main memory: a * marks where they would fit.
"""

from typing import NamedTuple


class Model(NamedTuple):
    name: str
    vocabulary: int
    context: int
    layers: int
    width: int


class Device(NamedTuple):
    name: str
    bandwidth: float  # bytes/s
    on_chip: float  # bytes of its largest on-chip memory
    flops: dict[str, float]  # dense FLOP/s by precision: half of the datasheet's figure "with sparsity"
    source: str


MODELS = [
    Model("gpt2-nano", 1408, 256, 4, 256),
    Model("gpt2", 50257, 1024, 12, 768),
    Model("gpt2-medium", 50257, 1024, 24, 1024),
    Model("gpt2-large", 50257, 1024, 36, 1280),
    Model("gpt2-xl", 50257, 1024, 48, 1600),
]
HALF = "bfloat16, float16"
WEIGHT_BYTES = {"float32": 4, "tf32": 4, HALF: 2, "float16": 2, "int8": 1, "float8": 1, "mxfp6": 6.25 / 8, "int4": 0.5}
CACHE_BYTES = {"float32": 4, "tf32": 4}  # 2 in the others

_HOPPER = {"float32": 67e12, "tf32": 494.7e12, HALF: 989.4e12, "int8": 1978.9e12, "float8": 1978.9e12}
_HOPPER |= {"int4": 989.4e12}  # int4 is a format of weights only: they are multiplied in float16
_NVIDIA = "https://www.nvidia.com/en-us/data-center"
_NEURON = "https://awsdocs-neuron.readthedocs-hosted.com/en/latest/about-neuron/arch/neuron-hardware"
_QUALCOMM = "https://quic.github.io/cloud-ai-sdk-pages/latest/Getting-Started/Architecture"
DEVICES = [
    Device("H100 SXM", 3.35e12, 50e6, _HOPPER, f"{_NVIDIA}/h100/"),
    Device("H200 SXM", 4.8e12, 50e6, _HOPPER, f"{_NVIDIA}/h200/"),
    # half of a chip, which has 820 GB/s; 190 TFLOP/s in BF16, FP16, TF32 and cFP8, 47.5 in FP32, 380 TOP/s in INT8
    Device(
        "Trainium: one NeuronCore-v2",
        820e9 / 2,
        24 * 2**20,
        {"float32": 47.5e12 / 2, "tf32": 190e12 / 2, HALF: 190e12 / 2, "int8": 380e12 / 2, "float8": 190e12 / 2},
        f"{_NEURON}/trainium.html",
    ),
    # an eighth of a chip, which has 2.9 TB/s; 667 TFLOP/s in BF16, FP16 and TF32, 181 in FP32, 1,299 in FP8
    Device(
        "Trainium2: one NeuronCore-v3",
        2.9e12 / 8,
        28 * 2**20,
        {"float32": 181e12 / 8, "tf32": 667e12 / 8, HALF: 667e12 / 8, "float8": 1299e12 / 8},
        f"{_NEURON}/trainium2.html",
    ),
    # weights in MXFP6 (6 bits, and 8 for each block of 32) are multiplied in float16; the card has no bfloat16
    Device("Cloud AI 100 Standard", 137e9, 126e6, {"float16": 110e12, "int8": 325e12, "mxfp6": 110e12}, _QUALCOMM),
    Device("Cloud AI 100 Ultra", 548e9, 576e6, {"float16": 290e12, "int8": 870e12, "mxfp6": 290e12}, _QUALCOMM),
]


def devices(here: dict) -> list[Device]:
    """DEVICES and this CPU, as bench.machine measured it. Its caches are not modelled."""
    return [*DEVICES, Device("this CPU, measured", here["bandwidth"], 0, {"float32": here["float32"]}, here["cpu"])]


def work(model: Model, precision: str) -> dict[str, tuple[float, float]]:
    """{"decode" or "prefill": (bytes, FLOPs)} of one step: half a context, or the token after it."""
    _, V, context, L, C = model
    T = context // 2
    matrices = 12 * L * C * C
    weights = WEIGHT_BYTES[precision] * (matrices + V * C + 13 * L * C + 2 * C)
    cache = CACHE_BYTES.get(precision, 2) * 2 * L * C * T
    return {
        "decode": (weights + cache, 2 * (matrices + V * C) + 4 * L * C * (T + 1)),
        "prefill": (
            weights + cache,
            2 * (matrices * T + V * C) + 2 * L * C * T * (T + 1),
        ),  # the head multiplies one row
    }


def rows(devices: list[Device]) -> list[dict]:
    found = []
    for device in devices:
        for precision, flops in device.flops.items():
            for model in MODELS:
                for what, (size, operations) in work(model, precision).items():
                    move, multiply = size / device.bandwidth, operations / flops
                    tokens = 1 if what == "decode" else model.context // 2
                    found.append(
                        {"device": device.name, "precision": precision, "model": model.name, "work": what}
                        | {"limit": "memory" if move >= multiply else "arithmetic"}
                        | {"tokens_per_s": tokens / max(move, multiply), "fits_on_chip": size <= device.on_chip}
                    )
    return found


def table(rows: list[dict], models: list[str] | None = None) -> str:
    """Markdown: limits in tokens/s; m: by memory bandwidth, a: by arithmetic."""
    columns = [(what, name) for what in ("decode", "prefill") for name in models or [model.name for model in MODELS]]
    lines = [
        f"| at most, in tokens/s | precision | {' | '.join(f'{what} {name}' for what, name in columns)} |",
        "|---|---" + "|---" * len(columns) + "|",
    ]
    cells = {((row["device"], row["precision"]), (row["work"], row["model"])): row for row in rows}
    for device, precision in dict.fromkeys(line for line, _ in cells):
        limits = (cells[(device, precision), column] for column in columns)
        shown = (f"{short(row['tokens_per_s'])} {row['limit'][0]}{'*' * row['fits_on_chip']}" for row in limits)
        lines.append(f"| {device} | {precision} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def short(number: float) -> str:
    """Three digits or four: 54,202 is 54.2k."""
    for size, letter in (1e6, "M"), (1e3, "k"):
        if number >= 9.995 * size:
            return f"{number / size:,.{int(number < 99.95 * size)}f}{letter}"
    return f"{number:,.0f}"


def page(devices: list[Device]) -> str:
    """Markdown: the limits, the bytes and FLOPs that they come from, and the sources."""
    lines = [
        "| one step | MB in float32 | in 2 bytes | in 1 byte | in int4 | GFLOP to decode | GFLOP of prefill |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        sizes = (f"{work(model, name)['decode'][0] / 1e6:,.1f}" for name in ("float32", "float16", "int8", "int4"))
        operations = (f"{flops / 1e9:,.3g}" for _, flops in work(model, "float32").values())
        lines.append(f"| {model.name} | {' | '.join(sizes)} | {' | '.join(operations)} |")
    sources = [f"- {device.name}: {device.bandwidth / 1e9:,.1f} GB/s; {device.source}" for device in devices]
    return "\n".join([__doc__.strip(), "", table(rows(devices)), *lines, "", *sources]) + "\n"


if __name__ == "__main__":
    print(page(DEVICES), end="")
