"""What the four projects have in common: the tokenizer (which also finds the model) and sampling."""

import sys

FIRST, LAST = (3, 11), (3, 13)  # the Pythons that every pin of every project has a wheel for


def check_python():
    """End a script, in one line, on a Python that its packages are not made for: before the imports that would fail.

    Scripts, and this file, are written so that Python 3.8 can still read them this far.
    """
    if not FIRST <= sys.version_info[:2] <= LAST:
        found, first, last = (".".join(map(str, version[:3])) for version in (sys.version_info, FIRST, LAST))
        print(f"Python is {found}, {first} to {last} is expected", file=sys.stderr)
        sys.exit(2)
