"""GPT-2 through QEfficient's four lines: from_pretrained, export, compile, generate.

    python example.py
    python example.py --model gpt2 --prompt "Hi there!!" --prompt "My name is" --max-new-tokens 50
    python example.py --dtype int8 --temperature 0.8 --top-k 50 --seed 1

On a CPU, the loop over tokens is generate_batch in generation.py; on a card it is QEfficient's own.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qaic_gpt2.cli import Parser  # isort: skip  # first: it names a missing package
import numpy as np

from qaic_gpt2 import auto_model, backend, card, quantizer
from qaic_gpt2.files import ArtifactError, save_dump
from qaic_gpt2.generation import check_context
from qaic_gpt2.weight_loader import count_params, read_config
from shared.sampling import Sampler, check_sampling
from shared.tokenizer import encode_prompt, find_model, load_tokenizer

BITS = {"int8": 8, "int4": 4}
# of --verify: differences of logits, relative to the largest
LIMITS = {"float32": 1e-3, "float16": 1e-2, "int8": 5e-2, "int4": 3e-1}


def make_parser():
    parser = Parser(__doc__)
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
    add("--prefill-seq-len", type=int, help="prompt tokens in one call (default: 128, on a card 32, or ctx-len)")
    add("--ctx-len", type=int, help="slots of the KV cache (default: 128, or more if the text needs them)")
    add("--full-batch-size", type=int, help="continuous batching: so many texts at a time (default: one batch)")
    add("--draft-tokens", type=int, default=0, help="prompt-lookup decoding, on a CPU: tokens of a draft (default: 0)")
    add("--compile-only", action="store_true", help="on a host with the Apps SDK it needs no card")
    card.add_flags(parser)
    return parser


def check(args: argparse.Namespace, device: str) -> None:
    check_sampling(args.temperature, args.top_k, args.top_p, args.seed)
    counts = ("max_new_tokens", "prefill_seq_len", "ctx_len", "full_batch_size", "num_cores", "num_devices")
    for name, least in {**dict.fromkeys(counts, 1), "draft_tokens": 0}.items():
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    if args.verify and args.full_batch_size:
        raise ValueError(f"--full-batch-size must not be set with --verify, got {args.full_batch_size}")
    if args.draft_tokens and (len(args.prompt) > 1 or args.full_batch_size or args.dtype != "float32"):
        raise ValueError(f"--draft-tokens must be 0 but for a single text in float32, got {args.draft_tokens}")
    if args.dump and (args.dump.exists() and not args.dump.is_file() or not args.dump.parent.is_dir()):
        raise ValueError(f"--dump must be a file in an existing folder, got {args.dump}")
    card.check(args, device)
    if device == "qaic" and args.dtype in BITS:
        raise ValueError(f"--dtype must be float32 or float16 on a card, got {args.dtype}: try --mxfp6-matmul")


def compile_settings(args, config, rows, device):
    """compile's keywords. The context holds the text, and QEfficient's 128 tokens if the model has the positions."""
    wanted = max(map(len, rows)) + (args.max_new_tokens or 1)
    ctx_len = args.ctx_len or min(max(128, wanted), config.block_size)
    sizes = {"batch_size": 1 if args.full_batch_size else len(rows), "ctx_len": ctx_len}
    sizes |= {"full_batch_size": args.full_batch_size} if args.full_batch_size else {}
    sizes["prefill_seq_len"] = args.prefill_seq_len or min(32 if device == "qaic" else 128, ctx_len)
    auto_model.check_sizes(config, **sizes)
    check_context(rows, ctx_len)
    if args.dtype in BITS:
        quantizer.check_blocks(config, BITS[args.dtype])
    return sizes | card.compile_keywords(args)


def compile_model(device: str, folder: Path, dtype: str, settings: dict, load: dict):
    """The compiled model. load: more keywords of from_pretrained."""
    start = time.perf_counter()
    with backend.card_errors(device):
        weights = "float16" if dtype == "float16" else "float32"
        if device == "qaic":
            import torch

            weights = getattr(torch, weights)
        cls = card.qefficient() if device == "qaic" else auto_model.QEFFAutoModelForCausalLM
        model = cls.from_pretrained(str(folder), torch_dtype=weights, **load)
        onnx_path = model.export()
        exported = time.perf_counter()
        # without onnx_path QEfficient would export again, to a folder of another name
        model.compile(onnx_path, **settings, **({f"{dtype}_matmul": True} if dtype in BITS else {}))
    times = f"exported in {exported - start:.1f} s, compiled in {time.perf_counter() - exported:.1f} s"
    print(f"{times}: {model.qpc_path}")
    return model


def verify(args: argparse.Namespace, device: str, model, exact, rows: list[list[int]]) -> int:
    """The difference of the logits from float32 on the CPU, relative to the largest; status 1 if it is too large."""
    expected, on_card = exact.session.prefill(rows), device == "qaic"
    with backend.card_errors(device):
        cards = args.device_group
        logits = backend.card_logits(model.qpc_path, rows, cards) if on_card else model.session.prefill(rows)
    apart = np.abs(logits - expected).max() / np.abs(expected).max()
    limit = LIMITS["float16" if on_card else args.dtype]
    verdict = "as expected" if apart <= limit else "NOT as expected"
    print(f"logits are within {apart:.1e} of the CPU's float32, relative to the largest: {verdict} (up to {limit:g})")
    return int(not apart <= limit)  # NaN is not


def cpu_keywords(args: argparse.Namespace, tokenizer) -> dict:
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    keywords = {"tokenizer": tokenizer, "prompts": args.prompt, "generation_len": args.max_new_tokens}
    keywords |= {"sampler": sampler, "ignore_eos": args.ignore_eos, "return_logits": bool(args.dump)}
    return keywords | {"draft_tokens": args.draft_tokens}


def generate(args: argparse.Namespace, device: str, model, keywords: dict, row: list[int]) -> None:
    """Prints each text once, on a CPU the first token by token; saves --dump."""
    if device == "cpu":
        print(f"\n{args.prompt[0]}", end="", flush=True)
    with backend.card_errors(device):
        info = model.generate(**keywords)
    texts, ids = info.generated_texts, info.generated_ids
    if not args.full_batch_size:
        [texts], [ids] = texts, ids
    elif device == "qaic":
        return  # QEfficient has printed them
    for number, (prompt, text) in enumerate(zip(args.prompt, texts, strict=False)):
        if number or device == "qaic":
            print("-" * 15 + f"\n{prompt}{text}")
    if args.dump:
        logits = info.logits[0]
        save_dump(args.dump, row, ids[0, : len(logits)], logits)


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack a character of the text
    parser = make_parser()
    args = parser.parse_args(argv)
    args.prompt = args.prompt or ["Hi there!!"]
    try:
        device, why = backend.choose_device(args.device, args.compile_only)
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
        load = card.load_keywords(args, config)
        model = compile_model(device, found.folder, args.dtype, settings, load)
        if args.compile_only:
            return None
        if device == "cpu":
            print(f"engine: {model.session.describe()}")
        if args.verify:
            return verify(args, device, model, compile_model("cpu", found.folder, "float32", settings, load), rows)
        if device == "cpu":
            keywords = cpu_keywords(args, tokenizer)
        else:
            room = max(settings["ctx_len"] - max(map(len, rows)), 1)
            keywords = card.generate_keywords(args, found.folder, config, room)
        generate(args, device, model, keywords, rows[0])
    except (OSError, ArtifactError, backend.CardError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
