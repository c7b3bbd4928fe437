"""The help texts that every CPython carries, a token a character: no download. The last tenth is val.bin."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from shared import fail, script, start_script

start_script(__name__)
from jax_nanogpt.data.corpus import pydoc_topics, write_characters

HERE = Path(__file__).resolve().parent


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.error = fail
    parser.parse_args(argv)
    write_characters(HERE, "\n".join(pydoc_topics().values()))


if __name__ == "__main__":
    main()
