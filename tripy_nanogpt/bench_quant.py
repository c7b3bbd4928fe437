"""What each quantization mode costs and gains; bench.py --quant-modes runs it."""

import json
import math
import time
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from transformers import GPT2LMHeadModel

from shared.tokenizer import find_model, load_tokenizer
from tripy_nanogpt.bench_report import PROMPT_TOKENS, Work
from tripy_nanogpt.engine import load
from tripy_nanogpt.files import write_file
from tripy_nanogpt.quantization import Quantization, modelopt_quantize
from tripy_nanogpt.weight_loader import convert_to_scale

TOKENS = 64  # for the errors of logits
PLOT = Path("quant_modes.png")
# mode; and whether the CPU multiplies its weights in bfloat16, for the perplexity and the errors as for the time
CASES = (
    (None, False),
    ("int8-weight-only", False),
    ("int8-weight-only", True),
    ("int4-weight-only", False),
    ("int4-weight-only", True),
    ("int4-awq", True),
    ("float8", False),
)


def held_out():
    """Windows of tokens of the help texts that gpt2-nano was not trained on."""
    folder = find_model("gpt2-nano").folder
    tokenizer = load_tokenizer(folder)
    names = json.loads((folder / "heldout.json").read_text(encoding="utf-8"))["pydoc_data.topics"]["topics"]
    windows = []
    for name in names:
        ids = [tokenizer.eot, *tokenizer.encode(topics.get(name, ""))]
        windows += [ids[i : i + 257] for i in range(0, len(ids) - 1, 256)]
    return windows


def perplexity(logits_of, windows):
    nats = count = 0
    for ids in windows:
        logits = logits_of(ids[:-1]).astype(np.float64)  # T, V
        largest = logits.max(1)
        norms = largest + np.log(np.exp(logits - largest[:, None]).sum(1))
        nats += (norms - logits[np.arange(len(logits)), ids[1:]]).sum()
        count += len(logits)
    return math.exp(nats / count)


def cached_logits(engine, ids):
    """Logits after each of ids, (T, V), from the KV cache."""
    return np.concatenate([engine.prefill([ids[:1]]), *(engine.decode([token]) for token in ids[1:])])


def decode(engine, ids):
    """The decode steps alone: prefill would hide how the modes differ."""
    engine.position = PROMPT_TOKENS
    for token in ids:
        engine.decode([token])


def usual_int4_perplexity(windows):
    """gpt2-nano in the usual loader's int4: scales along the output, and without AWQ's factor on the inputs."""
    model = GPT2LMHeadModel.from_pretrained(find_model("gpt2-nano").folder, dtype=torch.float32).eval()
    modelopt_quantize(model, "int4-awq")
    for layer in model.modules():
        if hasattr(layer, "weight_quantizer") and layer.weight_quantizer.is_enabled:
            amax = layer.weight_quantizer.amax.reshape(-1, layer.in_features)
            scale = convert_to_scale(amax, 7).repeat_interleave(layer.out_features // len(amax), 0)
            layer.weight.data = (layer.weight / scale).round().clamp(-8, 7) * scale
            layer.weight_quantizer.disable()
            layer.input_quantizer.disable()
            layer.input_quantizer._pre_quant_scale = None

    def logits_of(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    return perplexity(logits_of, windows)


def bench_quant_modes(report, name, folder, new, executables):
    windows = held_out()
    ids, steps = windows[0][:TOKENS], windows[0][PROMPT_TOKENS:][: min(new, 32)]
    plain = load(folder, "float32", executables=executables)
    exact, points = cached_logits(plain, ids), []
    for mode, fast in CASES:
        if fast and not report.on_cpu:
            continue
        load_mode = partial(load, dtype="float32", quantization=Quantization(mode, fast=fast), executables=executables)
        start = time.perf_counter()
        engine = load_mode(folder)
        engine.load_model()
        quantize_s = time.perf_counter() - start
        logits = cached_logits(engine, ids)
        nano = load_mode(find_model("gpt2-nano").folder)
        ppl, size = nano_perplexity_and_bytes(nano, windows)
        points.append((f"{mode or 'float32'}{', bfloat16' * fast}", size, ppl))
        extra = {
            "quant_mode": mode or "none",
            "perplexity": round(ppl, 4),
            "relative_error": float(np.linalg.norm(logits - exact) / np.linalg.norm(exact)),
            "top1_agreement": float((logits.argmax(1) == exact.argmax(1)).mean()),
            "weight_bytes": executable_bytes(engine),
            "quantize_s": round(quantize_s, 1),
            "engine": engine.describe().partition(": ")[2],
        }
        work = f"decode_{mode}{'_fast' * fast}" if mode else "decode"
        work = Work(work, name, "bfloat16" if fast else "float32", PROMPT_TOKENS, len(steps))
        peer = partial(decode, plain, steps) if mode else None
        report.add(work, partial(decode, engine, steps), peer, "float32", **extra)
        print(
            f"  gpt2-nano's perplexity {ppl:.3f}; {name}'s logits {extra['relative_error']:.1e} from float32's, "
            f"the largest is the same in {extra['top1_agreement']:.0%}; {extra['weight_bytes'] / 1e6:,.0f} MB; "
            f"quantized in {quantize_s:.0f} s",
            flush=True,
        )
    print(f"int4 by the usual loader: gpt2-nano's perplexity {usual_int4_perplexity(windows):.3f}", flush=True)
    draw(points)
    print(f"perplexity against bytes: {PLOT.resolve()}")


def nano_perplexity_and_bytes(nano, windows):
    ppl = perplexity(lambda ids: nano.forward([ids])[0], windows)
    nano.prefill([[0]])
    nano.decode([0])  # compiles the executable whose size is reported
    return ppl, executable_bytes(nano)


def executable_bytes(engine):
    """The decode executable's: its weights, embeddings included."""
    return (engine.folder / "decode.executable").stat().st_size


def draw(points):
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label, size, ppl in points:
        axes.scatter(size / 1e6, ppl)
        axes.annotate(label, (size / 1e6, ppl), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="MB", ylabel="perplexity on held-out text", title="gpt2-nano")
    write_file(PLOT, partial(figure.savefig, format="png", dpi=120, bbox_inches="tight"))
