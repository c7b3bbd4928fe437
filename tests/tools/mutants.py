"""Mutation testing: puts one fault at a time into a copy of the repository, and expects tests to fail.

    make mutants                                          # all
    make mutants MUTANTS="--env jax"                      # one environment's
    make mutants MUTANTS="--env qaic --about throughput"  # those with this word in their description

The faults are in tests/*/mutants*.toml: the file, the text to replace, what replaces it, and the narrowest tests that
should fail. For a fault that no test can notice, `survives` says why.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import tomllib

from tests.conventions.rules import ROOT, files

LIMIT_S = 300  # a fault can make a test run forever


@dataclass(frozen=True)
class Mutant:
    env: str  # of tox
    about: str
    file: str
    right: str
    wrong: str
    tests: str  # pytest's arguments
    survives: str = ""  # why no test can notice it

    def text(self, root: Path) -> str:
        """The file with the fault in it."""
        text = (root / self.file).read_text(encoding="utf-8")
        if text.count(self.right) != 1:
            raise ValueError(f"{self.file} must hold {self.right!r} once, got {text.count(self.right)} ({self.about})")
        return text.replace(self.right, self.wrong)


def read_mutants(root: Path) -> list[Mutant]:
    found = []
    for path in sorted(root.glob("tests/*/mutants*.toml")):
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
        env = "parity" if path.parent.name == "contract" else path.parent.name
        found += [Mutant(env, **entry) for entry in entries]
    return found


def copy_repository(root: Path, copy: Path) -> Path:
    for name in files(root):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, copy / name)
    (copy / ".tox").symlink_to(root / ".tox")
    return copy


def run_tests(python: Path, copy: Path, tests: str) -> tuple[int, str]:
    """pytest's exit status in the copy, and the end of what it printed."""
    # no .pyc: Python compares its source's size and time in seconds, and a fault may have both of the original
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TOX_SKIP_ENV_INSTALL": "1"}
    command = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
    try:
        run = subprocess.run(command, cwd=copy, env=env, capture_output=True, encoding="utf-8", timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return 1, f"still running after {LIMIT_S} s"
    return run.returncode, run.stdout[-2000:] + run.stderr[-1000:]


def outcome_of(mutant: Mutant, status: int) -> str:
    """pytest exits with 1 if tests failed; with 2 to 5 if it could not run them."""
    outcome = {0: "survived", 1: "killed"}.get(status, "broken")
    return "explained" if outcome == "survived" and mutant.survives else outcome


def try_one(copies: SimpleQueue, env: str, tests: str, mutant: Mutant | None) -> tuple[int, str, float]:
    """(exit status, output, seconds) of these tests with the fault, in a copy that no other thread uses."""
    copy, start = copies.get(), time.perf_counter()
    try:
        if mutant:
            (copy / mutant.file).write_text(mutant.text(ROOT), encoding="utf-8")
        return *run_tests(ROOT / ".tox" / env / "bin" / "python", copy, tests), time.perf_counter() - start
    finally:
        if mutant:
            shutil.copy(ROOT / mutant.file, copy / mutant.file)
        copies.put(copy)


def try_all(mutants: list[Mutant], jobs: int, scratch: Path) -> Counter:
    """Counts of (env, outcome); prints a line for each fault."""
    copies = SimpleQueue()
    for job in range(jobs):
        copies.put(copy_repository(ROOT, scratch / str(job)))
    attempt, counts = partial(try_one, copies), Counter()
    with ThreadPoolExecutor(jobs) as pool:
        selections = sorted({(mutant.env, mutant.tests) for mutant in mutants})
        sound = pool.map(lambda selection: attempt(*selection, None), selections)
        for (env, tests), (status, output, _) in zip(selections, sound, strict=True):
            if status:
                sys.exit(f"{env}: these tests must pass without a fault: pytest {tests}\n{output}")
        tried = pool.map(lambda mutant: attempt(mutant.env, mutant.tests, mutant), mutants)
        for mutant, (status, output, seconds) in zip(mutants, tried, strict=True):
            outcome = outcome_of(mutant, status)
            counts[mutant.env, outcome] += 1
            print(f"{outcome:9} {mutant.env:7} {seconds:5.1f} s  {mutant.file}: {mutant.about}", flush=True)
            if outcome in ("survived", "broken"):
                print(f"  pytest {mutant.tests}\n{output}", flush=True)
    return counts


def report(counts: Counter) -> str:
    """A line for each environment: jax: 3 killed of 4, 1 survived."""
    lines = []
    for env in sorted({env for env, _ in counts}):
        own = {outcome: counts[env, outcome] for outcome in ("killed", "survived", "explained", "broken")}
        others = "".join(f", {count} {outcome}" for outcome, count in own.items() if count and outcome != "killed")
        lines.append(f"{env}: {own['killed']} killed of {sum(own.values())}{others}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", action="append", help="only this environment's faults (may be repeated)")
    parser.add_argument("--about", default="", help="only faults whose description contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time (default: %(default)s)")
    args = parser.parse_args(argv)
    mutants = [m for m in read_mutants(ROOT) if args.about in m.about and (not args.env or m.env in args.env)]
    if not mutants:
        parser.error("no fault has this env and this description")
    for env in sorted({mutant.env for mutant in mutants}):
        subprocess.run([sys.executable, "-m", "tox", "run", "-qq", "--notest", "-e", env], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as scratch:
        counts = try_all(mutants, args.jobs, Path(scratch))
    print(report(counts))
    return int(any(outcome in ("survived", "broken") for _, outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
