"""What each quantization mode costs and gains; bench.py --quant-modes runs it."""

import json
import math
import time
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from transformers import GPT2LMHeadModel

from shared.tokenizer import find_model, load_tokenizer
from tripy_nanogpt.device import choose_device
from tripy_nanogpt.engine import load_engine
from tripy_nanogpt.files import write_beside
from tripy_nanogpt.quantization import modelopt_quantize
from tripy_nanogpt.weight_loader import convert_to_scale

TOKENS = 64  # for the errors of logits
PLOT = Path("quant_modes.png")
# mode, and whether the CPU multiplies its weights in bfloat16, in the perplexity and the errors as in what is timed
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
        logits = logits_of(ids[:-1]).astype(np.float64)
        largest = logits.max(1)
        norms = largest + np.log(np.exp(logits - largest[:, None]).sum(1))
        nats += (norms - logits[np.arange(len(logits)), ids[1:]]).sum()
        count += len(logits)
    return math.exp(nats / count)


def by_steps(engine, ids):
    """Logits at each of ids, by the cache."""
    logits, cache = engine.prefill(ids[:1])
    rows = [logits]
    for position in range(1, len(ids)):
        logits, cache = engine.decode(ids[position], position, cache)
        rows.append(logits)
    return np.stack(rows)


def decode(engine, cache, ids):
    """The steps alone: those of the modes differ, and what is before them hides that."""
    for position, token in enumerate(ids, 16):
        _, cache = engine.decode(token, position, cache)


def usual_int4(ids, model):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def usual_loader():
    """gpt2-nano's perplexity in the usual loader's int4: scales along the output, AWQ's factor on inputs left out."""
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
    return perplexity(partial(usual_int4, model=model), held_out())


def bench_quant_modes(report, name, folder, new, executables):
    windows, count = held_out(), min(new, 32)
    ids = windows[0][:TOKENS]
    plain = load_engine(folder, "float32", choose_device("auto"), folder=executables)
    exact = by_steps(plain, ids)
    points = []
    for mode, fast in CASES:
        if fast and not report.on_cpu:
            continue
        device = choose_device("auto", fast)
        start = time.perf_counter()
        engine = load_engine(folder, "float32", device, mode, folder=executables)
        quantize_s = time.perf_counter() - start
        logits = by_steps(engine, ids)
        nano = load_engine("gpt2-nano", "float32", device, mode, folder=executables)
        ppl = perplexity(nano.forward, windows)
        nano.decode(0, 1, nano.prefill([0])[1])  # so that it is compiled, and can be weighed
        more = {
            "quant_mode": mode or "none",
            "perplexity": round(ppl, 4),
            "relative_error": float(np.linalg.norm(logits - exact) / np.linalg.norm(exact)),
            "top1_agreement": float((logits.argmax(1) == exact.argmax(1)).mean()),
            "weight_bytes": weigh(engine),
            "quantize_s": round(quantize_s, 1),
            "engine": device.partition(": ")[2],
        }
        points.append((f"{mode or 'float32'}{', bfloat16' * fast}", weigh(nano), ppl))
        ours, peer = (
            partial(decode, each, each.prefill(ids[:16])[1], ids[16 : 16 + count]) for each in (engine, plain)
        )
        work = f"decode_{mode}{'_fast' * fast}" if mode else "decode"
        dtype = "bfloat16" if fast else "float32"
        report.add(work, name, dtype, 16, count, ours, peer if mode else None, "float32", **more)
        print(
            f"  gpt2-nano's perplexity {ppl:.3f}; {name}'s logits {more['relative_error']:.1e} from float32's, "
            f"the largest is the same in {more['top1_agreement']:.0%}; {more['weight_bytes'] / 1e6:,.0f} MB; "
            f"quantized in {quantize_s:.0f} s",
            flush=True,
        )
    choose_device("auto")
    print(f"int4 by the usual loader: gpt2-nano's perplexity {usual_loader():.3f}", flush=True)
    draw(points)
    print(f"perplexity against bytes: {PLOT.resolve()}")


def weigh(engine):
    """Bytes of an executable, which are its weights, the embeddings among them."""
    return (engine.folder / "decode.executable").stat().st_size


def draw(points):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label, size, ppl in points:
        axes.scatter(size / 1e6, ppl)
        axes.annotate(label, (size / 1e6, ppl), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="MB", ylabel="perplexity on held-out text", title="gpt2-nano")
    write_beside(PLOT, partial(figure.savefig, format="png", dpi=120, bbox_inches="tight"))
