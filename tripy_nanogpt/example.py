"""GPT-2 on an NVIDIA GPU by nvtripy and TensorRT, or the same executables on a CPU: compile, prefill, decode.

    python example.py --input-text "Do people really like using ONNX?" --seed=1
    python example.py --model gpt2 --quant-mode int8-weight-only

The first run compiles; the next run loads the executables from executables/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tripy_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
import numpy as np

from shared.sampling import Sampler, check_sampling
from shared.tokenizer import Stream, encode_prompt, find_model, load_tokenizer
from tripy_nanogpt.device import DEVICES
from tripy_nanogpt.engine import DTYPES, load
from tripy_nanogpt.files import save_dump
from tripy_nanogpt.model import count_params
from tripy_nanogpt.quantization import CALIBRATED, CNN, OFFLINE, Quantization, modelopt_quantize
from tripy_nanogpt.weight_loader import read_model_hf

# of --verify: differences of logits, relative to the largest; TensorRT's float32 is TF32
LIMITS = {"float32": 5e-3, "float16": 1e-2, "bfloat16": 5e-2}
FLOAT8_LIMIT = 1e-1  # of an activation 4 bits are kept: what float16 rounds away decides some of them


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    prompt = "What is the answer to life, the universe, and everything?"
    add("--prompt", "--input-text", default=prompt, help="(default: %(default)s)")
    model = "gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano if gpt2 is not available)"
    add("--model", "--model-type", help=model)
    add("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=200, help="(default: %(default)s)")
    add("--top-p", type=float, help="nucleus sampling (default: off)")
    add("--seed", type=int, help="for the same text each time")
    add("--dtype", default="float16", choices=DTYPES, help="(default: %(default)s)")
    add("--quant-mode", help="int8-weight-only, int4-weight-only, int4-awq or float8 (also fp8)")
    text = f"{CNN}, or {OFFLINE.name} without a network"
    add("--calibration-data", help=f"for int4-awq and float8: a .txt, a .jsonl or a folder (default: {text})")
    add("--fast", action="store_true", help="on the CPU: multiply quantized weights in low precision")
    add("--device", default="auto", choices=DEVICES, help="(default: %(default)s)")
    add("--no-cache", action="store_true", help="recompute the whole text for each token")
    add("--ignore-eos", action="store_true", help="continue after <|endoftext|>")
    add("--dump", type=Path, metavar="FILE.npz", help="save prompt_ids, tokens and logits of the text")
    add("--verify", action="store_true", help="compare logits with float32 on the CPU; status 1 if they differ")
    return parser


def check(args):
    check_sampling(args.temperature, args.top_k, args.top_p, args.seed)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be 1 or more, got {args.max_new_tokens}")
    check_quantization(args)
    if args.dump and (args.dump.exists() and not args.dump.is_file() or not args.dump.parent.is_dir()):
        raise ValueError(f"--dump must be a file in an existing folder, got {args.dump}")


def check_quantization(args):
    if args.fast and not args.quant_mode:
        raise ValueError("--fast must be given with --quant-mode: it multiplies quantized weights")
    if args.calibration_data and args.quant_mode not in (*CALIBRATED, "fp8"):
        modes = " or ".join(CALIBRATED)
        raise ValueError(f"--calibration-data must be given with --quant-mode {modes}, got {args.quant_mode}")


def generate(args, engine, tokenizer, prompt):
    """Prints the text token by token; saves --dump."""
    end, stream = None if args.ignore_eos else tokenizer.eot, Stream(tokenizer)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    room = engine.config.block_size - len(prompt) + 1  # the last token needs no position: it is not read
    tokens, rows = [], []
    engine.executable("forward" if args.no_cache else "prefill")  # compiles before anything is printed
    print(args.prompt, end="", flush=True)
    for step in range(min(args.max_new_tokens, room)):
        if args.no_cache:
            logits = engine.forward([prompt + tokens])[:, -1]  # 1, V
        else:
            logits = engine.decode(tokens[-1:]) if step else engine.prefill([prompt])  # 1, V
        tokens.append(sampler(logits[0]))
        if args.dump:
            rows.append(logits[0])
        if tokens[-1] == end:
            break
        print(stream.push(tokens[-1]), end="", flush=True)
    else:
        if room < args.max_new_tokens:
            print(f"{stream.end()}\n[the context of {engine.config.block_size} tokens is full]", end="")
    print(stream.end())
    if args.dump:
        save_dump(args.dump, prompt, tokens, rows)


def reference(args, mode, folder, prompt):
    """The logits of transformers in float32 on the CPU, quantized by ModelOpt in a mode: [T, V]."""
    import torch

    model = read_model_hf(folder)
    if mode:
        modelopt_quantize(model, mode, args.calibration_data or CNN)
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].numpy()


def verify(args, engine, folder, prompt):
    """Compares the logits of forward, and of prefill and decode, with transformers'; status 1 if they differ."""
    mode = engine.config.quant_mode
    exact, whose = reference(args, mode, folder, prompt), "ModelOpt" if mode else "the CPU"
    half = (len(prompt) + 1) // 2
    cached = [engine.prefill([prompt[:half]]), *(engine.decode([token]) for token in prompt[half:])]
    ours = {"forward": engine.forward([prompt])[0], "prefill, decode": np.concatenate(cached)}
    limit, passed = FLOAT8_LIMIT if mode == "float8" else LIMITS[args.dtype], True
    for name, logits in ours.items():
        apart = abs(logits - exact[-len(logits) :]).max() / (abs(exact).max() or 1.0)
        good = apart <= limit  # NaN is not
        passed = passed and good
        verdict = "as expected" if good else "NOT as expected"
        distance = f"{apart:.1e} of {whose}'s float32, relative to the largest"
        print(f"{name}: logits are within {distance}: {verdict} (up to {limit:g})")
    return int(not passed)


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack a character
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check(args)
        found = find_model(args.model)
        tokenizer = load_tokenizer(found.folder)
        quantization = Quantization(args.quant_mode, args.calibration_data or CNN, args.fast)
        engine = load(found.folder, args.dtype, args.device, quantization)
        prompt = encode_prompt(tokenizer, args.prompt, engine.config.vocab_size)
        if len(prompt) > engine.config.block_size:
            raise ValueError(f"--prompt must be at most {engine.config.block_size} tokens long, got {len(prompt)}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    mode, why = engine.config.quant_mode, "" if args.model else f"; {found.why}"
    formats = f"{args.dtype}, {mode}" if mode else args.dtype
    parameters = f"{count_params(engine.config) / 1e6:.1f}M parameters"
    print(f"{found.name} ({parameters}, {formats}) on {engine.describe()}{why}", flush=True)
    if engine.calibrated_on:
        print(f"{mode} calibrated on {engine.calibrated_on}", flush=True)
    try:
        if args.verify:
            return verify(args, engine, found.folder, prompt)
        return generate(args, engine, tokenizer, prompt)
    except OSError as error:  # a full disk
        parser.error(str(error))
    finally:
        engine.wait()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
