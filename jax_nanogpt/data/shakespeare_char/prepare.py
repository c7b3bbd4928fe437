"""Tiny Shakespeare, a token a character: the last tenth is val.bin."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from shared import script, start_script

start_script(__name__)
from jax_nanogpt.data.corpus import arguments, shakespeare, write_characters

HERE = Path(__file__).resolve().parent


@script
def main(argv=None):
    given = arguments(__doc__).parse_args(argv).input
    write_characters(HERE, shakespeare(given, HERE))


if __name__ == "__main__":
    main()
