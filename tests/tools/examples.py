"""How each project's example is asked for a text: for make demo, make bench and tests/contract."""

import fcntl
import io
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.conventions.rules import env_of, example_of

OPTIONS = (
    "--model={model} --prompt={prompt} --max-new-tokens={new_tokens} --dtype=float32 --temperature={temperature} "
    "--top-k={top_k} --seed={seed} --ignore-eos --dump={dump}"
)


class Example(NamedTuple):
    options: str = OPTIONS
    slides: bool = False  # past the context, by nanoGPT's crop; otherwise the text ends there
    numpy: bool = True  # samples by shared/sampling.py


EXAMPLES = {
    "jax_nanogpt": Example(f"{OPTIONS} --num-samples=1", slides=True, numpy=False),
    "neuron_nanogpt": Example(slides=True),
    "qaic_gpt2": Example(),
    "tripy_nanogpt": Example(),
}


class Failed(Exception):
    """What a line of the demo says of a project that did not come to its end."""


class Answer(NamedTuple):
    status: int
    stdout: str
    stderr: str
    seconds: float
    dump: "dict[str, np.ndarray] | None"  # prompt_ids, tokens and logits


def python_of(root: Path, project: str) -> Path:
    return make_environment(root, env_of(project))


@cache
def make_environment(root: Path, env: str) -> Path:
    """The python of one of tox's environments, which is made now unless it is there."""
    python = root / ".tox" / env / "bin" / "python"
    if not python.exists():
        print(f" (its environment is being made, in .tox/{env}: a minute or two)", flush=True)
    with (root / ".tox" / f"{env}.lock").open("wb") as lock:  # tox does not expect to run twice at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = subprocess.run([sys.executable, "-m", "tox", "run", "-qq", "--notest", "-e", env], cwd=root)
    if made.returncode:
        raise Failed(f"FAILED to make its environment (tox run -e {env})")
    return python


def command(root: Path, project: str, **settings) -> list[str]:
    """The example's script and its options."""
    script = example_of(root, project)
    if not script:
        raise Failed("FAILED, for it has no example,")
    if project not in EXAMPLES:
        raise Failed("FAILED, for tests/tools/examples.py does not say how to ask it,")
    settings = {"temperature": 0, "top_k": 50, "seed": 1} | settings
    return [str(root / project / script), *(word.format(**settings) for word in EXAMPLES[project].options.split())]


def environment_of(scratch: Path) -> dict[str, str]:
    """scratch is the home of what QEfficient keeps."""
    return os.environ | {"QEFF_HOME": str(scratch / "qeff"), "PYTHONUTF8": "1"}


def read_dump(path: Path) -> "dict[str, np.ndarray] | None":
    return dict(np.load(io.BytesIO(path.read_bytes()))) if path.exists() else None


def ask(python: Path, root: Path, project: str, scratch: Path, **settings) -> Answer:
    """Runs the example as a process that starts in the folder scratch."""
    dump = scratch / "dump.npz"
    dump.unlink(missing_ok=True)
    words = [str(python), *command(root, project, dump=dump, **settings)]
    start = time.perf_counter()
    run = subprocess.run(
        words, cwd=scratch, env=environment_of(scratch), capture_output=True, text=True, encoding="utf-8"
    )
    return Answer(run.returncode, run.stdout, run.stderr, time.perf_counter() - start, read_dump(dump))
