"""Tiny Shakespeare in a model's own tokens, GPT-2's unless another is named: the last tenth is val.bin."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from shared import script, start_script

start_script(__name__)
from jax_nanogpt.data.corpus import arguments, keep_tokenizer, shakespeare, write_dataset
from shared.tokenizer import find_model, gpt2_bpe, load_tokenizer

HERE = Path(__file__).resolve().parent


@script
def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--model", default="gpt2", help="gpt2 and its like, gpt2-nano or a folder (default: gpt2)")
    args = parser.parse_args(argv)
    folder = None if args.model.startswith("gpt2") and args.model != "gpt2-nano" else find_model(args.model).folder
    tokenizer = gpt2_bpe() if folder is None else load_tokenizer(folder)
    text = shakespeare(args.input, HERE)
    cut = int(0.9 * len(text))
    write_dataset(HERE, {"train": tokenizer.encode(text[:cut]), "val": tokenizer.encode(text[cut:])}, tokenizer)
    keep_tokenizer(HERE, folder)


if __name__ == "__main__":
    main()
