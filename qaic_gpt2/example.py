"""GPT-2 through QEfficient's four lines: from_pretrained, export, compile, generate.

    python example.py
    python example.py --model gpt2 --prompt "Hi there!!" --prompt "My name is" --max-new-tokens 50
    python example.py --dtype int8 --temperature 0.8 --top-k 50 --seed 1

On a CPU, the loop over tokens is generate_batch in generation.py; on a card it is QEfficient's own.
"""

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np

from qaic_gpt2 import auto_model, backend, quantizer
from qaic_gpt2.files import ArtifactError, save_dump
from qaic_gpt2.generation import check_context
from qaic_gpt2.weight_loader import count_params, read_config
from shared.sampling import Sampler, check_sampling
from shared.tokenizer import encode_prompt, find_model, load_tokenizer

BITS = {"int8": 8, "int4": 4}
# of --verify: differences of logits, relative to the largest
LIMITS = {"float32": 1e-3, "float16": 1e-2, "int8": 5e-2, "int4": 3e-1}


def make_parser():
    # usage=SUPPRESS: an error is one line
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano if gpt2 is not available)")
    add("--prompt", action="append", help="may be repeated: prompts run as one batch (default: Hi there!!)")
    add("--max-new-tokens", type=int, help="(default: to the end of the context)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int)
    add("--top-p", type=float, help="nucleus sampling (default: off)")
    add("--seed", type=int, default=1337, help="(default: %(default)s)")
    add("--dtype", "--precision", default="float32", choices=[*LIMITS], help="int8, int4: on a CPU (default: float32)")
    add("--device", default="auto", choices=backend.DEVICES, help="(default: %(default)s)")
    add("--ignore-eos", action="store_true", help="continue after <|endoftext|>")
    add("--dump", type=Path, metavar="FILE.npz", help="save prompt_ids, tokens and logits of the first text")
    add("--verify", action="store_true", help="compare logits with float32 on the CPU; status 1 if they differ")
    add("--num-cores", type=int, default=16, help="of the card (default: %(default)s)")
    add("--prefill-seq-len", type=int, help="prompt tokens in one call (default: 128, on a card 32, or ctx-len)")
    add("--ctx-len", type=int, help="slots of the KV cache (default: 128, or more if the text needs them)")
    add("--mxfp6-matmul", action="store_true", help="weights in MXFP6, on a card")
    return parser


def dashed(argv):
    """--max_new_tokens is --max-new-tokens."""
    return [re.sub(r"^--\w[\w-]*(?==|$)", lambda flag: flag[0].replace("_", "-"), word) for word in argv]


def check(args, device):
    if [] in (*vars(args).values(), *args.prompt):  # what argparse makes of --flag=-- before Python 3.13
        raise ValueError("-- must not be the value of a flag")
    check_sampling(args.temperature, args.top_k, args.top_p, args.seed)
    for name in ("max_new_tokens", "num_cores", "prefill_seq_len", "ctx_len"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if args.dump and (args.dump.exists() and not args.dump.is_file() or not args.dump.parent.is_dir()):
        raise ValueError(f"--dump must be a file in an existing folder, got {args.dump}")
    if device == "qaic":
        for flag, value in {"dump": args.dump, "temperature": args.temperature, "ignore-eos": args.ignore_eos}.items():
            if value:
                raise ValueError(f"--{flag} must not be set on a card: QEfficient is greedy, and returns no logits")
        if args.dtype in BITS:
            raise ValueError(f"--dtype must be float32 or float16 on a card, got {args.dtype}: try --mxfp6-matmul")


def compile_settings(args, config, rows, device):
    """compile's keywords. The context holds the text, and QEfficient's 128 tokens if the model has the positions."""
    wanted = max(map(len, rows)) + (args.max_new_tokens or 1)
    ctx_len = args.ctx_len or min(max(128, wanted), config.block_size)
    sizes = {"batch_size": len(rows), "ctx_len": ctx_len}
    sizes["prefill_seq_len"] = args.prefill_seq_len or min(32 if device == "qaic" else 128, ctx_len)
    auto_model.check_sizes(config, **sizes)
    check_context(rows, ctx_len)
    if args.dtype in BITS:
        quantizer.check_blocks(config, BITS[args.dtype])
    return sizes | {"num_cores": args.num_cores, "mxfp6_matmul": args.mxfp6_matmul}


def compile_model(device, folder, dtype, settings):
    """The compiled model."""
    start = time.perf_counter()
    with backend.card_errors(device):
        weights = "float16" if dtype == "float16" else "float32"
        if device == "qaic":
            import torch

            weights = getattr(torch, weights)
        model = backend.choose(device).from_pretrained(str(folder), torch_dtype=weights)
        model.export()
        exported = time.perf_counter()
        model.compile(**settings, **({f"{dtype}_matmul": True} if dtype in BITS else {}))
    times = f"exported in {exported - start:.1f} s, compiled in {time.perf_counter() - exported:.1f} s"
    print(f"{times}: {model.qpc_path}")
    if device == "cpu":
        print(f"engine: {model.session.describe()}")
    return model


def verify(dtype, device, model, exact, rows):
    """The difference of the logits from float32 on the CPU, relative to the largest; status 1 if it is too large."""
    expected = exact.session.prefill(rows)
    with backend.card_errors(device):
        logits = model.session.prefill(rows) if device == "cpu" else backend.card_logits(model.qpc_path, rows)
    apart = np.abs(logits - expected).max() / np.abs(expected).max()
    limit = LIMITS[dtype if device == "cpu" else "float16"]
    verdict = "as expected" if apart <= limit else "NOT as expected"
    print(f"logits are within {apart:.1e} of the CPU's float32, relative to the largest: {verdict} (up to {limit:g})")
    return int(not apart <= limit)  # NaN is not


def cpu_keywords(args, tokenizer):
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    keywords = {"tokenizer": tokenizer, "prompts": args.prompt, "generation_len": args.max_new_tokens}
    return keywords | {"sampler": sampler, "ignore_eos": args.ignore_eos, "return_logits": bool(args.dump)}


def card_keywords(args, folder, room):
    """QEfficient's generate needs Hugging Face's tokenizer and a text, and would run past the end of the context."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [prompt or tokenizer.eos_token for prompt in args.prompt]
    return {"tokenizer": tokenizer, "prompts": prompts, "generation_len": min(args.max_new_tokens or room, room)}


def generate(args, device, model, keywords, row):
    """Prints the first text token by token, then the others; saves --dump."""
    print(f"\n{args.prompt[0]}", end="", flush=True)
    with backend.card_errors(device):
        info = model.generate(**keywords)
    for prompt, text in list(zip(args.prompt, info.generated_texts[0], strict=True))[1:]:
        print("-" * 15 + f"\n{prompt}{text}")
    if args.dump:
        logits = info.logits[0]
        save_dump(args.dump, row, info.generated_ids[0][0, : len(logits)], logits)


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack a character of the text
    parser = make_parser()
    args = parser.parse_args(dashed(sys.argv[1:] if argv is None else argv))
    args.prompt = args.prompt or ["Hi there!!"]
    try:
        device, why = backend.choose_device(args.device)
        check(args, device)
        found = find_model(args.model)
        config, tokenizer = read_config(found.folder), load_tokenizer(found.folder)
        rows = [encode_prompt(tokenizer, prompt, config.vocab_size) for prompt in args.prompt]
        settings = compile_settings(args, config, rows, device)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        with backend.card_errors(device):
            where = backend.describe(device, why) + ("" if args.model else f"; {found.why}")
        print(f"{found.name} ({count_params(config) / 1e6:.1f}M parameters) on {where}", flush=True)
        model = compile_model(device, found.folder, args.dtype, settings)
        if args.verify:
            return verify(args.dtype, device, model, compile_model("cpu", found.folder, "float32", settings), rows)
        room = max(settings["ctx_len"] - max(map(len, rows)), 1)
        keywords = cpu_keywords(args, tokenizer) if device == "cpu" else card_keywords(args, found.folder, room)
        generate(args, device, model, keywords, rows[0])
    except (OSError, ArtifactError, backend.CardError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
