"""Continue a text with GPT-2, run by nvtripy.

python example.py --input-text "Do people really like using ONNX?" --seed=1
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import fail, script, start_script

start_script(__name__)
import numpy as np

from shared.sampling import Sampler, check_sampling
from shared.tokenizer import Stream, find_model, load_tokenizer

# how far logits may be from those of the CPU in float32, as a part of the largest; TensorRT multiplies float32 in TF32
LIMITS = {"float32": 5e-3, "float16": 1e-2, "bfloat16": 5e-2}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("--input-text", default="What is the answer to life, the universe, and everything?", help="the prompt")
    add("--model-type", "--model", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt2-nano or a folder")
    add("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=200, help="(default: %(default)s)")
    add("--top-p", type=float)
    add("--seed", type=int, help="for the same text each time")
    add("--dtype", default="float16", choices=LIMITS, help="(default: %(default)s)")
    add("--quant-mode", help="int8-weight-only, int4-weight-only, int4-awq, or float8, which is fp8 too")
    add(
        "--calibration-data",
        default="cnn_dailymail",
        help="a .txt, a .jsonl or a folder, for int4-awq and float8 (default: %(default)s, else text from here)",
    )
    add("--fast", action="store_true", help="on the CPU: multiply quantized weights in bfloat16")
    add("--device", default="auto", help="auto, cpu or gpu (default: %(default)s)")
    add("--no-cache", action="store_true", help="compute the whole text anew for each token")
    add("--dump", type=Path, metavar="FILE.npz", help="save prompt_ids, tokens and logits")
    add("--ignore-eos", action="store_true", help="go on after <|endoftext|>")
    add("--verify", action="store_true", help="compare the logits with those of transformers in float32; no text")
    return parser.parse_args(argv)


def verify(engine, dtype, folder, ids):
    """How far the logits are from those of transformers on the CPU in float32, as a part of the largest."""
    import torch
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.no_grad():
        exact = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0].numpy()
    half = (len(ids) + 1) // 2
    logits, cache = engine.prefill(ids[:half])
    rows = [logits]
    for position in range(half, len(ids)):
        logits, cache = engine.decode(ids[position], position, cache)
        rows.append(logits)
    apart = {"forward": engine.forward(ids) - exact, "prefill, decode": rows - exact[half - 1 :]}
    largest, limit = abs(exact).max() or 1.0, LIMITS[dtype]
    shares = {name: abs(part).max() / largest for name, part in apart.items()}
    for name, share in shares.items():
        verdict = "as expected" if share <= limit else "NOT as expected"
        print(f"{name}: logits within {share:.1e} of the largest: {verdict} (up to {limit:g})")
    sys.exit(int(not all(share <= limit for share in shares.values())))  # NaN is not


def save(path, **arrays):
    with path.open("wb") as file:  # by its name, NumPy would add .npz
        np.savez(file, **arrays)


@script
def main(argv=None):
    args = parse_arguments(argv)
    check_sampling(args.temperature, args.top_k, args.top_p, args.seed)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}, 1 or more is expected")
    if args.dump and (args.dump.exists() and not args.dump.is_file() or not args.dump.parent.is_dir()):
        raise ValueError(f"--dump is {args.dump}, a file in a folder that exists is expected")
    name, folder, why = find_model(args.model_type)
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode(args.input_text) or [tokenizer.eot]
    if prompt == [None]:
        raise ValueError("prompt must not be empty: this model has no <|endoftext|>")

    # here, for they take two seconds that a mistake above need not wait for
    from tripy_nanogpt.device import choose_device
    from tripy_nanogpt.engine import load_engine
    from tripy_nanogpt.files import write_beside
    from tripy_nanogpt.quantization import check_mode
    from tripy_nanogpt.weight_loader import read_config

    mode = check_mode(args.quant_mode) if args.quant_mode else None
    device = choose_device(args.device, args.fast)
    config = read_config(folder, quant_mode=mode)
    size = config.block_size
    if len(prompt) > size:
        raise ValueError(f"--input-text is {len(prompt)} tokens long, at most {size} fit into {name}'s context")
    what = f"{config.count_parameters() / 1e6:.1f}M parameters, {', '.join(filter(None, (args.dtype, mode)))}"
    print(f"{name} ({what}) on {device}{'' if args.model_type else f'; {why}'}", flush=True)
    engine = load_engine(folder, args.dtype, device, mode, args.calibration_data)
    engine.executable("forward" if args.no_cache else "prefill")
    if engine.calibrated_on:
        print(f"{mode} calibrated on {engine.calibrated_on}", flush=True)

    if args.verify:
        verify(engine, args.dtype, folder, prompt)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    stream, tokens, rows = Stream(tokenizer), [], []
    print(args.input_text, end="", flush=True)
    for token, logits in engine.generate(prompt, args.max_new_tokens, sampler, cached=not args.no_cache):
        tokens.append(token)
        if args.dump:
            rows.append(logits)
        if token == tokenizer.eot and not args.ignore_eos:
            break
        print(stream.push(token), end="", flush=True)
    else:
        if len(tokens) < args.max_new_tokens:
            print(f"{stream.end()}\n[the context of {size} tokens is full]", end="")
    print(stream.end())
    if args.dump:
        arrays = {"prompt_ids": np.array(prompt), "tokens": np.array(tokens), "logits": np.array(rows)}
        write_beside(args.dump, partial(save, **arrays))


if __name__ == "__main__":
    main()
