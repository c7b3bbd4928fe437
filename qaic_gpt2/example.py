"""GPT-2 through QEfficient's four lines: from_pretrained, export, compile, generate.

python example.py
python example.py --model gpt2 --prompt "Hi there!!" --prompt "My name is" --max-new-tokens 50
python example.py --dtype int8 --temperature 0.8 --top-k 50 --seed 1
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import fail, script, start_script

start_script(__name__)
import numpy as np
import torch

from qaic_gpt2 import backend, generation, weight_loader
from qaic_gpt2.files import write_file
from shared.sampling import Sampler
from shared.tokenizer import find_model, load_tokenizer


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("--model", help="gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano where that is not there)")
    add("--prompt", action="append", help="may be repeated: prompts run as one batch (default: Hi there!!)")
    add("--max-new-tokens", type=int, help="(default: to the end of the context)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--seed", type=int, default=1337, help="(default: %(default)s)")
    add(
        "--dtype",
        "--precision",
        default="float32",
        choices=["float32", "float16", "int8"],
        help="int8 is for a CPU (default: %(default)s)",
    )
    add("--device", default="auto", help="auto, cpu or qaic (default: %(default)s)")
    add("--dump", type=Path, metavar="FILE.npz", help="save prompt_ids, tokens and logits of the first prompt")
    add("--ignore-eos", action="store_true", help="go on after <|endoftext|>")
    add("--num-cores", type=int, default=16, help="of the card (default: %(default)s)")
    add("--prefill-seq-len", type=int, help="tokens of a prompt at once (default: 32, or ctx_len where it is less)")
    add("--ctx-len", type=int, help="slots of the cache (default: 128, or more where the text needs them)")
    add("--mxfp6-matmul", action="store_true", help="weights in MXFP6, on the card")
    add("--verify", action="store_true", help="compare the logits here, in --dtype, with the CPU's in float32; no text")
    return parser.parse_args(argv)


def check(args, device):
    """What no later step would refuse in one line."""
    Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    for name in ("max_new_tokens", "num_cores", "prefill_seq_len", "ctx_len"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if args.dump and (args.dump.exists() and not args.dump.is_file() or not args.dump.parent.is_dir()):
        raise ValueError(f"dump must be a file in a folder that exists, got {args.dump}")
    if device == "qaic":
        unserved = {"dump": args.dump, "temperature": args.temperature, "ignore_eos": args.ignore_eos}
        for name, value in unserved.items():
            if value:
                raise ValueError(f"{name} must not be set on a card, got {value}: QEfficient is greedy, without logits")
        if args.dtype == "int8":
            raise ValueError("dtype must be float32 or float16 on a card, got int8: --mxfp6-matmul makes weights small")


def make(device, folder, args, ctx_len, dtype):
    """A compiled model, and the seconds that export and compile took."""
    start = time.perf_counter()
    weights = torch.float16 if dtype == "float16" else torch.float32
    model = backend.choose(device).from_pretrained(str(folder), torch_dtype=weights)
    model.export()
    exported = time.perf_counter()
    only_cpu = {"int8_matmul": True} if dtype == "int8" else {}
    model.compile(
        num_cores=args.num_cores,
        prefill_seq_len=args.prefill_seq_len or min(32, ctx_len),
        ctx_len=ctx_len,
        batch_size=len(args.prompt),
        mxfp6_matmul=args.mxfp6_matmul,
        **only_cpu,
    )
    return model, exported - start, time.perf_counter() - exported


def verify(model, exact, device, prompts, dtype):
    """How far the logits behind prompts are from those of exact, in float32 on the CPU, as a part of the largest."""
    expected = exact.session.prefill(prompts)
    logits = backend.card_logits(model.qpc_path, prompts) if device == "qaic" else model.session.prefill(prompts)
    apart = np.abs(logits - expected).max() / np.abs(expected).max()
    limit = {"float32": 1e-3, "float16": 1e-2, "int8": 5e-2}["float16" if device == "qaic" else dtype]
    near = bool(apart <= limit)  # NaN is not
    verdict = "as expected" if near else "NOT as expected"
    print(f"logits are within {apart:.1e} of the CPU's float32, relative to the largest: {verdict} (up to {limit:g})")
    sys.exit(int(not near))


def generate(model, args, device, folder, tokenizer, room):
    if device == "cpu":
        sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
        settings = {"generation_len": args.max_new_tokens, "sampler": sampler, "ignore_eos": args.ignore_eos}
        return model.generate(tokenizer, args.prompt, return_logits=bool(args.dump), **settings)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [prompt or tokenizer.eos_token for prompt in args.prompt]
    return model.generate(tokenizer=tokenizer, prompts=prompts, generation_len=min(args.max_new_tokens or room, room))


def save(arrays, path):
    with path.open("wb") as file:  # by its name, NumPy would add .npz
        np.savez(file, **arrays)


@script
def main(argv=None):
    args = parse_arguments(argv)
    args.prompt = args.prompt or ["Hi there!!"]
    device, why = backend.choose_device(args.device)
    try:
        check(args, device)
        found = find_model(args.model)
        config, tokenizer = weight_loader.read_config(found.folder), load_tokenizer(found.folder)
        prompts = [generation.encode(tokenizer, prompt) for prompt in args.prompt]
        longest = max(map(len, prompts))
        ctx_len = args.ctx_len or min(max(128, longest + (args.max_new_tokens or 1)), config.n_positions)
        if longest > ctx_len:
            raise ValueError(f"prompt must have at most ctx_len ({ctx_len}) tokens, got {longest}")
        size, reason = weight_loader.count_parameters(found.folder), "" if args.model else f"; {found.why}"
        print(f"{found.name} ({size / 1e6:.1f}M parameters) on {backend.describe(device, why)}{reason}", flush=True)
        model, export_s, compile_s = make(device, found.folder, args, ctx_len, args.dtype)
        print(f"exported in {export_s:.1f} s, compiled in {compile_s:.1f} s: {model.qpc_path}")
        if device == "cpu" and model.session.casts_float16:
            print("float16 is computed in float32: onnxruntime has no float16 kernels for this CPU")
        if args.verify:  # beside the CPU's float32, also where that is what ran
            exact, *_ = make("cpu", found.folder, args, ctx_len, "float32")
            verify(model, exact, device, prompts, args.dtype)
        print(f"\n{args.prompt[0]}", end="", flush=True)
        info = generate(model, args, device, found.folder, tokenizer, max(ctx_len - longest, 1))
    except (RuntimeError, ImportError) as error:
        if device == "cpu":
            raise
        fail(f"QEfficient: {' '.join(str(error).split())}")  # the compiler's words, as where the SDK is another version
    for prompt, text in list(zip(args.prompt, info.generated_texts[0], strict=True))[1:]:
        print("-" * 15 + f"\n{prompt}{text}")
    if args.dump:
        made = info.logits[0]
        dump = {"prompt_ids": np.array(prompts[0]), "tokens": info.generated_ids[0][0, : len(made)]}
        write_file(args.dump, partial(save, dump | {"logits": np.stack(made)}))


if __name__ == "__main__":
    main()
