"""What the four projects have in common: the tokenizer (which also finds the model) and sampling."""

import io
import os
import signal
import sys

FIRST, LAST = (3, 11), (3, 13)  # the Pythons that every pin of every project has a wheel for, on a CPU


def start_script(name):
    """What a script, by its __name__, does before it imports packages, so that three things end in no traceback.

    On a Python that its packages are not made for it ends in one line; scripts, and this file, are written so that
    Python 3.8 can still read them this far. Ctrl-C ends in one line also while packages are imported, which takes
    seconds. And a character that the console lacks is printed as its escape.
    """
    if not FIRST <= sys.version_info[:2] <= LAST:
        found, first, last = (".".join(map(str, version[:3])) for version in (sys.version_info, FIRST, LAST))
        print(f"Python is {found}, {first} to {last} is expected", file=sys.stderr)
        sys.exit(2)
    if name == "__main__":
        signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
