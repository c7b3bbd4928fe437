"""The baseline: sampling without Neuron, a graph or a KV cache, on a CPU or a GPU.

python sample.py --prompt "To be, or not to be" --temperature 0
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from neuron_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
import torch

from neuron_nanogpt import weight_loader
from neuron_nanogpt.model import count_params
from neuron_nanogpt.run_model import add_sampling, check_text
from shared.sampling import Sampler
from shared.tokenizer import Stream, encode_prompt, find_model, load_tokenizer


def make_parser():
    parser = Parser(__doc__)
    add_sampling(parser)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(default: %(default)s)")
    return parser


def choose_device(device):
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ValueError("--device must be auto or cpu, got cuda: PyTorch finds none")
    return "cuda" if device != "cpu" and found else "cpu"


def generate(args, gpt, tokenizer, ids):
    """Prints the text token by token."""
    end, stream = None if args.ignore_eos else tokenizer.eot, Stream(tokenizer)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    print("\n" + args.prompt, end="", flush=True)
    for _ in range(args.max_new_tokens):
        window = torch.tensor([ids[-gpt.config.block_size :]], device=gpt.wpe.weight.device)
        logits, _ = gpt(window, torch.tensor([window.shape[1]], device=window.device))  # 1, V
        ids.append(sampler(logits[0].cpu().numpy()))
        if ids[-1] == end:
            break
        print(stream.push(ids[-1]), end="", flush=True)
    print(stream.end())


@torch.inference_mode()
def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack a character
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check_text(args)
        device = choose_device(args.device)
        found = find_model(args.model)
        tokenizer = load_tokenizer(found.folder)
        gpt = weight_loader.load(found.folder, getattr(torch, args.dtype))
        ids = encode_prompt(tokenizer, args.prompt, gpt.config.vocab_size)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    why = "" if args.model else f"; {found.why}"
    size = f"{count_params(gpt.config) / 1e6:.1f}M parameters"
    print(f"{found.name} ({size}) on {device}: torch {torch.__version__}{why}", flush=True)
    generate(args, gpt.to(device), tokenizer, ids)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
