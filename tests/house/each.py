"""Run one script of every project, each in its own tox environment: its example (demo) or its bench.py (bench).

python tests/house/each.py demo
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from house import ROOT, env_of, example_of, projects


def main(root: Path, what: str) -> int:
    names = projects(root)
    if not names:
        print(f"There are no projects in this checkout yet: nothing to {what}.")
        return 0
    results = {name: run(root, name, example_of(root, name) if what == "demo" else "bench.py") for name in names}
    print()
    for name, (outcome, seconds) in results.items():
        print(f"{name}: {outcome} in {seconds:.0f} s")
    return any(outcome != "done" for outcome, _ in results.values())


def run(root: Path, project: str, script: "str | None") -> tuple[str, float]:
    """How it went, and its seconds, less what making the environment took."""
    if not script:
        return "FAILED, for it has no example,", 0.0
    env = env_of(project)
    print(f"\n== {project}: cd {project} && python {script}", flush=True)
    made = subprocess.run([sys.executable, "-m", "tox", "run", "-qq", "--notest", "-e", env], cwd=root)
    if made.returncode:
        return f"FAILED to make its environment (tox run -e {env})", 0.0
    start = time.perf_counter()
    status = subprocess.run([root / ".tox" / env / "bin" / "python", script], cwd=root / project).returncode
    return "done" if status == 0 else f"FAILED with exit status {status}", time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["demo", "bench"])
    sys.exit(main(ROOT, parser.parse_args().what))
