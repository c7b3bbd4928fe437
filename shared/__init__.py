"""What the four projects have in common: the tokenizer (which also finds the model) and sampling."""

import os
import signal
import sys

FIRST, LAST = (3, 11), (3, 13)  # the Pythons that every pin of every project has a wheel for


def start_script(name):
    """What each script, by its __name__, does before its imports: refuse a Python that they are not made for, and let
    Ctrl-C end in one line while they last, which is seconds.

    Scripts, and this file, are written so that Python 3.8 can still read them this far.
    """
    if not FIRST <= sys.version_info[:2] <= LAST:
        found, first, last = (".".join(map(str, version[:3])) for version in (sys.version_info, FIRST, LAST))
        print(f"Python is {found}, {first} to {last} is expected", file=sys.stderr)
        sys.exit(2)
    if name == "__main__":
        signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))
