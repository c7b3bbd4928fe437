"""The conventions that ruff and import-linter (pyproject.toml) do not check."""

import ast
import configparser
import os
import re
import subprocess
import sys

import pytest
import tomllib

from tests.conventions import measures, rules
from tests.conventions.rules import ROOT, env_of, example_of

PROJECTS = rules.projects(ROOT)
PATHS = rules.files(ROOT)
PYTHONS = "3.11 to 3.13"


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tox():
    """{section: {key: value}} of tox.ini."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(read("tox.ini"))
    return {name: dict(parser[name]) for name in parser.sections()}


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads(read("pyproject.toml"))["tool"]


@pytest.fixture(scope="module")
def commands(tox):
    """{environment: its commands} of tox.ini's env_list, which make test runs."""
    envs = re.findall(r"[\w-]+", tox["tox"]["env_list"])
    return {env: tox[f"testenv:{env}"]["commands"].strip().splitlines() for env in envs}


# -- a project folder


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_has_its_files_and_sections(project):
    for name in rules.FILES:
        assert read(f"{project}/{name}").strip(), f"{project}/{name} is empty"
    assert example_of(ROOT, project), f"{project} must hold one of {', '.join(rules.EXAMPLES)}"
    readme = read(f"{project}/README.md")
    assert [section for section in rules.sections(readme) if section in rules.SECTIONS] == rules.SECTIONS
    assert "On Your Hardware" in rules.sections(readme)
    assert re.search(r"^```mermaid\nflowchart", readme, re.M), "How It Works must show the way from weights to text"
    assert f"]({project}/" in read("README.md")
    assert PYTHONS in readme


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_has_tests_which_its_environment_runs(project, commands):
    env = env_of(project)
    tests = f"tests/{env} tests/docs/test_readme.py --readme {project}/README.md {{posargs}}"
    assert any(re.fullmatch(rf"pytest (--\S+ )*{re.escape(tests)}", command) for command in commands[env])
    assert any(path.match(f"tests/{env}/test_*.py") and "\ndef test_" in read(path) for path in PATHS)
    assert f'"{project}": Example(' in read("tests/tools/examples.py")


@pytest.mark.parametrize("project", PROJECTS)
def test_a_pull_request_runs_the_tests_of_what_it_changes(project):
    env = env_of(project)
    assert re.search(rf'^ +{env}: \[.*"{project}/\*\*", "tests/{env}/\*\*"\]$', read(".github/workflows/ci.yml"), re.M)
    assert f"/{project}" in read(".github/dependabot.yml") and f"/{project}/ " in read(".github/CODEOWNERS")


@pytest.mark.parametrize("project", PROJECTS)
def test_import_linter_checks_a_project(project, pyproject):
    layers, independent, forbidden = pyproject["importlinter"]["contracts"]
    assert project in pyproject["importlinter"]["root_packages"] and project in layers["layers"][1].split(" | ")
    assert {project, f"tests.{env_of(project)}"} <= {*independent["modules"]}
    assert f"tests.{env_of(project)}" in forbidden["source_modules"]


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_names_no_other(project):
    """import-linter reads no notebooks, and no names in strings."""
    for path in PATHS:
        if path.parts[0] == project or path.parts[:2] == ("tests", env_of(project)):
            named = {other for other in PROJECTS if other in read(path)} if path.suffix in (".py", ".ipynb") else set()
            assert named <= {project}, path


def test_shared_holds_the_tokenizer_and_sampling():
    assert {path.name for path in PATHS if path.parts[0] == "shared"} == rules.SHARED
    packages = [path for path in PATHS if path.parts[0] == "tests" and path.name == "__init__.py"]
    assert not packages, "a package tests/jax would shadow jax"


def source_of(path, name):
    for node in ast.parse(text := read(path)).body:
        if name in (getattr(node, "name", ""), *(target.id for target in getattr(node, "targets", ()))):
            return ast.get_source_segment(text, node)
    return pytest.fail(f"{path} must define {name}")


SAME = ["FIXED", "FLOATS", "read_config", "read_json", "weight_files", "tensor_shapes", "read_tensors", "check_tensor"]


@pytest.mark.parametrize("name", SAME)
def test_the_weight_loaders_have_the_same_text(name):
    assert len({source_of(f"{project}/weight_loader.py", name) for project in PROJECTS}) == 1


def test_the_scripts_read_flags_by_the_same_text():
    assert len({read(f"{project}/cli.py").partition("# -- from here on, the same")[2] for project in PROJECTS}) == 1


DISTRIBUTIONS = {"modelopt": "nvidia-modelopt", "orbax": "orbax-checkpoint"}  # of modules with another name


@pytest.mark.parametrize("project", PROJECTS)
def test_the_scripts_ask_for_the_packages_that_are_imported_and_pinned(project):
    sources = [read(path) for path in PATHS if path.parts[0] in (project, "shared") and path.suffix == ".py"]
    imported = {name for text in sources for name in re.findall(r"^ *(?:import|from) (\w+)", text, re.M)}
    pins = {read(path) for path in PATHS if path.parts[0] == project and re.fullmatch(r"require.*txt", path.name)}
    pinned = {pin.replace("-", "_") for text in pins for pin in re.findall(r"^([\w-]+)==", text, re.M)} | {
        "nvtripy"
    }  # by tox.ini
    names = {name for name in imported if DISTRIBUTIONS.get(name, name).replace("-", "_") in pinned}
    asked = ast.literal_eval(re.search(r"^PACKAGES = (\(.*?\))$", read(f"{project}/cli.py"), re.M | re.S)[1])
    assert {*asked} == names - {"torch_neuronx", "torch_xla"}  # which only their devices need


SCRIPTS = [path for path in PATHS if path.parts[0] in PROJECTS and path.suffix == ".py" and "__main__" in read(path)]
SCRIPTS = [path for path in SCRIPTS if path.name != "loopback.py"]  # which imports nothing, and starts train.py


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_missing_package_is_one_line_with_the_command(script):
    """-S: without what pip installed."""
    python = [sys.executable, "-I", "-S", ROOT / script]
    run = subprocess.run(python, capture_output=True, encoding="utf-8")
    [line], folder = run.stderr.splitlines(), ROOT / script.parts[0]
    assert run.returncode == 2 and "error: not installed: " in line and f"; in {folder} run pip install -r " in line
    assert all((folder / name).is_file() for name in re.findall(r"-r (\S+?\.txt)", line))


def test_the_benchmarks_have_the_same_text_but_for_the_names():
    """From a line on; JAX's scripts end by the signal itself."""
    texts = set()
    for project in PROJECTS:
        text = read(f"{project}/bench.py").partition("# -- from here on, the same in each project\n")[2]
        assert text, f"{project}/bench.py"
        texts.add(text.partition('if __name__ == "__main__":')[0].replace(project, "PROJECT"))
    assert len(texts) == 1


INDEX = "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"


@pytest.mark.parametrize("path", ["README.md", *(f"{project}/README.md" for project in PROJECTS)])
def test_a_readme_warns_of_cuda_before_it_installs_pytorch(path):
    before, command, _ = read(path).partition("pip install -r requirements-cpu.txt")
    assert not command or INDEX in before and "gigabytes of CUDA" in before


# -- pins


@pytest.mark.parametrize("path", [path for path in PATHS if re.fullmatch(r"requirements.*\.txt", path.name)], ids=str)
def test_requirements_are_pinned(path):
    assert not rules.unpinned(read(path))


@pytest.mark.parametrize("package", ["tox", "ruff", "import-linter", "openai-whisper", "nvtripy"])
def test_a_package_has_one_version(package):
    texts = [read(path) for path in PATHS if path.suffix in ("", ".ini", ".md", ".txt", ".yml", ".yaml")]
    assert len({version for text in texts for version in re.findall(rf"\b{package}==([\w.]+)", text)}) == 1


def test_the_range_of_pythons_is_stated_and_tested(tox):
    assert PYTHONS in read("README.md") and PYTHONS in read("Makefile")
    sections = [re.fullmatch(r"testenv:(\w+)-py3\{([\d,]+)\}", name) for name in tox]
    tested = [(match[1], minor) for match in sections if match for minor in match[2].split(",")]
    assert tested == [("shared", "10"), ("shared", "12"), ("shared", "13"), ("jax", "12"), ("jax", "13")]
    for env, minor in tested:
        assert f"{env}-py3{minor}" in read("Makefile")
        assert f'python: "3.{minor}", env: {env}-py3{minor}' in read(".github/workflows/ci.yml")


# -- make test runs all tests, and one that fails makes it fail


def test_every_folder_with_tests_is_in_a_command(commands):
    folders = {path.parent.as_posix() for path in PATHS if path.parts[0] == "tests" and path.match("test_*.py")}
    lines = [line.split() for env in commands.values() for line in env]
    assert folders <= {word for command, *words in lines if command == "pytest" for word in words}
    assert {"lint", "shared", "parity", *map(env_of, PROJECTS)} == commands.keys()


def test_commands_leave_out_no_test_and_ignore_no_failure(tox, pyproject, commands):
    lines = [line for env in commands.values() for line in env]
    lines += re.findall(r"^\t(.*\$\(TOX\) run-parallel.*)", read("Makefile").replace("\\\n", ""), re.M)[:1]
    lines += read(".ci/run").splitlines() + read(".github/workflows/ci.yml").splitlines()
    settings = pyproject["pytest"]["ini_options"]
    lines += [" " + option for option in settings["addopts"]]
    assert [line for line in lines if rules.WEAKENS.search(line)] == []
    assert {"set -euo pipefail", "make test", "make demo"} <= {*read(".ci/run").splitlines()}
    known = {"minversion", "addopts", "pythonpath", "testpaths", "xfail_strict", "markers", "filterwarnings"}
    assert settings["xfail_strict"] is True and settings.keys() <= known
    assert not [path for path in PATHS if path.name in ("pytest.ini", ".pytest.ini", "setup.cfg")]
    for section in tox.values():
        assert not section.keys() & {"ignore_outcome", "ignore_errors", "platform", "skip_missing_interpreters"}


WEAKENED = """
- pytest tests
pytest tests -k fast
pytest tests -m engine
pytest tests --ignore tests/x
pytest tests --deselect=tests/x
pytest {posargs:tests/x}
pytest --lf
ruff check --exit-zero
make test || true
make test &
set +e
@-tox run
tox run --notest
TOX_SKIP_ENV=parity make test
continue-on-error: true
"""


@pytest.mark.parametrize("line", WEAKENED.strip().splitlines())
def test_a_weakened_command_is_noticed(line):
    assert rules.WEAKENS.search(line)


# -- what no file may hold

TESTED_ON_WINDOWS = r"(shared|tests/shared)/.*\.py|tests/conftest\.py"
FORBIDDEN = {  # in the files whose path matches: why
    (r".*\.(py|ipynb)", r"\b(allow_pickle|trust_remote_code)\b\s*=\s*(?!False)"): "checkpoints are data, not programs",
    (r".*\.py", r"\.read_text\(\)|\.write_text\([^(),\n]*\)|text=True(?![^)]*encoding)"): "name the encoding",
    (TESTED_ON_WINDOWS, r"import (fcntl|grp|pty|pwd|resource)\b|os\.fork|SIGKILL|SIGALRM"): "Windows lacks it",
    (r"tests/.*\.py", r"mark\.(skip|xfail)\b"): "a skip needs a condition and a reason",
    (r"tests/.*\.py", r"\b(collect_ignore|pytest_ignore_collect|__test__|allow_module_level)"): "it leaves out tests",
}


def forbidden(path, text):
    found = [(pattern, why) for (name, pattern), why in FORBIDDEN.items() if re.fullmatch(name, path)]
    return [f"{path}: {match[0]}: {why}" for pattern, why in found if (match := re.search(pattern, text))]


def test_no_function_has_more_than_50_lines():
    long = [function for function in measures.functions(ROOT) if function.lines > 50]
    assert not long


def test_no_file_holds_what_is_forbidden():
    paths = [path for path in PATHS if path.suffix in (".py", ".ipynb") and path.name != "test_conventions.py"]
    assert [line for path in paths for line in forbidden(path.as_posix(), read(path))] == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("jax_nanogpt/model.py", "np.load(file, allow_pickle=True)"),
        ("qaic_gpt2/notes.ipynb", "AutoModel.from_pretrained(name, trust_remote_code=flag)"),
        ("shared/tokenizer.py", "json.loads((folder / name).read_text())"),
        ("shared/tokenizer.py", "path.write_text(text)"),
        ("tests/docs/readme.py", "run(command, text=True)"),
        ("tests/shared/test_sampling.py", "os.kill(pid, signal.SIGKILL)"),
        ("tests/jax/test_model.py", "@pytest.mark.skip\ndef test_it():"),
        ("tests/jax/conftest.py", "collect_ignore = ['test_model.py']"),
    ],
)
def test_something_forbidden_is_noticed(path, text):
    assert len(forbidden(path, text)) == 1


@pytest.mark.parametrize("env", ["shared", *map(env_of, PROJECTS)])
def test_a_package_that_tests_skip_without_is_pinned(env):
    """Without it all of them would be skipped, and make test would pass."""
    paths = [path for path in PATHS if re.fullmatch(rf"(tests/{env}|{env}_\w+)/requirements.*\.txt", path.as_posix())]
    pins = {pin for path in paths for pin in re.findall(r"^(\w+)==", read(path), re.M)}
    tests = "\n".join(read(path) for path in PATHS if path.match(f"tests/{env}/*.py"))
    assert {*re.findall(r"importorskip\(\"(\w+)", tests)} <= pins


def test_breaches_of_pins_and_sections_are_noticed():
    exact = [
        "# why",
        "numpy==2.4.6; python_version >= '3.11'",
        "-r other.txt",
        f"pkg @ git+https://a.example/p@{40 * 'a'}",
    ]
    assert rules.unpinned("\n".join(exact)) == []
    loose = ["numpy>=2", "numpy", "numpy==2.*", "numpy>=2;python_version=='3.11'", "pkg @ git+https://a.example/p@main"]
    assert rules.unpinned("\n".join(loose)) == loose
    assert rules.sections("## A\n```bash\n## B\n```\n<!--\n## C\n-->\n# D\n## E \n") == ["A", "E"]


# -- make, on a machine that lacks something


def make(folder, *arguments):
    (folder / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    env = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    return subprocess.run(["make", *arguments], cwd=folder, env=env, capture_output=True, encoding="utf-8")


MISSING = {
    "is not installed: install Python 3.11": None,
    "is not Python 3.11 to 3.13": "exit 1",
    "lacks venv: on Debian and Ubuntu run apt install python3.11-venv": "case $2 in *ensurepip*) exit 1; esac",
}


@pytest.mark.parametrize(("says", "python"), MISSING.items())
@pytest.mark.parametrize("target", ["test", "demo"])
def test_make_says_in_one_line_what_is_missing(tmp_path, target, says, python):
    if python:
        (tmp_path / "python").write_text(f"#!/bin/sh\n{python}\n", encoding="utf-8")
        (tmp_path / "python").chmod(0o755)
    result = make(tmp_path, target, f"PYTHON={tmp_path}/python")
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and says in lines[0]
    assert len(lines) == 2  # the other is make's own
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("index", ["https://a.example/cpu", ""])
def test_make_asks_pytorchs_cpu_index_if_it_answered(tmp_path, index):
    tox = tmp_path / ".venv" / "bin" / "tox"
    tox.parent.mkdir(parents=True)
    tox.write_text('#!/bin/sh\necho "[$PIP_EXTRA_INDEX_URL]"\n', encoding="utf-8")
    tox.chmod(0o755)
    os.utime(tox, (2**32, 2**32))  # newer than the Makefile
    if index:
        (tmp_path / ".venv" / "cpu_index").write_text(f"{index}\n", encoding="utf-8")
    assert make(tmp_path, "demo").stdout == f"[{index}]\n"


def test_make_clean_keeps_what_was_trained(tmp_path):
    for name in (".tox/jax", ".venv", "jax_nanogpt/__pycache__", "jax_nanogpt/out-shakespeare-char"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x").touch()
    assert make(tmp_path, "clean").returncode == 0
    assert [path.parent.name for path in tmp_path.rglob("x")] == ["out-shakespeare-char"]
