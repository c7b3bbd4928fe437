"""One process that runs a project's scripts many times: engines take seconds to import."""

import json
import os
import select
import subprocess
import time
from pathlib import Path

from tests.tools.examples import Answer, command, environment_of, read_dump

LIMIT_S = 300  # for one run, also on a busy machine


class Served:
    def __init__(self, python: Path, root: Path, project: str, scratch: Path, **environment: str):
        self.python, self.root, self.project, self.scratch = python, root, project, scratch
        self.environment = environment_of(scratch) | environment
        self.process = None

    def ask(self, **settings) -> Answer:
        """The example's answer; settings as in tests/tools/examples.py."""
        dump = self.scratch / "dump.npz"
        dump.unlink(missing_ok=True)
        script, *words = command(self.root, self.project, dump=dump, **settings)
        return self.run(Path(script).name, words, self.scratch)._replace(dump=read_dump(dump))

    def run(self, script: str, words: list[str], folder: Path) -> Answer:
        """How the script ends. A run without an end, or that ends the process itself, has a signal's status."""
        self.process = self.process or self.start()
        start = time.perf_counter()
        self.process.stdin.write(json.dumps({"script": script, "words": words, "folder": str(folder)}) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], LIMIT_S)[0]:
            self.process.kill()
        line = self.process.stdout.readline()
        seconds = time.perf_counter() - start
        if line:
            return Answer(**json.loads(line), seconds=seconds, dump=None)
        status, self.process = self.process.wait(), None
        return Answer(status, "", f"the process died after {seconds:.0f} s", seconds, None)

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [self.python, Path(__file__).with_name("serve.py"), self.root / self.project],
            env=os.environ | self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def close(self) -> None:
        if self.process:
            self.process.stdin.close()
            self.process.wait()
