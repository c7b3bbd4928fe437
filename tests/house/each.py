"""Run one script of every project, each in its own tox environment: its example (demo) or its bench.py (bench).

python tests/house/each.py demo
"""

import subprocess
import sys
import time

from house import ROOT, env_of, example_of, projects


def main(what: str) -> int:
    names = projects(ROOT)
    if not names:
        print(f"There are no projects in this checkout yet: nothing to {what}.")
        return 0
    results = [(name, run(name, example_of(ROOT, name) if what == "demo" else "bench.py")) for name in names]
    print()
    for name, (status, seconds) in results:
        print(f"{name}: {'done' if status == 0 else f'FAILED with exit status {status}'} in {seconds:.0f} s")
    return any(status for _, (status, _) in results)


def run(project: str, script: str) -> tuple[int, float]:
    """Exit status and seconds, less what making the environment took."""
    env = env_of(project)
    print(f"\n== {project}: cd {project} && python {script}", flush=True)
    made = subprocess.run([sys.executable, "-m", "tox", "run", "-qq", "--notest", "-e", env], cwd=ROOT)
    if made.returncode:
        return made.returncode, 0.0
    start = time.perf_counter()
    python = ROOT / ".tox" / env / "bin" / "python"
    status = subprocess.run([python, script], cwd=ROOT / project).returncode
    return status, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
