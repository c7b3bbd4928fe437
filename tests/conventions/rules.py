"""What a project folder holds, and how its parts are named. CONTRIBUTING.md describes it."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_PROJECTS = {"checkpoints", "shared", "tests"}
FILES = ("README.md", "model.py", "weight_loader.py", "cli.py", "bench.py", "requirements.txt")
EXAMPLES = ("example.py", "run_model.py", "sample.py")
SECTIONS = ["Introduction", "Running The Example", "How It Works", "Constraints", "Numbers"]
SHARED = {"__init__.py", "tokenizer.py", "sampling.py"}
# options and shell words that leave out a test or ignore a failure
WEAKENS = re.compile(
    r"^@?\+?[-!]|posargs:|\|\||;\s*(true|:)|set \+e|&\s*$|continue-on-error|PYTEST_ADDOPTS|TOX_SKIP"
    r"|\s(-k|-m(?! pip| tox)|-x|--co|--deselect|--exit-zero|--ignore|--ignore-glob|--lf|--notest)\b"
)


def files(root: Path) -> list[Path]:
    """The files that git tracks or would add, relative to the root."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        listed = [path.relative_to(root).as_posix() for path in root.rglob("*")]
    return [Path(name) for name in sorted({*listed} - {""}) if (root / name).is_file()]


def projects(root: Path) -> list[str]:
    tops = {path.parts[0] for path in files(root) if len(path.parts) > 1}
    return sorted(top for top in tops - NOT_PROJECTS if not top.startswith("."))


def env_of(project: str) -> str:
    """The name of its tox environment and of its folder under tests: tests/jax_nanogpt would say it twice."""
    return project.partition("_")[0]


def example_of(root: Path, project: str) -> str | None:
    return next((name for name in EXAMPLES if (root / project / name).is_file()), None)


def sections(readme: str) -> list[str]:
    """The level-2 headings, without those in code blocks and comments."""
    return re.findall(r"^## (.*?)\s*$", re.sub(r"^(```|~~~).*?^\1|<!--.*?-->", "", readme, flags=re.M | re.S), re.M)


def unpinned(requirements: str) -> list[str]:
    """The lines that are neither an option nor an exact version nor a git commit."""
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in requirements.splitlines()]
    exact = re.compile(r"[\w.\[\],-]+==[\w.+!]+(\s*;.*)?|[\w-]+ @ git\+\S+@[0-9a-f]{40}")
    option = re.compile(r"(-f|--find-links|--extra-index-url|-r) .*|")
    return [line for line in lines if not exact.fullmatch(line) and not option.fullmatch(line)]
