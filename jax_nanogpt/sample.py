"""Continue a text: with what train.py left in --out_dir, or with a GPT-2.

python sample.py --out_dir=out-shakespeare-char
python sample.py --init_from=gpt2 --start="What is the answer to life?" --num_samples=5
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import fail, script, start_script

start_script(__name__)
import jax
import numpy as np

from jax_nanogpt import weight_loader
from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.device import choose_devices, describe
from jax_nanogpt.files import write_beside
from jax_nanogpt.model import GPT, count_params
from jax_nanogpt.sampler import Sampling, generate
from shared.sampling import check_sampling
from shared.tokenizer import Stream, find_model, load_tokenizer


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("--init_from", help="resume (the best checkpoint in --out_dir), gpt2, gpt2-xl, ..., gpt2-nano or a folder")
    add(
        "--out_dir", help="where train.py wrote; without it and --init_from: gpt2, or gpt2-nano where that is not there"
    )
    add("--start", default="\n", help="the prompt, or FILE:path; an empty one starts from <|endoftext|>")
    add("--num_samples", type=int, default=3)
    add("--max_new_tokens", type=int, default=500)
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    add("--top_k", type=int, default=200, help="(default: %(default)s)")
    add("--top_p", type=float)
    add("--seed", type=int, default=1337, help="(default: %(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="(default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, gpu or tpu (default: %(default)s)")
    add("--dump", type=Path, metavar="FILE.npz", help="save prompt_ids, tokens and logits of the first sample")
    add("--ignore_eos", action="store_true", help="go on after <|endoftext|>")
    add("--verify", action="store_true", help="compare the logits here, in --dtype, with the CPU's in float32; no text")
    return parser.parse_args(argv)


def load_model(init_from, out_dir, dtype):
    """(what to call it, why it was taken, GPTConfig, params, tokenizer)"""
    if init_from == "resume" or init_from is None and out_dir:
        out_dir = out_dir or "out"
        checkpoints = Checkpoints(out_dir)
        step = checkpoints.best()
        config, params = checkpoints.restore_model(step, dtype)
        return f"{out_dir} at iteration {step}", "", config, params, load_tokenizer(out_dir)
    found = find_model(init_from)
    why = "" if init_from else f"; {found.why}"
    return found.name, why, *weight_loader.load(found.folder, dtype), load_tokenizer(found.folder)


def verify(config, params, exact_config, exact_params, prompt):
    """How far the device's logits for prompt are from the CPU's in float32, as a part of the largest."""
    tokens = np.array([prompt[-config.block_size :]])
    logits, _ = jax.jit(GPT(config).apply)({"params": params}, tokens)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        exact, _ = jax.jit(GPT(exact_config).apply)({"params": jax.device_put(exact_params, cpu)}, tokens)
    apart = np.abs(np.asarray(logits) - np.asarray(exact)).max() / np.abs(exact).max()
    rough = config.dtype == "bfloat16" or jax.default_backend() == "tpu"  # whose float32 products are of bfloat16
    limit = 3e-2 if rough else {"float32": 1e-3, "float16": 1e-2}[config.dtype]
    verdict = "as expected" if apart <= limit else "NOT as expected"
    print(f"logits are within {apart:.1e} of the CPU's float32, relative to the largest: {verdict} (up to {limit:g})")
    sys.exit(int(apart > limit))


def save(arrays, path):
    with path.open("wb") as file:  # by its name, NumPy would add .npz
        np.savez(file, **arrays)


@script
def main(argv=None):
    args = parse_arguments(argv)
    check_sampling(args.temperature, args.top_k, args.top_p, args.seed)
    for name in ("num_samples", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}, 1 or more is expected")
    if args.seed >= 2**63:
        raise ValueError(f"seed is {args.seed}, below 2**63 is expected")
    if args.num_samples > 2**16:
        raise ValueError(f"num_samples is {args.num_samples}, at most {2**16} is expected")
    if args.dump and (args.dump.exists() and not args.dump.is_file() or not args.dump.parent.is_dir()):
        raise ValueError(f"dump is {args.dump}, a file in a folder that exists is expected")
    devices = choose_devices(args.device)
    start = Path(args.start[5:]).read_text(encoding="utf-8") if args.start.startswith("FILE:") else args.start
    name, why, config, params, tokenizer = load_model(args.init_from, args.out_dir, args.dtype)
    prompt = tokenizer.encode(start)
    if not prompt and tokenizer.eot is None:
        raise ValueError("start must not be empty: this model has no <|endoftext|>")
    print(
        f"{name} ({count_params(params) / 1e6:.1f}M parameters) on {describe(devices[:1], args.dtype)}{why}", flush=True
    )

    prompt = prompt or [tokenizer.eot]
    if args.verify:
        _, _, exact_config, exact_params, _ = load_model(args.init_from, args.out_dir, "float32")
        verify(config, params, exact_config, exact_params, prompt)
    end = None if args.ignore_eos else tokenizer.eot
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    pieces = generate(config, params, prompt, args.max_new_tokens, args.num_samples, sampling, args.seed)
    samples, shown, rows, stream = [[] for _ in range(args.num_samples)], 0, [], Stream(tokenizer)
    print(start, end="")
    for tokens, logits in pieces:  # all samples are made together; the first is shown as it comes
        for sample, more in zip(samples, tokens.tolist(), strict=True):
            if end is None or end not in sample:
                sample += more[: more.index(end) + 1] if end in more else more
        fresh = samples[0][shown:]
        shown += len(fresh)
        if args.dump:
            rows.append(logits[0, : len(fresh)].copy())  # a view would keep the logits of all samples
        print("".join(stream.push(token) for token in fresh if token != end), end="", flush=True)
        if end is not None and all(end in sample for sample in samples):
            break
    print(stream.end())
    for sample in samples[1:]:
        print("-" * 15)
        print(start + tokenizer.decode(token for token in sample if token != end))
    if args.dump:
        dump = {"prompt_ids": np.array(prompt), "tokens": np.array(samples[0]), "logits": np.concatenate(rows)}
        write_beside(args.dump, partial(save, dump))


if __name__ == "__main__":
    main()
