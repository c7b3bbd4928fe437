"""What keeps `make test` honest: it runs every test, and one that fails makes it fail.

complaints() reads what could deselect a test or ignore its outcome: tox.ini, pyproject.toml, the Makefile, .ci/run, the
workflows, conftest.py, marks in tests. An option that is not known to be harmless is refused: HARMLESS is the list.
"""

import ast
import configparser
import re
from fnmatch import fnmatch
from pathlib import Path

import tomllib

ALWAYS = ("lint", "shared", "parity")  # of tox's environments, beside the projects'
# options of pytest, ruff and tox that choose no tests and hide no failure
HARMLESS = {
    "--import-mode", "--strict-markers", "--strict-config", "-ra", "-q", "-qq", "--quiet", "-v", "-vv", "--verbose",
    "--tb", "--durations", "--color", "--readme", "-p", "-n", "--numprocesses", "--dist", "--check", "--parallel",
    "--parallel-no-spinner", "--parallel-live", "-o",
}  # fmt: skip
PLUGINS = re.compile(r"(no:cacheprovider|xdist|all|auto|\d+)")  # values of -p: of pytest's, and of tox's --parallel
PYTEST_FILES = ("pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "setup.cfg")  # before pyproject.toml
PYTEST_KEYS = {"minversion", "addopts", "pythonpath", "testpaths", "xfail_strict", "markers", "filterwarnings"}
VARIABLES = re.compile(r"PYTEST_ADDOPTS|PYTEST_PLUGINS|PYTEST_DISABLE|TOX_SKIP_ENV|TOX_OVERRIDE|TOX_TESTENV|TOXENV")
# a shell's ways to go on after a failure
IGNORES = re.compile(r"\|\||;\s*(true|:)|set\s+\+e|^\s*!|&\s*$|\b(trap|exit|exec)\b|continue-on-error")
HOOKS = {
    "pytest_ignore_collect", "pytest_itemcollected", "pytest_pycollect_makeitem",
    "pytest_collect_file", "pytest_runtest_makereport", "pytest_runtest_protocol", "pytest_report_teststatus",
    "pytest_sessionfinish", "collect_ignore", "collect_ignore_glob", "pytest_plugins",
}  # fmt: skip


def complaints(root: Path, files: list[Path], envs: list[str]) -> list[str]:
    """One line for each rule that is broken. files: git's, relative to root; envs: the projects'."""
    found = [*_tox(root, files, envs), *_pytest(root, files), *_makefile(root), *_ci(root, files)]
    for path in files:
        if path.parts[0] == "tests" and path.suffix == ".py":
            found += [*_marks(path, read(root / path)), *_referees(root, files, path)]
    return found


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def harmful(words: list[str]) -> list[str]:
    """The options that are not known to be harmless."""
    found = []
    for word, value in zip(words, [*words[1:], ""], strict=False):
        known = word.partition("=")[0] in HARMLESS and (word != "-p" or PLUGINS.fullmatch(value))
        if word.startswith(("-", "{posargs:")) and not known:
            found.append(word)
    return found


# -- tox.ini


def _tox(root, files, envs):
    tox = configparser.ConfigParser(interpolation=None)
    tox.read_string(read(root / "tox.ini"))
    listed = [name for name in re.split(r"[,\s]+", tox.get("tox", "env_list", fallback="")) if name]
    for env in ALWAYS:
        if env not in listed:
            yield f"tox.ini's env_list lacks {env}"
    if tox.get("tox", "skip_missing_interpreters", fallback="false").lower() != "false":
        yield "tox.ini skips environments whose Python is missing"
    folders = {path.parent for path in files if path.parts[0] == "tests" and fnmatch(path.name, "test_*.py")}
    folders -= {Path("tests", env) for env in envs}  # house.py sees to those
    for name in tox.sections():
        section = {key: tox.get(name, key) for key in tox[name]}
        for key in section.keys() & {"ignore_outcome", "ignore_errors", "platform", "allowlist_externals"}:
            yield f"tox.ini's {name} sets {key}: a failure there would be none"
        pytest = name == "pytest" or "PYTEST" in section.get("set_env", "").upper()
        if pytest or any(fnmatch("PYTEST_ADDOPTS", name) for name in re.split(r"[,\s]+", section.get("pass_env", ""))):
            yield f"tox.ini's {name} gives pytest options out of sight"
        for command in re.sub(r"\\\n\s*", "", section.get("commands", "")).strip().splitlines():
            words = command.replace("{posargs}", "").split()
            if re.match(r"[-!]", command) or IGNORES.search(command):
                yield f"tox.ini's {name} ignores the outcome of {command}"
            elif name.removeprefix("testenv:") in listed and (words[0] not in ("pytest", "ruff") or harmful(words)):
                yield f"tox.ini's {name} does not run all tests as they are: {command}"
            elif words[0] == "pytest" and name.removeprefix("testenv:") in listed:
                folders -= {*map(Path, words)}
    for folder in sorted(folders):
        yield f"{folder.as_posix()} is in no command of env_list's environments"


# -- pytest's settings, and what a test file can do


def _pytest(root, files):
    settings = tomllib.loads(read(root / "pyproject.toml")).get("tool", {}).get("pytest", {}).get("ini_options", {})
    words = settings.get("addopts", [])
    for option in harmful(words.split() if isinstance(words, str) else words):
        yield f"pyproject.toml gives pytest {option}, which may deselect tests"
    for key in sorted(settings.keys() - PYTEST_KEYS):
        yield f"pyproject.toml sets pytest's {key}, which may deselect tests"
    if settings.get("xfail_strict") is not True:
        yield "pyproject.toml must set pytest's xfail_strict to true"
    for path in files:
        if path.name in PYTEST_FILES:
            yield f"{path.as_posix()} would replace pytest's settings in pyproject.toml"


def _marks(path, text):
    for node in ast.walk(ast.parse(text)):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", getattr(node, "name", ""))
        what = ""
        if path.name == "conftest.py" and name in HOOKS or name == "__test__":
            what = name
        elif name == "pytest_collection_modifyitems" and isinstance(node, ast.FunctionDef):
            what = name * (not _only_looks(node))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("pytest.mark.skip", "pytest.mark.xfail"):
            what = ast.unparse(node) * (path.as_posix() != "tests/docs/conftest.py")  # where no README was named
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.skipif":
            what = "pytest.mark.skipif without a condition" * (not node.args or isinstance(node.args[0], ast.Constant))
        elif isinstance(node, ast.keyword) and node.arg == "allow_module_level":
            what = "allow_module_level"
        if what:
            yield f"{path.as_posix()}:{getattr(node, 'lineno', 1)} has {what}, which may deselect tests"


def _only_looks(hook):
    """Whether it does no more with its items than go through them."""
    loops = [node.iter for node in ast.walk(hook) if isinstance(node, ast.For)]
    return all(node in loops for node in ast.walk(hook) if isinstance(node, ast.Name) and node.id == "items")


def _referees(root, files, path):
    """A package that tests skip without must be pinned where they run: all would skip, and make test be green."""
    env = path.parts[1]
    pins = [name for name in files if name.parent.name.partition("_")[0] == env and name.match("requirements*.txt")]
    pinned = "\n".join(read(root / name) for name in [*pins, Path("tests/requirements.txt")])
    for node in ast.walk(ast.parse(read(root / path))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            package = ast.literal_eval(node.args[0])
            if not re.search(rf"^{package}(\[.*\])?==", pinned, re.M):
                yield f"{path.as_posix()} skips without {package}, which no requirements of {env} pin"


# -- the Makefile, .ci/run and the workflows


def _makefile(root):
    text = re.sub(r"\\\n\s*", "", read(root / "Makefile"))
    variables = dict(re.findall(r"^(\w+)\s*[:?]?=\s*(.*?)\s*$", text, re.M))
    target, recipes = "", {}
    for line in text.splitlines():
        if line.startswith("\t"):
            recipes.setdefault(target, []).append(line.strip())
        elif match := re.match(r"([^\s:=#]+)\s*:(?!=)", line):
            target = match[1]
    for name in recipes.keys() & {".IGNORE", ".ONESHELL"} | {*re.findall(r"^\.(?:IGNORE|ONESHELL)\b", text, re.M)}:
        yield f"Makefile's {name} ignores outcomes"
    if re.search(r"^\s*(export\s+)?(MAKEFLAGS|SHELL|\.SHELLFLAGS)\s*[+:?]?=|" + VARIABLES.pattern, text, re.M):
        yield "Makefile sets a variable that changes which tests run, or what a failure is"
    for target, lines in recipes.items():
        for line in lines:
            runs_tox = re.search(r"\$\(TOX\) run", line)
            if re.match(r"@?\+?-", line) or runs_tox and re.search(r"[|;]|&(?!&)", line):
                yield f"Makefile's {target} ignores the outcome of {line}"
    runs = [line for line in recipes.get("test", []) if re.search(r"\$\(TOX\) run", line)]
    for line in runs:
        words = re.sub(r"\$\((\w+)\)", lambda name: variables.get(name[1], ""), line).split()
        if "--" in words or harmful(words):
            yield f"Makefile's test does not run all of tox's environments: {line}"
    if len(runs) != 1:
        yield "Makefile's test must run tox once"


def _ci(root, files):
    lines = [line.strip() for line in read(root / ".ci" / "run").splitlines() if line.strip() and line[0] != "#"]
    wanted = re.search(r"^```bash\n(.*?)^```", read(root / "README.md"), re.M | re.S)
    for command in wanted[1].splitlines() if wanted else []:
        if command not in lines:
            yield f".ci/run does not run README.md's {command}"
    if not lines or not re.match(r"set -[a-z]*e", lines[0]):
        yield ".ci/run must begin with set -e"
    for line in lines:
        if IGNORES.search(line) or VARIABLES.search(line):
            yield f".ci/run ignores the outcome of {line}"
    workflows = [path for path in files if path.parts[:2] == (".github", "workflows")]
    for path in workflows:
        for line in read(root / path).splitlines():
            if IGNORES.search(line):
                yield f"{path.as_posix()} ignores the outcome of {line.strip()}"
    if not any(re.search(r"^\s*- run: \.ci/run$", read(root / path), re.M) for path in workflows):
        yield "no workflow runs .ci/run"
