"""Tiny Shakespeare in GPT-2's tokens, or another model's: the last tenth is val.bin."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from jax_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
from jax_nanogpt.data.corpus import add_input, copy_tokenizer, shakespeare, write_dataset
from shared.tokenizer import find_model, gpt2_bpe, load_tokenizer

HERE = Path(__file__).resolve().parent


def main(argv=None):
    parser = Parser(__doc__)
    add_input(parser)
    parser.add_argument("--model", default="gpt2", help="gpt2, ..., gpt2-xl, gpt2-nano or a folder (default: gpt2)")
    args = parser.parse_args(argv)
    try:
        folder = None if args.model.startswith("gpt2") and args.model != "gpt2-nano" else find_model(args.model).folder
        tokenizer = gpt2_bpe() if folder is None else load_tokenizer(folder)
        text = shakespeare(args.input, HERE)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    cut = int(0.9 * len(text))
    splits = {"train": tokenizer.encode(text[:cut]), "val": tokenizer.encode(text[cut:])}
    try:
        write_dataset(HERE, splits, tokenizer)
        copy_tokenizer(HERE, folder)
    except OSError as error:  # a full disk
        parser.error(str(error))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
