"""Continue a text: with the best checkpoint in train.py's --out_dir, or with a GPT-2.

python sample.py --out_dir=out-shakespeare-char
python sample.py --init_from=gpt2 --start="What is the answer to life?" --num_samples=5
"""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jax_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
import jax
import numpy as np

from jax_nanogpt import sampler, weight_loader
from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.files import save_dump
from jax_nanogpt.kernels import unpack
from jax_nanogpt.model import GPT, count_params
from jax_nanogpt.runtime import DEVICES, choose_devices, describe
from jax_nanogpt.sampler import Sampling
from shared.sampling import check_sampling
from shared.tokenizer import BPE, Characters, Stream, encode_prompt, find_model, load_tokenizer

# of --verify: differences of logits, relative to the largest
LIMITS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2, "int8": 5e-2}


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", "--init-from", help="resume (the best checkpoint in --out-dir), gpt2, ..., gpt2-nano or a folder")
    add("--out-dir", help="where train.py wrote (without it and --model: gpt2, or gpt2-nano if gpt2 is not available)")
    add("--prompt", "--start", default="\n", help="the text, or FILE:path; an empty one starts from <|endoftext|>")
    add("--num-samples", type=int, default=3, help="(default: %(default)s)")
    add("--max-new-tokens", type=int, default=500, help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=200, help="(default: %(default)s)")
    add("--top-p", type=float, help="nucleus sampling (default: off)")
    add("--seed", type=int, default=1337, help="(default: %(default)s)")
    add("--dtype", default="float32", choices=LIMITS, help="(default: %(default)s)")
    add("--device", default="auto", choices=DEVICES, help="(default: %(default)s)")
    add("--dump", type=Path, metavar="FILE.npz", help="save prompt_ids, tokens and logits of the first text")
    add("--ignore-eos", action="store_true", help="continue after <|endoftext|>")
    add("--verify", action="store_true", help="compare logits with float32 on the CPU; status 1 if they differ")
    return parser


def check(args: argparse.Namespace) -> None:
    check_sampling(args.temperature, args.top_k, args.top_p, args.seed)
    if not 1 <= args.num_samples <= 2**16:
        raise ValueError(f"--num-samples must be from 1 to {2**16}, got {args.num_samples}")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be 1 or more, got {args.max_new_tokens}")
    if args.seed >= 2**63:
        raise ValueError(f"--seed must be below 2**63, got {args.seed}")
    if args.dump and (args.dump.exists() and not args.dump.is_file() or not args.dump.parent.is_dir()):
        raise ValueError(f"--dump must be a file in an existing folder, got {args.dump}")


def load(args: argparse.Namespace, dtype: str) -> tuple:
    """(name, why the default is this one, the tokenizer's folder, GPTConfig, params) of --model or --out-dir; for int8
    in float32."""
    dtype = "float32" if dtype == "int8" else dtype
    if args.model == "resume" or args.model is None and args.out_dir:
        out_dir = args.out_dir or "out"
        checkpoints = Checkpoints(out_dir)
        step = checkpoints.best()
        return f"{out_dir} at iteration {step}", "", out_dir, *checkpoints.restore_model(step, dtype)
    found = find_model(args.model)
    return found.name, "" if args.model else f"; {found.why}", found.folder, *weight_loader.load(found.folder, dtype)


def read_prompt(text: str) -> str:
    return Path(text[5:]).read_text(encoding="utf-8") if text.startswith("FILE:") else text


def extend(sample: list[int], tokens: list[int], end: int | None) -> None:
    """Appends the tokens up to and with end; a sample that has ended stays as it is."""
    for token in tokens:
        if sample[-1:] == [end]:
            return
        sample.append(token)


def generate(
    args: argparse.Namespace, model: GPT, params: dict, tokenizer: BPE | Characters, prompt: list[int]
) -> None:
    """Prints the samples, the first of them as it is generated; saves --dump."""
    end = None if args.ignore_eos else tokenizer.eot
    samples, rows, stream = [[] for _ in range(args.num_samples)], [], Stream(tokenizer)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    print(args.prompt, end="", flush=True)
    settings = {"samples": args.num_samples, "sampling": sampling, "seed": args.seed, "kept": int(bool(args.dump))}
    for tokens, logits in sampler.generate(model, params, prompt, args.max_new_tokens, **settings):
        shown = len(samples[0])
        for sample, new in zip(samples, tokens.tolist(), strict=True):
            extend(sample, new, end)
        new = samples[0][shown:]
        if args.dump:
            rows.append(logits[0, : len(new)])
        print("".join(stream.push(token) for token in new if token != end), end="", flush=True)
        if all(sample[-1] == end for sample in samples):
            break
    print(stream.end())
    for sample in samples[1:]:
        print("-" * 15)
        print(args.prompt + tokenizer.decode(token for token in sample if token != end))
    if args.dump:
        save_dump(args.dump, prompt, samples[0], np.concatenate(rows))


def verify(model: GPT, params: dict, exact: dict, prompt: list[int], limit: float) -> int:
    """The difference of the logits from those of float32 on the CPU, with the params exact; status 1 if too large."""
    tokens = np.array([prompt[-model.config.block_size :]])
    logits, _ = jax.jit(model.apply)({"params": jax.jit(unpack)(params)}, tokens)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        plain = GPT(replace(model.config, dtype="float32"))
        expected, _ = jax.jit(plain.apply)({"params": jax.device_put(exact, cpu)}, tokens)
    apart = np.abs(np.asarray(logits) - np.asarray(expected)).max() / np.abs(expected).max()
    if jax.default_backend() == "tpu":  # it multiplies float32 in bfloat16
        limit = LIMITS["bfloat16"]
    verdict = "as expected" if apart <= limit else "NOT as expected"
    print(f"logits are within {apart:.1e} of the CPU's float32, relative to the largest: {verdict} (up to {limit:g})")
    return int(not apart <= limit)  # NaN is not


def main(argv: list[str] | None = None) -> int | None:
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack a character
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check(args)
        device = choose_devices(args.device)[0]
        args.prompt = read_prompt(args.prompt)
        name, why, folder, config, params = load(args, args.dtype)
        exact = load(args, "float32")[-1] if args.verify else None
        tokenizer = load_tokenizer(folder)
        prompt = encode_prompt(tokenizer, args.prompt, config.vocab_size)
        model, params = sampler.prepare(config, params, device, args.dtype)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    size = f"{count_params(config) / 1e6:.1f}M parameters"
    print(f"{name} ({size}) on {describe([device])}{why}", flush=True)
    try:
        if args.verify:
            return verify(model, params, exact, prompt, LIMITS[args.dtype])
        return generate(args, model, params, tokenizer, prompt)
    except FloatingPointError as error:  # weights that are finite, and too large
        parser.error(f"{folder}: {error}")
    except OSError as error:  # a full disk
        parser.error(str(error))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # end by the signal itself: in Python's own exit, XLA's threads crash
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
