"""What a card alone has: example.py's flags for it, and the keywords of QEfficient that they become."""

import argparse
import importlib
from pathlib import Path

import numpy as np

from qaic_gpt2.weight_loader import GPTConfig

MOST_TOP_K = 512  # tokens that QEfficient's sampler considers, by its default


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on a card (a CPU records the settings of its compiler, and refuses the others)")
    add = group.add_argument
    add("--num-cores", type=int, default=16, help="of each card (default: %(default)s)")
    add("--num-devices", type=int, help="cards of one program (default: those of --device-group, or 1)")
    add("--device-group", type=device_ids, metavar="0,1", help="the cards that run it (default: QEfficient's choice)")
    add("--mxfp6-matmul", action="store_true", help="weights in MXFP6")
    add("--mxint8-kv-cache", action="store_true", help="the KV cache in MXINT8")
    add("--mos", type=int, help="the compiler's effort to reduce on-chip memory")
    add("--aic-enable-depth-first", action="store_true", help="the compiler schedules depth first")
    add("--aic-hw-version", choices=["ai100", "ai200"], help="(default: QEfficient's)")
    add("--include-sampler", action="store_true", help="sample on the card: --temperature, --top-k, --top-p, --seed")


def device_ids(text: str) -> list[int]:
    """QEfficient's form: 0,1 or [0,1]"""
    return [int(part) for part in text.strip("[]").split(",")]


def qefficient() -> type:
    return importlib.import_module("QEfficient").QEFFAutoModelForCausalLM


def check(args: argparse.Namespace, device: str) -> None:
    """Refuses what the device cannot do."""
    group, count = args.device_group, args.num_devices
    if group and count not in (None, len(group)):
        raise ValueError(f"--num-devices must be {len(group)}, the number of cards in --device-group, got {count}")
    if device == "cpu":
        refuse("on a CPU", "it names cards", device_group=group)
        refuse("on a CPU", "a CPU samples without it", include_sampler=args.include_sampler)
        return
    lacks = "QEfficient's generate returns no logits, and stops at <|endoftext|>"
    refuse("on a card", lacks, dump=args.dump, ignore_eos=args.ignore_eos)
    refuse("on a card", "QEfficient drafts with a second model", draft_tokens=args.draft_tokens)
    if not args.include_sampler:
        refuse("on a card without --include-sampler", "QEfficient is greedy", temperature=args.temperature)
    if args.verify:
        refuse("on a card with --verify", "its program returns no logits", include_sampler=args.include_sampler)
    if args.top_k and args.top_k > MOST_TOP_K:
        raise ValueError(f"--top-k must be at most {MOST_TOP_K} on a card, got {args.top_k}")


def refuse(where: str, why: str, **flags) -> None:
    for name, value in flags.items():
        if value:
            raise ValueError(f"--{name.replace('_', '-')} must not be set {where}: {why}")


def load_keywords(args: argparse.Namespace, config: GPTConfig) -> dict:
    """More keywords of from_pretrained."""
    keywords = {"continuous_batching": True} if args.full_batch_size else {}
    if args.include_sampler:
        keywords["qaic_config"] = {"include_sampler": True, "max_top_k_ids": min(MOST_TOP_K, config.vocab_size)}
    return keywords


def compile_keywords(args: argparse.Namespace) -> dict:
    """The settings of the compiler; without a flag, QEfficient's default."""
    names = ("mxfp6_matmul", "mxint8_kv_cache", "mos", "aic_enable_depth_first", "aic_hw_version")
    given = {name: getattr(args, name) for name in names if getattr(args, name) not in (None, False)}
    return given | {"num_cores": args.num_cores, "num_devices": args.num_devices or len(args.device_group or [0])}


def generate_keywords(args: argparse.Namespace, folder: Path, config: GPTConfig, room: int) -> dict:
    """QEfficient's generate needs Hugging Face's tokenizer and a text, and would run past the end of the context."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [prompt or tokenizer.eos_token for prompt in args.prompt]
    keywords = {"tokenizer": tokenizer, "prompts": prompts, "generation_len": min(args.max_new_tokens or room, room)}
    keywords |= {"device_id": args.device_group, "stream": False}
    if args.include_sampler:
        keywords |= {"include_sampler": True, "sampling_params": sampling_params(args, config)}
    return keywords


def sampling_params(args: argparse.Namespace, config: GPTConfig) -> dict[str, np.ndarray]:
    """One row for each text of a batch. QEfficient draws every token with the same random numbers."""
    most = min(MOST_TOP_K, config.vocab_size)
    rows = args.full_batch_size or len(args.prompt)
    values = {"repetition_penalties": 1.0, "presence_penalties": 0.0, "temperatures": args.temperature}
    values |= {"top_ps": args.top_p or 1.0, "min_ps": 0.0}
    params = {name: np.full((rows, 1), value, np.float32) for name, value in values.items()}
    params["top_ks"] = np.full((rows, 1), min(args.top_k or most, most), np.int32)
    params["random_numbers"] = np.random.default_rng(args.seed).random((rows, most), np.float32)
    return params
