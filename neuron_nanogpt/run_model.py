"""GPT-2 on a NeuronCore, or the same graphs on a CPU: trace, save, load, compare one step, generate a text.

    python run_model.py --prompt "To be, or not to be"
    python run_model.py --window                          # one graph of a fixed shape, without a KV cache
    python run_model.py --device xla                      # through PyTorch/XLA, which torch_neuronx.trace stands on

The loop over tokens stays on the CPU and calls the graph at each step. Graphs are saved in the current directory, and
the next run reuses them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from neuron_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
import numpy as np
import torch

from neuron_nanogpt.compiler import DEVICES, DTYPES
from neuron_nanogpt.engine import SEQ_LEN, load
from neuron_nanogpt.files import save_dump
from neuron_nanogpt.graphs import NeuronStep
from neuron_nanogpt.model import count_params
from neuron_nanogpt.neuron import STATES, TARGETS
from shared.sampling import Sampler, check_sampling
from shared.tokenizer import Stream, encode_prompt, find_model, load_tokenizer

BATCH = 1
VERIFIED = 8  # steps of decoding after each prompt
LIMITS = {"float32": 1e-3, "bfloat16": 3e-2, "int8": 3e-2}  # differences relative to the largest logit


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add_sampling(parser)
    add("--batch", type=int, default=BATCH, help="texts at once (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="of the weights (default: float32; on a NeuronCore bfloat16)")
    add("--device", default="auto", choices=DEVICES, help="(default: %(default)s)")
    add("--window", action="store_true", help="one graph over a window of --seq-len tokens, without a KV cache")
    add("--seq-len", type=int, help=f"the window (default: {SEQ_LEN}, or the context if that is shorter)")
    add("--buckets", type=lengths, help="prompt lengths that get a graph, as in 128,1024 (default: powers of two)")
    add("--target", choices=TARGETS, help="to compile for, on a NeuronCore (default: trn1)")
    add("--compiler-args", default="", help="more arguments for neuronx-cc, in one string")
    add("--compile-only", action="store_true", help="all graphs for a NeuronCore, on any machine with neuronx-cc")
    add("--states", choices=STATES, help="how a NeuronCore's graphs hand on the KV cache (default: shared)")
    add("--dump-hlo", type=Path, metavar="DIR", help="with --device xla: save each graph's HLO as text")
    add("--recompile", action="store_true", help="trace again, and replace the saved graphs")
    add("--cores", type=int, default=1, help="NeuronCores that share the batch, with --window (default: %(default)s)")
    add("--verify", action="store_true", help="compare three texts with float32 on the CPU; status 1 if they differ")
    add("--dump", type=Path, metavar="FILE.npz", help="save prompt_ids, tokens and logits of the first text")
    return parser


def add_sampling(parser):
    """The flags that sample.py has too."""
    add = parser.add_argument
    add("--model", help="gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano if gpt2 is not available)")
    add("--prompt", default="\n", help="an empty one starts from <|endoftext|> (default: a line break)")
    add("--max-new-tokens", type=int, default=100, help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=200, help="(default: %(default)s)")
    add("--top-p", type=float, help="nucleus sampling (default: off)")
    add("--seed", type=int, default=1337, help="(default: %(default)s)")
    add("--ignore-eos", action="store_true", help="continue after <|endoftext|>")


def lengths(text):
    if not all(part.isascii() and part.isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, got {text!r}")
    return [int(part) for part in text.split(",")]


def check_text(args):
    check_sampling(args.temperature, args.top_k, args.top_p, args.seed)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be 1 or more, got {args.max_new_tokens}")


def check(args):
    check_text(args)
    if not 1 <= args.batch <= 2**16:
        raise ValueError(f"--batch must be from 1 to {2**16}, got {args.batch}")
    if args.cores < 1:
        raise ValueError(f"--cores must be 1 or more, got {args.cores}")
    if args.cores > 1 and not args.window:
        remedy = "start a process for each core, with NEURON_RT_VISIBLE_CORES, or use --window"
        raise ValueError(f"--cores must be 1 with a KV cache, got {args.cores}: {remedy}")
    if args.batch % args.cores:
        raise ValueError(f"--batch must be a multiple of --cores ({args.cores}), got {args.batch}")
    if args.seq_len is not None and not args.window:
        raise ValueError(f"--seq-len must be given with --window, got {args.seq_len} without")
    if args.buckets and args.window:
        raise ValueError("--buckets must be given without --window, got both")
    no_text = "--verify" if args.verify else "--compile-only"
    if args.dump and (args.verify or args.compile_only):
        raise ValueError(f"--dump must be given without {no_text}, got both: no text is generated")
    if args.dump and (args.dump.exists() and not args.dump.is_file() or not args.dump.parent.is_dir()):
        raise ValueError(f"--dump must be a file in an existing folder, got {args.dump}")


class Reference(NamedTuple):
    """The greedy continuation of a prompt by the eager model, in float32 on the CPU."""

    prompt: list[int]
    tokens: list[int]
    logits: np.ndarray  # before each token, and after the last: [len(tokens) + 1, V]


def make_reference(engine, prompt: list[int], count: int) -> Reference:
    """Without padding, a cache or a graph."""
    eager, row, logits = NeuronStep(engine.gpt), [*prompt], []
    for _ in range(count + 1):
        window = row[-engine.context :]
        logits.append(eager(torch.tensor([window]), torch.tensor([len(window)]))[0].numpy())
        row.append(int(logits[-1].argmax()))
    return Reference(prompt, row[len(prompt) : -1], np.stack(logits))


def compare(engine, about: str, reference: Reference, dtype: str) -> bool:
    """Prints how far the graphs' logits are from the reference's, for the prompt and for the tokens after it."""
    logits = [engine.prefill([reference.prompt] * engine.batch)]
    logits += [engine.decode(np.full(engine.batch, token)) for token in reference.tokens]
    apart = np.abs(np.stack(logits, 1) - reference.logits).max((0, 2)) / np.abs(reference.logits).max()
    count, limit = len(reference.tokens), LIMITS[dtype]
    for part, worst in ("prefill", apart[0]), (f"{count} decode step{'s' * (count > 1)}", apart[1:].max()):
        verdict = "as expected" if worst <= limit else "NOT as expected"  # NaN is not
        print(f"{about}{part}: logits are within {worst:.1e} of the CPU's float32: {verdict} (up to {limit:g})")
    return bool((apart <= limit).all())


def verify(engine, prompt: list[int], dtype: str) -> int:
    """A prompt, another one and the first again, which a state that is left from the one before would change."""
    first = make_reference(engine, prompt, VERIFIED)
    other = make_reference(engine, first.tokens, VERIFIED)
    texts = [("prompt A, ", first), ("prompt B, ", other), ("prompt A again, ", first)]
    right = [compare(engine, *text, dtype) for text in texts]
    return int(not all(right))


def show_step(engine, prompt: list[int], dtype: str) -> None:
    """Compares one step of the graph with the eager model's, its logits and its time."""
    reference = make_reference(engine, prompt, 1)  # before the first graph, for which engine.gpt is converted
    module, inputs = engine.example()
    eager_ms = median_ms(lambda: module(*inputs))
    compare(engine, "", reference, dtype)
    ms = median_ms(lambda: engine.decode(np.full(engine.batch, reference.tokens[0])))
    print(f"one step: {eager_ms:.1f} ms eager in float32, {ms:.1f} ms by the graph: ratio {eager_ms / ms:.2f}")


def median_ms(call, repeats=5):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def generate(args, engine, tokenizer, prompt):
    """Prints the first text token by token, and then the others; saves --dump."""
    end, stream = None if args.ignore_eos else tokenizer.eot, Stream(tokenizer)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    prompts, ended = [prompt] * args.batch, np.zeros(args.batch, bool)
    tokens, rows = [], []
    engine.build(len(prompt), args.max_new_tokens)  # which prints a line a graph, and not into the text
    print("\n" + args.prompt, end="", flush=True)
    start = time.perf_counter()
    for step in range(args.max_new_tokens):
        logits = engine.decode(tokens[-1]) if step else engine.prefill(prompts)  # B, V
        tokens.append(sampler(logits))  # B
        if args.dump and not ended[0]:
            rows.append(logits[0].copy())
        ended |= tokens[-1] == end
        if ended.all():
            break
        if not ended[0]:
            print(stream.push(tokens[-1][0]), end="", flush=True)
    seconds = time.perf_counter() - start
    print(stream.end())
    texts = [text[: text.index(end) + 1] if end in text else text for text in np.array(tokens).T.tolist()]
    for text in texts[1:]:
        print("-" * 15)
        print(args.prompt + tokenizer.decode(token for token in text if token != end))
    count = sum(map(len, texts))
    print(f"\n{count} tokens in {seconds:.1f} s: {count / seconds:.0f} tokens/s")
    if args.dump:
        save_dump(args.dump, prompt, texts[0], rows)


@torch.no_grad()  # torch_neuronx.trace moves parameters, which inference mode forbids
def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack a character
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check(args)
        found = find_model(args.model)
        tokenizer = load_tokenizer(found.folder)
        engine = load(
            found.folder,
            args.dtype,
            "neuron" if args.compile_only and args.device == "auto" else args.device,
            batch=args.batch,
            window=args.window,
            seq_len=args.seq_len,
            buckets=args.buckets,
            recompile=args.recompile,
            target=args.target,
            compiler_args=tuple(args.compiler_args.split()),
            cores=args.cores,
            states=args.states,
            compile_only=args.compile_only,
            dump_hlo=args.dump_hlo,
        )
        prompt = encode_prompt(tokenizer, args.prompt, engine.config.vocab_size)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    why = "" if args.model else f"; {found.why}"
    print(f"{found.name} ({count_params(engine.config) / 1e6:.1f}M parameters) on {engine.describe()}{why}", flush=True)
    try:
        if args.compile_only:
            return engine.build_all()
        if args.verify:
            return verify(engine, prompt, engine.compiler.dtype)
        show_step(engine, prompt, engine.compiler.dtype)
        return generate(args, engine, tokenizer, prompt)
    except OSError as error:  # a full disk, or a file whose SHA-256 does not match its JSON
        parser.error(str(error))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
