"""Asks every project for the same text, each in its own environment, and compares the tokens and logits.

python -m tests.tools.demo
"""

import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np

from shared.tokenizer import BPE, load_tokenizer
from tests.conventions.rules import ROOT, projects
from tests.tools.examples import Answer, Failed, ask, python_of

MODEL = ROOT / "checkpoints" / "gpt2-nano"
PROMPT = "JULIET:\nO Romeo,"
NEW_TOKENS = 36
MOST_APART = 1e-3  # of two logits; rounding in float32 makes 1e-5


def main(root: Path) -> int:
    names = projects(root)
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
            ends[name] = str(error)
            continue
        if answer.status or not answer.dump:
            print(flush=True)
            print(answer.stderr, end="", file=sys.stderr, flush=True)
            ends[name] = f"FAILED with exit status {answer.status} in {answer.seconds:.0f} s"
            continue
        dumps[name], ends[name] = answer.dump, f"done in {answer.seconds:.0f} s"
        print(f" on {engine_and_text(answer, tokenizer)}", flush=True)
    print()
    for name, end in ends.items():
        print(f"{name}: {end}")
    verdict = agreement(dumps, tokenizer) if dumps else "They DISAGREE: no project wrote a text."
    print(f"\n{verdict}")
    return int(len(dumps) < len(names) or "DISAGREE" in verdict)


def engine_and_text(answer: Answer, tokenizer: BPE) -> str:
    """The engine that the example's first line names, and its text."""
    engine = answer.stdout.partition("\n")[0].partition(") on ")[2]
    text = tokenizer.decode(map(int, [*answer.dump["prompt_ids"], *answer.dump["tokens"]])).strip()
    return f"{engine}\n{textwrap.indent(text, '    ')}"


def agreement(dumps: dict[str, dict[str, np.ndarray]], tokenizer: BPE) -> str:
    """Whether all have the same tokens and nearly the same logits, or the first place where two differ."""
    first, *others = dumps
    for other in others:
        a, b = ([*dumps[name]["prompt_ids"].tolist(), *dumps[name]["tokens"].tolist()] for name in (first, other))
        if a != b:
            place = next((i for i, pair in enumerate(zip(a, b, strict=False)) if len({*pair}) > 1), min(len(a), len(b)))
            texts = "".join(f"\n  {name}: {tokenizer.decode(ids[place:])!r}" for name, ids in ((first, a), (other, b)))
            both = tokenizer.decode(a[:place])
            return f"They DISAGREE: {first} and {other} differ from token {place}, after {both!r}:{texts}"
    logits = np.stack([dump["logits"] for dump in dumps.values()])
    apart = float((logits.max(axis=0) - logits.min(axis=0)).max())
    if not apart <= MOST_APART:  # NaN is not
        return f"They DISAGREE: the tokens are the same, but their logits differ by up to {apart:.1e}."
    return f"They agree: the same {logits.shape[1]} tokens, and no logit further apart than {apart:.1e}."


if __name__ == "__main__":
    try:
        sys.exit(main(ROOT))
    except KeyboardInterrupt:
        sys.exit(130)
