"""A worker (tests/tools/worker.py) as a process to ask: each engine runs in one of its own."""

import json
import os
import re
import subprocess
from pathlib import Path

from tests.conventions.rules import ROOT
from tests.tools import machine
from tests.tools.examples import Failed


class Worker:
    """The process of one engine; home is its working folder, and that of all its caches."""

    def __init__(self, root: Path, python: Path, words: list, home: Path):
        home.mkdir(parents=True, exist_ok=True)
        self.log = (home / "stderr").open("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            [python, "-m", "tests.tools.worker", *words],
            cwd=home,
            env=environment(root, home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            encoding="utf-8",
            start_new_session=True,  # a Ctrl-C reaches this process alone, which ends that one
        )

    def ask(self, **request) -> dict:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            self.process.wait()
            self.log.seek(0)
            message = error_line(self.log.read().split("\n"))
            raise Failed(f"FAILED with exit status {self.process.returncode}: {message}") from None

    def close(self) -> None:
        """Lets the process end by itself, which may still store what it compiled."""
        self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self.log.close()


def error_line(lines: list[str]) -> str:
    """The exception's line, which some libraries follow by advice; or else the last."""
    return last_line([line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]) or last_line(lines)


def last_line(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def environment(root: Path, home: Path) -> dict[str, str]:
    caches = {"XDG_CACHE_HOME": home, "QEFF_HOME": home / "qeff", "TORCHINDUCTOR_CACHE_DIR": home / "inductor"}
    settings = {"PYTHONUTF8": 1, "HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": machine.cores()}
    settings |= {"PYTHONPATH": f"{root}{os.pathsep}{ROOT}"}
    return os.environ | {name: str(value) for name, value in (caches | settings).items()}
