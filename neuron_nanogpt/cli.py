"""What each script imports first: a missing package, like a wrong flag, ends in one line."""

import argparse
import difflib
import re
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("huggingface_hub", "numpy", "safetensors", "tiktoken", "torch")
INSTALL = "pip install -r requirements-cpu.txt (on a Neuron instance requirements.txt)"

# -- from here on, the same in each project


class Parser(argparse.ArgumentParser):
    """An error is one line, --max_new_tokens is --max-new-tokens, and an unknown flag names the nearest one."""

    def __init__(self, description: str):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(usage=argparse.SUPPRESS, description=description, formatter_class=layout)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        words = sys.argv[1:] if argv is None else argv
        words = [re.sub(r"^--\w[\w-]*(?==|$)", lambda flag: flag[0].replace("_", "-"), word) for word in words]
        args, unknown = self.parse_known_args(words)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + "".join(f"; did you mean {n}?" for n in near))
        values = vars(args).values()
        if [] in values or any([] in value for value in values if isinstance(value, list)):
            self.error("-- must not be the value of a flag")  # argparse parses --flag=-- as [] before Python 3.13
        return args


if missing := [name for name in PACKAGES if not find_spec(name)]:
    Parser("").error(f"not installed: {', '.join(missing)}; in {Path(__file__).resolve().parent} run {INSTALL}")
