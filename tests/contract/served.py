"""A project's example in one process for many runs: engines take seconds to import."""

import json
import subprocess
import time
from pathlib import Path

from tests.tools.examples import Answer, command, environment_of, read_dump


class Served:
    def __init__(self, python: Path, root: Path, project: str, scratch: Path):
        self.root, self.project, self.scratch = root, project, scratch
        script = command(root, project, model="", prompt="", new_tokens=0, dump="")[0]
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("serve.py"), script],
            env=environment_of(scratch),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def ask(self, **settings) -> Answer:
        dump = self.scratch / "dump.npz"
        dump.unlink(missing_ok=True)
        _, *words = command(self.root, self.project, dump=dump, **settings)
        start = time.perf_counter()
        self.process.stdin.write(json.dumps({"words": words, "folder": str(self.scratch)}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Answer(**answer, seconds=time.perf_counter() - start, dump=read_dump(dump))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
