"""The rules of the house: what every project folder has, and what it keeps apart. CONTRIBUTING.md tells them."""

import ast
import configparser
import json
import re
import subprocess
from pathlib import Path

from tests.conventions import suite
from tests.conventions.suite import read

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
    try:
        listed = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        listed = [path.relative_to(root).as_posix() for path in root.rglob("*")]
    return [Path(name) for name in sorted({*listed} - {""}) if (root / name).is_file()]


def projects(root: Path, paths: "list[Path] | None" = None) -> list[str]:
    """Every folder at the top but the few that are none."""
    tops = {path.parts[0] for path in paths or files(root) if len(path.parts) > 1}
    return sorted(top for top in tops - NOT_PROJECTS if not top.startswith("."))


def env_of(project: str) -> str:
    """The name of its tox environment and of its folder under tests: tests/jax_nanogpt would say it twice."""
    return project.partition("_")[0]


def example_of(root: Path, project: str) -> str | None:
    return next((name for name in EXAMPLES if (root / project / name).is_file()), None)


def complaints(root: Path) -> list[str]:
    """One line for each rule that is broken; none for a house in order."""
    paths = files(root)
    names = projects(root, paths)
    found = [*_shared(paths), *_imports(root, paths, names)]
    for project in names:
        found += [*_files(root, project), *_readme(root, project), *_example(root, project)]
        found += [*_pins(root, project), *_tests(root, project)]
    return found + suite.complaints(root, paths, [*map(env_of, names)])


def _shared(paths: list[Path]):
    held = {path.relative_to("shared").as_posix() for path in paths if path.parts[0] == "shared"}
    for name in sorted(held - SHARED):
        yield f"shared/{name} does not belong there: shared holds the tokenizer and sampling"
    for name in sorted(SHARED - held):
        yield f"shared/{name} is missing"
    for path in paths:
        if path.parts[0] == "tests" and path.name == "__init__.py":
            yield f"{path} would make tests/jax shadow jax: no packages under tests"


def _files(root: Path, project: str):
    for name in FILES:
        if not read(root / project / name).strip():
            yield f"{project}/{name} is missing or empty"
    if not example_of(root, project):
        yield f"{project} has no example: one of {', '.join(EXAMPLES)}"


def _readme(root: Path, project: str):
    text = read(root / project / "README.md")
    prose = re.sub(r"^\s*(```|~~~).*?^\s*\1|<!--.*?-->", "", text, flags=re.M | re.S)
    sections = re.findall(r"^##\s+(.*?)\s*$", prose, re.M)
    if [section for section in sections if section in SECTIONS] != [*SECTIONS]:
        yield f"{project}/README.md needs the sections {', '.join(SECTIONS)}, in this order"
    if HARDWARE not in sections:
        yield f"{project}/README.md needs the section {HARDWARE}"
    if not re.search(r"^```mermaid\nflowchart", text, re.M):
        yield f"{project}/README.md needs a mermaid flowchart of the way from weights to text"
    if f"]({project}/" not in read(root / "README.md"):
        yield f"README.md has no link to {project}/"


def _example(root: Path, project: str):
    if f'"{project}": Example(' not in read(root / "tests" / "tools" / "examples.py"):
        yield f"tests/tools/examples.py does not say how to ask {project} for a text"


def _pins(root: Path, project: str):
    tests = root / "tests" / env_of(project)
    for path in sorted([*(root / project).glob("requirements*.txt"), *tests.glob("requirements*.txt")]):
        for line in read(path).splitlines():
            requirement = re.sub(r"(^|\s)#.*", "", line).strip()
            option = requirement.startswith(("-f ", "--find-links ", "--extra-index-url ", "-r "))
            exact = re.fullmatch(r"[\w.\[\],-]+==[\w.+!]+(\s*;.*)?|[\w-]+ @ git\+\S+@[0-9a-f]{40}", requirement)
            if requirement and not option and not exact:
                yield f"{path.relative_to(root)} does not pin {requirement}"


def _tests(root: Path, project: str):
    env = env_of(project)
    if not any(re.search(r"^def test_", read(path), re.M) for path in (root / "tests" / env).glob("test_*.py")):
        yield f"tests/{env} has no tests"
    tox = configparser.ConfigParser(interpolation=None)
    tox.read_string(read(root / "tox.ini"))
    if env not in re.split(r"[,\s]+", tox.get("tox", "env_list", fallback="")):
        yield f"tox.ini's env_list lacks {env}"
    wanted = f"pytest tests/{env} tests/docs/test_readme.py --readme {project}/README.md"
    commands = tox.get(f"testenv:{env}", "commands", fallback="").strip().splitlines()
    if not any(f"{wanted} " in f"{command} " for command in commands):
        yield f"tox.ini's testenv:{env} does not run {wanted}"


def _imports(root: Path, paths: list[Path], names: list[str]):
    """A project and its tests import no other project, and of ours only shared."""
    owners = {name: name for name in names} | {f"tests/{env_of(name)}": name for name in names} | {"shared": "shared"}
    for path in paths:
        owner = owners.get(path.parts[0]) or owners.get("/".join(path.parts[:2]))
        if not owner:
            continue
        try:
            imported = {name.partition(".")[0] for name in _imported(root / path)}
        except (SyntaxError, ValueError) as error:
            yield f"{path} cannot be read: {error}"
            continue
        own = {owner} | ({"tests"} if path.parts[0] == "tests" else set())
        for name in sorted(imported & {*names, "tests"} - own):
            yield f"{path} imports {name}"


def _imported(path: Path):
    """The names that a module or a notebook imports, and texts that could name a module to import."""
    if path.suffix == ".ipynb":
        for cell in json.loads(read(path)).get("cells", []):
            if cell["cell_type"] == "code":  # with magics and shell lines in it: no Python that ast would read
                yield from re.findall(r"^\s*(?:from|import)\s+([\w.]+)", "".join(cell["source"]), re.M)
    elif path.suffix == ".py":
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module or ""
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
                yield node.value
