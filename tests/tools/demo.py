"""One prompt, every project: each writes on in its own environment, on its own engine. The last lines: do they agree?

python tests/tools/demo.py
"""

import os
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np

from tests.conventions.rules import ROOT, projects
from tests.tools.examples import Answer, Failed, ask, python_of

sys.path.insert(0, str(ROOT))
from shared.tokenizer import BPE, load_tokenizer

MODEL = ROOT / "checkpoints" / "gpt2-nano"
PROMPT = "JULIET:\nO Romeo,"
NEW_TOKENS = 36
NEAR = 1e-3  # of a logit; rounding in float32 makes 1e-5


def main(root: Path) -> int:
    names = projects(root)
    if not names:
        print("There are no projects in this checkout yet: nothing to demo.")
        return 0
    print(f"One GPT-2, {len(names)} engines: gpt2-nano goes on from {PROMPT!r}, greedily and in float32.", flush=True)
    tokenizer = load_tokenizer(MODEL)
    dumps, ends = {}, {}
    for name in names:
        print(f"\n== {name}", end="", flush=True)
        try:
            python = python_of(root, name)
            with tempfile.TemporaryDirectory() as scratch:
                answer = ask(python, root, name, Path(scratch), model=MODEL, prompt=PROMPT, new_tokens=NEW_TOKENS)
        except Failed as error:
            print()
            ends[name] = f"{error} in 0 s"
            continue
        if answer.status or not answer.dump:
            print(flush=True)
            print(answer.stderr, end="", file=sys.stderr, flush=True)
            ends[name] = f"FAILED with exit status {answer.status} in {answer.seconds:.0f} s"
            continue
        dumps[name], ends[name] = answer.dump, f"done in {answer.seconds:.0f} s"
        print(told(answer, tokenizer), flush=True)
    print()
    for name, end in ends.items():
        print(f"{name}: {end}")
    if len(dumps) > 1:
        print()
        print(verdict := agreement(dumps, tokenizer))
    return int(len(dumps) < len(names) or len(dumps) > 1 and not verdict.startswith("They agree"))


def told(answer: Answer, tokenizer: BPE) -> str:
    """What the example's first line says of its engine, and its text."""
    engine = answer.stdout.partition("\n")[0].partition(") on ")[2]
    text = tokenizer.decode(map(int, [*answer.dump["prompt_ids"], *answer.dump["tokens"]])).strip()
    return f" on {engine}\n{textwrap.indent(text, '    ')}"


def agreement(dumps: dict[str, dict[str, np.ndarray]], tokenizer: BPE) -> str:
    """Whether all wrote the same, and how far apart their logits are; or where the first two part, with both texts."""
    first, *others = dumps
    for other in others:
        a, b = ([*dumps[name]["prompt_ids"].tolist(), *dumps[name]["tokens"].tolist()] for name in (first, other))
        if a != b:
            place = next((i for i, pair in enumerate(zip(a, b, strict=False)) if len({*pair}) > 1), min(len(a), len(b)))
            texts = "".join(f"\n  {name}: {tokenizer.decode(ids[place:])!r}" for name, ids in ((first, a), (other, b)))
            both = tokenizer.decode(a[:place])
            return f"They DISAGREE: {first} and {other} part at token {place}, behind {both!r}:{texts}"
    logits = np.stack([dump["logits"] for dump in dumps.values()])
    apart = float((logits.max(axis=0) - logits.min(axis=0)).max())
    if not apart <= NEAR:  # also where it is no number
        return f"They DISAGREE: the tokens are the same, but their logits are up to {apart:.1e} apart."
    return f"They agree: the same {logits.shape[1]} tokens, and no logit further apart than {apart:.1e}."


if __name__ == "__main__":
    try:
        sys.exit(main(ROOT))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader has seen enough, as in `| head`; what is left must not be flushed there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
