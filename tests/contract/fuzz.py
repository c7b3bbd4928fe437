"""Bad input for every project, in its own environment, by fuzz_run.py; and what tests/shared draws, many times over.

python tests/contract/fuzz.py [--seed=1 --project=jax_nanogpt --only=17]

Two run at a time. The last line of output counts: N passed, N failed.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.conventions.rules import ROOT, projects
from tests.tools.examples import Failed, python_of

HERE = Path(__file__).resolve().parent
SHARED = "shared"


class Result(NamedTuple):
    told: str
    passed: Counter  # by kind
    failed: Counter


def counted(kinds: Counter) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))


def fuzz(python: Path, root: Path, project: str, *options: str) -> Result:
    """One project's cases. A process that dies is a failure, with the case at which it did."""
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{project}-") as scratch:
        command = [python, HERE / "fuzz_run.py", project, scratch, "--root", root, *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        run = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
        )
        told, _, last = run.stdout.rstrip().rpartition("\n")
        try:
            counts = json.loads(last)
            return Result(told, Counter(counts["passed"]), Counter(counts["failed"]))
        except ValueError:
            now = Path(scratch, "now")
            case = now.read_text(encoding="utf-8") if now.exists() else "the beginning"
            return Result(f"{run.stdout}\nFAILED {project} {case}: the process died", Counter(), Counter(died=1))


def fuzz_shared(python: Path, root: Path) -> Result:
    """tests/shared with many more examples."""
    command = [python, "-m", "pytest", "-q", "tests/shared", "--hypothesis-profile=fuzz"]
    run = subprocess.run(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", run.stdout[-300:])}
    failed = sum(counts.get(word, 0) for word in ("failed", "error")) or int(run.returncode != 0)
    return Result(run.stdout * bool(failed), Counter(tests=counts.get("passed", 0)), Counter(tests=failed))


def main(root: Path, argv: "list[str] | None" = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="(default: any)")
    parser.add_argument("--project", action="append", help="repeatable (default: all, and shared)")
    args, others = parser.parse_known_args(argv)
    names = args.project or [SHARED, *projects(root)]
    print(f"seed {args.seed}: make fuzz FUZZ=--seed={args.seed} does this again", flush=True)
    try:
        pythons = {name: python_of(root, name) for name in names}
    except Failed as error:
        print(error)
        return 1

    def one(name: str) -> Result:
        if name == SHARED:
            return fuzz_shared(pythons[name], root)
        return fuzz(pythons[name], root, name, f"--seed={args.seed}", *others)

    passed, failed = Counter(), Counter()
    with ThreadPoolExecutor(2) as pool:
        for name, result in zip(names, pool.map(one, names), strict=True):
            print(
                f"\n== {name}: {counted(result.passed + result.failed)}; {result.failed.total()} failed",
                result.told,
                sep="\n",
                flush=True,
            )
            passed += result.passed
            failed += result.failed
    print("\n" + counted(passed + failed))
    print(f"{passed.total()} passed, {failed.total()} failed")
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main(ROOT))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
