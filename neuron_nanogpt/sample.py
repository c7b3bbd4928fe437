"""The baseline: sampling without Neuron, a graph or a cache, on a CPU or a GPU.

python sample.py --prompt "To be, or not to be" --temperature 0
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import fail, script, start_script

start_script(__name__)
import torch

from neuron_nanogpt import weight_loader
from neuron_nanogpt.compiler import DTYPES
from neuron_nanogpt.model import count_params
from neuron_nanogpt.run_model import encode
from shared.sampling import Sampler
from shared.tokenizer import Stream, find_model, load_tokenizer


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("--model", help="gpt2, ..., gpt2-xl, gpt2-nano or a folder (default: gpt2, or gpt2-nano without it)")
    add("--prompt", default="\n", help="an empty one starts from <|endoftext|> (default: a line break)")
    add("--max-new-tokens", type=int, default=100, help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=200, help="(default: %(default)s)")
    add("--top-p", type=float)
    add("--seed", type=int, default=1337, help="(default: %(default)s)")
    add("--dtype", default="float32", choices=DTYPES, help="(default: %(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(default: %(default)s)")
    add("--ignore-eos", action="store_true", help="go on after <|endoftext|>")
    return parser.parse_args(argv)


@script
@torch.inference_mode()
def main(argv=None):
    args = parse_arguments(argv)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {args.max_new_tokens}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds none")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    found = find_model(args.model)
    tokenizer = load_tokenizer(found.folder)
    gpt = weight_loader.load(found.folder, DTYPES[args.dtype]).to(device)
    ids = encode(tokenizer, args.prompt, gpt.config.vocab_size)
    why = "" if args.model else f"; {found.why}"
    print(
        f"{found.name} ({count_params(gpt.config) / 1e6:.1f}M parameters) on {device}: torch {torch.__version__}{why}"
    )

    print()
    print(args.prompt, end="", flush=True)
    stream = Stream(tokenizer)
    for _ in range(args.max_new_tokens):
        window = torch.tensor([ids[-gpt.config.block_size :]], device=device)
        logits, _ = gpt(window, torch.tensor([window.shape[1]], device=device))
        ids.append(sampler(logits[0].cpu().numpy()))
        if ids[-1] == tokenizer.eot and not args.ignore_eos:
            break
        print(stream.push(ids[-1]), end="", flush=True)
    print(stream.end())


if __name__ == "__main__":
    main()
