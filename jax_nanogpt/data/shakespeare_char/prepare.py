"""Tiny Shakespeare, one token per character: the last tenth is val.bin."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from jax_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
from jax_nanogpt.data.corpus import add_input, shakespeare, write_characters

HERE = Path(__file__).resolve().parent


def main(argv=None):
    parser = Parser(__doc__)
    add_input(parser)
    args = parser.parse_args(argv)
    try:
        text = shakespeare(args.input, HERE)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        write_characters(HERE, text)
    except OSError as error:  # a full disk
        parser.error(str(error))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
