"""GPT-2 on a NeuronCore, or the same graphs on a CPU: trace, save, load, compare one step, generate a text.

    python run_model.py --prompt "To be, or not to be"
    python run_model.py --window                          # one graph of a fixed shape, and no cache

The loop over tokens stays on the CPU and calls the graph at each step. Graphs go to the current directory, and are used
again by the next run.
"""

import argparse
import io
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import fail, script, start_script

start_script(__name__)
import numpy as np
import torch
import torch.nn as nn

from neuron_nanogpt import compiler, weight_loader
from neuron_nanogpt.compiler import DTYPES
from neuron_nanogpt.model import count_params
from shared.sampling import Sampler, check_sampling
from shared.tokenizer import Stream, find_model, load_tokenizer

BATCH = 1
SEQ_LEN = 128
LIMITS = {"float32": 1e-3, "bfloat16": 3e-2}  # of logits, relative to the largest: what --verify takes as expected


# -- the modules that become graphs


class NeuronStep(nn.Module):
    """One fixed shape: texts [B, SEQ_LEN], padded on the right, and their lengths [B] -> next-token logits [B, V]."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids, length):
        return self.gpt(input_ids, length)[0]


class Prefill(NeuronStep):
    """The same, and the keys and values of each layer [B, H, T, D]: what the cache starts from."""

    def forward(self, input_ids, length):
        logits, made = self.gpt(input_ids, length)
        return logits, *made


class Decode(nn.Module):
    """One token a row [B, 1] and where it stands [B] -> logits [B, V], and the cache, which stays on the device."""

    def __init__(self, gpt, batch):
        super().__init__()
        c = gpt.config
        shape = (batch, c.n_head, c.block_size, c.n_embd // c.n_head)
        self.gpt = gpt
        self.cache = nn.ParameterList(
            nn.Parameter(torch.zeros(shape, dtype=gpt.wpe.weight.dtype), requires_grad=False)
            for _ in range(2 * c.n_layer)
        )

    def forward(self, input_ids, positions):
        logits, cache = self.gpt(input_ids, cache=list(self.cache), positions=positions)
        return logits, *cache

    def aliases(self):
        """Which output is the new value of which parameter: the device then updates the cache where it lies."""
        return {parameter: 1 + i for i, parameter in enumerate(self.cache)}


def padded(rows, width):
    """The texts' last `width` tokens, at the left of [B, width], and how many each has, [B]."""
    rows = [row[-width:] for row in rows]
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) for row in rows])


def first(out):
    """The logits: whether outputs that are aliased come back too, Neuron's documents leave open."""
    return out[0] if isinstance(out, (tuple, list)) else out


# -- from texts to the logits of their next tokens


class Window:
    """One graph; each step computes the whole window."""

    def __init__(self, build, gpt, batch, width, cores=1):
        self.width = width
        shard = batch // cores
        inputs = padded([[0]] * shard, width)
        self.graph = build(NeuronStep(gpt), inputs, "gpt2_step_neuron.pt", {"graph": "window"})
        if cores > 1:
            import torch_neuronx

            devices = list(range(cores))
            self.graph = torch_neuronx.DataParallel(self.graph, device_ids=devices, dim=0, set_dynamic_batching=False)

    def logits(self, rows):
        return first(self.graph(*padded(rows, self.width))).numpy()


class Cached:
    """A graph for each length of prompt, and one for the tokens after it."""

    def __init__(self, build, engine, gpt, batch, buckets):
        self.build, self.gpt, self.batch, self.buckets = build, gpt, batch, buckets
        decode = Decode(gpt, batch)
        inputs = torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
        self.decode = build(decode, inputs, "gpt2_step_neuron.pt", {"graph": "decode"}, decode.aliases())
        self.states = engine.states(self.decode, decode)
        self.prefills = {}
        self.cached = []  # the texts whose keys and values the states hold

    def prefill(self, rows):
        """The smallest bucket's graph that holds the texts; it is traced when it is first needed."""
        longest = max(map(len, rows))
        bucket = next((bucket for bucket in self.buckets if bucket >= longest), self.buckets[-1])
        if bucket not in self.prefills:
            inputs = padded([[0]] * self.batch, bucket)
            name = f"gpt2_prefill_{bucket}_neuron.pt"
            self.prefills[bucket] = self.build(Prefill(self.gpt), inputs, name, {"graph": "prefill"})
        return self.prefills[bucket](*padded(rows, bucket))

    def logits(self, rows):
        if max(map(len, rows)) > self.buckets[-1]:
            # The context is full. nanoGPT crops the text, which moves each token to another position embedding:
            # nothing cached is true any more.
            self.cached = []
            return self.prefill(rows)[0].numpy()
        if self.cached and all(row[:-1] == old[: len(row) - 1] for row, old in zip(rows, self.cached, strict=True)):
            last = torch.tensor([row[-1:] for row in rows])
            out = self.decode(last, torch.tensor([len(row) - 1 for row in rows]))
            logits = first(out)
        else:
            logits, *made = self.prefill(rows)
            for state, new in zip(self.states, made, strict=True):
                full = torch.zeros(state.shape, dtype=state.dtype)
                full[:, :, : new.shape[2]] = new
                state.copy_(full)
        self.cached = [row.copy() for row in rows]
        return logits.numpy()


def generate(runner, rows, count, sampler):
    """Yields each step's tokens [B] and the logits [B, V] they were drawn from; rows grow by them."""
    for _ in range(count):
        logits = runner.logits(rows)
        tokens = sampler(logits)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        yield tokens, logits


# -- one step, compared


def median_ms(call, repeats=5):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


class Eager:
    """What the graphs are compared with: the model in float32 on the CPU, without padding, cache or graph."""

    def __init__(self, gpt, prompt, limit, window, batch):
        logits = gpt(torch.tensor([prompt[-limit:]]))[0][0, -1]
        self.rows = [[*prompt, int(logits.argmax())] for _ in range(batch)]
        self.logits = gpt(torch.tensor([self.rows[0][-limit:]]))[0][0, -1].numpy()
        if window:
            call, inputs = NeuronStep(gpt), padded(self.rows, limit)
        else:
            call, inputs = Decode(gpt, batch), (torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(batch).long())
        self.ms = median_ms(lambda: call(*inputs))

    def compare(self, runner, dtype):
        """Prints how the graph's step compares; whether its logits are as near as expected."""
        runner.logits([row[:-1] for row in self.rows])
        off = np.abs(runner.logits(self.rows) - self.logits)
        ms = median_ms(lambda: runner.logits(self.rows))
        print(f"one step: {self.ms:.1f} ms eager in float32, {ms:.1f} ms by the graph: ratio {self.ms / ms:.2f}")
        apart = off.max() / np.abs(self.logits).max()
        verdict = "as expected" if apart <= LIMITS[dtype] else "NOT as expected"
        print(f"logits differ by at most {off.max():.1e}, by {off.mean():.1e} in the mean; ", end="")
        print(f"relative to the largest {apart:.1e}, {verdict} (up to {LIMITS[dtype]:g})")
        return apart <= LIMITS[dtype]


# -- the command


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add(
        "--model",
        help="gpt2, ..., gpt2-xl, gpt2-nano or a folder (default: gpt2, or gpt2-nano without it)",
    )
    add("--prompt", default="\n", help="an empty one starts from <|endoftext|> (default: a line break)")
    add("--max-new-tokens", type=int, default=100, help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=200, help="(default: %(default)s)")
    add("--top-p", type=float)
    add("--seed", type=int, default=1337, help="(default: %(default)s)")
    add("--batch", type=int, default=BATCH, help="texts at once (default: %(default)s)")
    add("--dtype", default="float32", choices=DTYPES, help="(default: %(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "neuron"], help="(default: %(default)s)")
    add("--window", action="store_true", help="one graph over a window of --seq-len tokens, without a cache")
    add("--seq-len", type=int, help=f"the window (default: {SEQ_LEN}, or the context where that is shorter)")
    add(
        "--buckets",
        help="lengths of prompt that get a graph, as in 128,1024 (default: powers of two)",
    )
    add("--target", default="trn1", choices=compiler.TARGETS, help="to compile for (default: %(default)s)")
    add("--compiler-args", default="", help="more arguments for neuronx-cc, in one string")
    add("--recompile", action="store_true", help="trace again, whatever lies there")
    add("--cores", type=int, default=1, help="NeuronCores that share the batch, with --window (default: %(default)s)")
    add("--verify", action="store_true", help="compare with the CPU's float32 and stop: status 1 if too far apart")
    add("--dump", type=Path, metavar="FILE.npz", help="save prompt_ids, tokens and logits of the first text")
    add("--ignore-eos", action="store_true", help="go on after <|endoftext|>")
    return parser.parse_args(argv)


def check(args):
    check_sampling(args.temperature, args.top_k, args.top_p, args.seed)
    for name in ("max_new_tokens", "batch", "cores"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be 1 or more, got {getattr(args, name)}")
    if args.batch > 2**16:
        raise ValueError(f"batch must be at most {2**16}, got {args.batch}")
    if args.cores > 1 and not args.window:
        raise ValueError(
            f"cores must be 1 with a KV cache, got {args.cores}: start a process for each core, with "
            "NEURON_RT_VISIBLE_CORES, or use --window"
        )
    if args.batch % args.cores:
        raise ValueError(f"batch must be a multiple of cores ({args.cores}), got {args.batch}")
    if args.dump and (args.dump.exists() and not args.dump.is_file() or not args.dump.parent.is_dir()):
        raise ValueError(f"dump must be a file in an existing folder, got {args.dump}")


def encode(tokenizer, text, vocab_size):
    ids = tokenizer.encode(text) or [tokenizer.eot]
    if ids == [None]:
        raise ValueError("prompt must not be empty: this model has no <|endoftext|>")
    if max(ids) >= vocab_size:
        raise ValueError(f"prompt must have token ids below the model's vocab_size ({vocab_size}), got {max(ids)}")
    return ids


def choose_buckets(given, block_size):
    """Ascending, the last one the context: past it, a step is a prefill of all of it."""
    if given is None:
        lengths = [SEQ_LEN << i for i in range(24) if SEQ_LEN << i < block_size]
    elif not all(part.isascii() and part.isdigit() for part in given.split(",")):
        raise ValueError(f"buckets must be whole numbers separated by commas, got {given!r}")
    else:
        lengths = [int(part) for part in given.split(",")]
        if min(lengths) < 1 or max(lengths) > block_size:
            raise ValueError(f"buckets must be from 1 to the context ({block_size}), got {given}")
    return sorted({*lengths, block_size})


def choose_width(given, block_size):
    width = min(SEQ_LEN, block_size) if given is None else given
    if not 1 <= width <= block_size:
        raise ValueError(f"seq_len must be from 1 to the context ({block_size}), got {given}")
    return width


def make_runner(args, engine, gpt, facts, tell=print):
    """The graphs for these arguments, traced or loaded."""

    def build(module, inputs, name, more, aliases=None):
        path = Path(name)
        return compiler.build(engine, module, inputs, path, facts | more, aliases, args.recompile, tell)

    if args.window:
        return Window(build, gpt, args.batch, choose_width(args.seq_len, gpt.config.block_size), args.cores)
    return Cached(build, engine, gpt, args.batch, choose_buckets(args.buckets, gpt.config.block_size))


def save_dump(path, prompt, tokens, rows):
    file = io.BytesIO()
    np.savez(file, prompt_ids=np.array(prompt), tokens=np.array(tokens), logits=np.array(rows))
    compiler.write_files({path: file.getvalue()})


@script
@torch.inference_mode()
def main(argv=None):
    args = parse_arguments(argv)
    check(args)
    engine = compiler.choose(args.device, args.target, args.compiler_args.split())
    if args.cores > 1 and engine.name != "neuron":
        raise ValueError(f"cores must be 1 on the {engine.name}, got {args.cores}")
    found = find_model(args.model)
    tokenizer = load_tokenizer(found.folder)
    gpt = weight_loader.load(found.folder)
    facts = {"model": found.name, "weights": weight_loader.fingerprint(found.folder), "dtype": args.dtype}
    choose_buckets(args.buckets, gpt.config.block_size)
    width = choose_width(args.seq_len, gpt.config.block_size)
    prompt = encode(tokenizer, args.prompt, gpt.config.vocab_size)
    why = "" if args.model else f"; {found.why}"
    params = f"{count_params(gpt.config) / 1e6:.1f}M parameters"
    print(f"{found.name} ({params}) on {engine.describe(args.dtype)}{why}", flush=True)
    limit = width if args.window else gpt.config.block_size
    eager = Eager(gpt, prompt, limit, args.window, args.batch)
    gpt = engine.prepare(gpt.to(DTYPES[args.dtype]))
    runner = make_runner(args, engine, gpt, facts)
    near = eager.compare(runner, args.dtype)
    if args.verify:
        sys.exit(int(not near))

    print()
    print(args.prompt, end="", flush=True)
    end = None if args.ignore_eos else tokenizer.eot
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    rows, stream, first, kept = [prompt.copy() for _ in range(args.batch)], Stream(tokenizer), True, []
    start = time.perf_counter()
    for _, logits in generate(runner, rows, args.max_new_tokens, sampler):
        texts = [row[len(prompt) :] for row in rows]  # all texts are made together; the first is shown as it comes
        if first:
            kept.append(logits[0])
            first = end is None or texts[0][-1] != end
            print(stream.push(texts[0][-1]) if first else "", end="", flush=True)
        if end is not None and all(end in text for text in texts):
            break
    seconds = time.perf_counter() - start
    print(stream.end())
    texts = [text[: text.index(end) + 1] if end in text else text for text in texts]
    for text in texts[1:]:
        print("-" * 15)
        print(args.prompt + tokenizer.decode(token for token in text if token != end))
    made = sum(map(len, texts))
    print(f"\n{made} tokens in {seconds:.1f} s: {made / seconds:.0f} tokens/s")
    if args.dump:
        save_dump(args.dump, prompt, texts[0], kept)


if __name__ == "__main__":
    main()
