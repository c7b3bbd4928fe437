"""The rules of the house: what every project folder has, and what it keeps apart. CONTRIBUTING.md tells them."""

import ast
import configparser
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_PROJECTS = {"checkpoints", "shared", "tests"}
FILES = ("README.md", "model.py", "weight_loader.py", "bench.py", "requirements.txt")
EXAMPLES = ("example.py", "run_model.py", "sample.py")
SECTIONS = ("Introduction", "Running The Example", "How It Works", "Constraints", "Numbers")
HARDWARE = "On Your Hardware"
SHARED = {"__init__.py", "tokenizer.py", "sampling.py"}


def files(root: Path) -> list[Path]:
    """What git tracks or would add, relative to the root: a stray folder that git ignores is nobody's project."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in sorted({*listed.split("\0")} - {""}) if (root / name).is_file()]


def projects(root: Path) -> list[str]:
    """Every folder at the top but the few that are none."""
    tops = {path.parts[0] for path in files(root) if len(path.parts) > 1}
    return sorted(top for top in tops - NOT_PROJECTS if not top.startswith("."))


def env_of(project: str) -> str:
    """The name of its tox environment and of its folder under tests: tests/jax_nanogpt would say it twice."""
    return project.partition("_")[0]


def example_of(root: Path, project: str) -> str | None:
    return next((name for name in EXAMPLES if (root / project / name).is_file()), None)


def complaints(root: Path) -> list[str]:
    """One line for each rule that is broken; none for a house in order."""
    found = [
        f"shared/{path.relative_to('shared')} does not belong there: shared holds the tokenizer and sampling"
        for path in files(root)
        if path.parts[0] == "shared" and path.relative_to("shared").as_posix() not in SHARED
    ]
    for project in projects(root):
        found += [*_files(root, project), *_readme(root, project), *_pins(root, project), *_tests(root, project)]
    return [*found, *_imports(root)]


def _files(root: Path, project: str):
    for name in FILES:
        if not (root / project / name).is_file():
            yield f"{project}/{name} is missing"
    if not example_of(root, project):
        yield f"{project} has no example: one of {', '.join(EXAMPLES)}"


def _readme(root: Path, project: str):
    text = _text(root / project / "README.md")
    sections = re.findall(r"^##\s+(.*?)\s*$", text, re.M)
    if [section for section in sections if section in SECTIONS] != [*SECTIONS]:
        yield f"{project}/README.md needs the sections {', '.join(SECTIONS)}, in this order"
    if HARDWARE not in sections:
        yield f"{project}/README.md needs the section {HARDWARE}"
    if "```mermaid\nflowchart" not in text:
        yield f"{project}/README.md needs a mermaid flowchart of the way from weights to text"
    if f"]({project}/" not in _text(root / "README.md"):
        yield f"README.md has no link to {project}/"


def _pins(root: Path, project: str):
    for path in sorted((root / project).glob("requirements*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            requirement = line.partition("#")[0].strip()
            option = requirement.startswith(("-f ", "--find-links ", "--extra-index-url ", "-r "))
            pinned = re.search(r"==\d|@ git\+.*@[0-9a-f]{40}$", requirement)
            if requirement and not option and not pinned:
                yield f"{project}/{path.name} does not pin {requirement}"


def _tests(root: Path, project: str):
    env = env_of(project)
    if not [*(root / "tests" / env).glob("test_*.py")]:
        yield f"tests/{env} has no tests"
    tox = configparser.ConfigParser(interpolation=None)
    tox.read_string(_text(root / "tox.ini"))
    if env not in re.split(r"[,\s]+", tox.get("tox", "env_list", fallback="")):
        yield f"tox.ini's env_list lacks {env}"
    commands = tox.get(f"testenv:{env}", "commands", fallback="")
    for part in (f"tests/{env}", "tests/docs", f"--readme {project}/README.md"):
        if part not in commands:
            yield f"tox.ini's testenv:{env} does not run pytest with {part}"


def _imports(root: Path):
    """A project and its tests import no other project, and of ours only shared."""
    names = projects(root)
    owners = {name: name for name in names} | {f"tests/{env_of(name)}": name for name in names}
    for path in files(root):
        owner = owners.get(path.parts[0]) or owners.get("/".join(path.parts[:2]))
        if not owner and path.parts[0] != "shared":
            continue
        try:
            imported = {*_imported(root / path)}
        except (SyntaxError, ValueError) as error:
            yield f"{path} is not Python: {error}"
            continue
        for name in sorted(imported & {*names, "tests"} - {owner}):
            yield f"{path} imports {name}"


def _imported(path: Path):
    """The top-level names that a module or a notebook imports."""
    if path.suffix == ".py":
        sources = [path.read_text(encoding="utf-8")]
    elif path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        sources = [re.sub(r"^\s*[%!].*$", "", source, flags=re.M) for source in code]
    else:
        return
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.partition(".")[0]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
