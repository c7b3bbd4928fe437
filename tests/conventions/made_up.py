"""A house with two projects, both with `_` in their names, and what lies about in a real one: for tests to break."""

import json
import subprocess
from pathlib import Path

README = """# Alpha
## Introduction
## Running The Example
## How It Works
```mermaid
flowchart LR
```
## Constraints
## Numbers
## On Your Hardware
"""
TOX = """[tox]
env_list = lint, shared, alpha,
    beta, parity
[testenv:lint]
commands =
    ruff check
    ruff format --check
[testenv:shared]
commands = pytest tests/shared tests/conventions tests/tools tests/docs --readme README.md {posargs}
[testenv:alpha]
commands = pytest tests/alpha tests/docs/test_readme.py --readme alpha_gpt2/README.md {posargs}
[testenv:beta]
commands = pytest tests/beta tests/docs/test_readme.py --readme beta_nano_gpt/README.md {posargs}
[testenv:parity]
depends = shared, alpha, beta
commands = pytest tests/contract {posargs}
[testenv:bench]
commands = python tests/tools/bench.py {posargs}
"""
EXAMPLES = """EXAMPLES = {
    "alpha_gpt2": Example("--dump={dump}"),
    "beta_nano_gpt": Example("--dump={dump}"),
}
"""
PYPROJECT = """[tool.pytest.ini_options]
addopts = ["--import-mode=importlib", "--strict-markers", "-ra"]
testpaths = ["tests"]
xfail_strict = true
"""
MAKEFILE = """TOX = .venv/bin/tox
JOBS ?= 2
.PHONY: test bench
test: $(TOX)
\t$(TOX) run-parallel -p $(JOBS) \\
\t  --parallel-no-spinner
bench: $(TOX)
\t@$(TOX) run -qq -e bench -- $(BENCH)
$(TOX): Makefile
\t@command -v python3 >/dev/null || \\
\t  { echo "python3 is not there" >&2; exit 1; }
"""
CI = """#!/usr/bin/env bash
# the two commands of README.md
set -euo pipefail
cd "$(dirname "$0")/.."
make test
ONEDNN_MAX_CPU_ISA=AVX2 .venv/bin/tox run -e alpha
make demo
"""
WORKFLOW = """jobs:
  test:
    steps:
      - run: .ci/run
      - if: always()
        run: cat report.md
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make_house(root: Path) -> None:
    subprocess.run(["git", "init", "--quiet", root], check=True)
    write(
        root / "README.md", "[alpha](alpha_gpt2/) [beta](beta_nano_gpt/README.md)\n```bash\nmake test\nmake demo\n```\n"
    )
    write(root / "tox.ini", TOX)
    write(root / ".gitignore", "ignored_gpt2/\n")
    write(root / "ignored_gpt2" / "model.py", "import alpha_gpt2")
    write(root / "checkpoints" / "gpt2-nano" / "config.json", "{}")
    write(root / "pyproject.toml", PYPROJECT)
    write(root / "Makefile", MAKEFILE)
    write(root / ".ci" / "run", CI)
    write(root / ".github" / "workflows" / "ci.yml", WORKFLOW)
    for folder in ("shared", "conventions", "tools", "docs", "contract"):
        write(root / "tests" / folder / "test_it.py", "def test_it(): ...\n")
    for name in ("__init__", "tokenizer", "sampling"):
        write(root / "shared" / f"{name}.py", "import numpy")
    write(root / "tests" / "tools" / "examples.py", EXAMPLES)
    for project, example in (("alpha_gpt2", "example.py"), ("beta_nano_gpt", "run_model.py")):
        folder = root / project
        write(folder / "README.md", README)
        write(folder / "requirements.txt", "# pins\nnumpy==2.4.6  # exact\n--extra-index-url https://vendor.example\n")
        write(folder / "requirements-cpu.txt", f"pkg @ git+https://vendor.example/pkg@{40 * 'a'}\n")
        for name in ("model.py", "weight_loader.py", "bench.py", example):
            write(folder / name, f"import numpy\nfrom shared.tokenizer import find_model\nfrom {project} import x\n")
        cells = [
            {
                "cell_type": "code",
                "source": ["%%time\n", "if x:\n", "    !pip install \\\n", "y = !ls\n", "import numpy\n"],
            }
        ]
        write(folder / "notes.ipynb", json.dumps({"cells": [*cells, {"cell_type": "markdown", "source": ["import!"]}]}))
        write(
            root / "tests" / project.split("_")[0] / "test_model.py",
            f"import {project}.model\ndef test_it(): ...\n",
        )
