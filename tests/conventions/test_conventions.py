"""The house is in order, and the rules notice when it is not: each is broken in turn in a made-up house."""

import os
import re
import shutil
import subprocess

import pytest

from tests.conventions.made_up import write
from tests.conventions.rules import ROOT, complaints, files, projects


def test_this_house_is_in_order():
    assert complaints(ROOT) == []


def test_a_house_in_order_has_no_complaints(made_up):
    assert projects(made_up) == ["alpha_gpt2", "beta_nano_gpt"]
    assert complaints(made_up) == []


def test_a_house_without_projects_has_none(tmp_path):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    for name in ("__init__", "tokenizer", "sampling"):
        write(tmp_path / "shared" / f"{name}.py", "")
    assert projects(tmp_path) == []
    assert not [line for line in complaints(tmp_path) if line.startswith("shared/")]


def test_an_unpacked_archive_without_git_is_read_as_it_lies(made_up):
    shutil.rmtree(made_up / ".git")
    shutil.rmtree(made_up / "ignored_gpt2")
    assert projects(made_up) == ["alpha_gpt2", "beta_nano_gpt"]
    assert complaints(made_up) == []


def test_a_project_without_a_readme_is_told_of_each_thing_it_should_hold(made_up):
    (made_up / "alpha_gpt2" / "README.md").unlink()
    assert len(complaints(made_up)) == 4


def test_a_folder_with_a_single_file_is_already_a_project(made_up):
    write(made_up / "gamma_gpt" / "notes.txt", "")
    assert projects(made_up) == ["alpha_gpt2", "beta_nano_gpt", "gamma_gpt"]
    lines = "\n".join(complaints(made_up))
    for part in ("README.md", "model.py", "weight_loader.py", "bench.py", "requirements.txt"):
        assert f"gamma_gpt/{part} is missing or empty" in lines
    assert "gamma_gpt has no example" in lines
    assert "tests/tools/examples.py does not say how to ask gamma_gpt" in lines
    assert "tests/gamma has no tests" in lines
    assert "tox.ini's env_list lacks gamma" in lines


SECTIONS = (
    "alpha_gpt2/README.md needs the sections Introduction, Running The Example, How It Works, Constraints, Numbers"
)
COMMANDS = (
    "tox.ini's testenv:beta does not run pytest tests/beta tests/docs/test_readme.py --readme beta_nano_gpt/README.md"
)
BETA = " imports beta_nano_gpt"


@pytest.mark.parametrize(
    ("path", "before", "after", "complaint"),
    [
        ("alpha_gpt2/model.py", None, None, "alpha_gpt2/model.py is missing or empty"),
        ("alpha_gpt2/weight_loader.py", None, None, "alpha_gpt2/weight_loader.py is missing or empty"),
        ("alpha_gpt2/bench.py", None, None, "alpha_gpt2/bench.py is missing or empty"),
        ("beta_nano_gpt/requirements.txt", None, None, "beta_nano_gpt/requirements.txt is missing"),
        ("beta_nano_gpt/run_model.py", None, None, "beta_nano_gpt has no example: one of example.py"),
        ("tests/alpha/test_model.py", None, None, "tests/alpha has no tests"),
        ("alpha_gpt2/README.md", "## Introduction\n", "", SECTIONS),
        ("alpha_gpt2/README.md", "## Numbers", "# Numbers", SECTIONS),
        ("alpha_gpt2/README.md", "## Constraints\n## Numbers", "## Numbers\n## Constraints", SECTIONS),
        ("alpha_gpt2/README.md", "## On Your Hardware", "", "alpha_gpt2/README.md needs the section On Your Hardware"),
        ("alpha_gpt2/README.md", "flowchart", "pie", "alpha_gpt2/README.md needs a mermaid flowchart"),
        ("README.md", "beta_nano_gpt/", "beta/", "README.md has no link to beta_nano_gpt/"),
        ("beta_nano_gpt/requirements.txt", "numpy==2.4.6", "numpy>=2", "beta_nano_gpt/requirements.txt does not pin"),
        ("beta_nano_gpt/requirements-cpu.txt", 40 * "a", "main", "beta_nano_gpt/requirements-cpu.txt does not pin pkg"),
        ("tox.ini", "alpha,", "", "tox.ini's env_list lacks alpha"),
        ("tox.ini", "\n    beta,", "\n    beta2,", "tox.ini's env_list lacks beta"),
        ("tox.ini", "pytest tests/beta", "pytest", COMMANDS),
        ("tox.ini", "pytest tests/beta", "pytest tests/beta_old", COMMANDS),
        ("tox.ini", "tests/beta tests/docs/test_readme.py", "tests/beta", COMMANDS),
        ("tox.ini", "--readme beta_nano_gpt/README.md", "", COMMANDS),
        ("tests/alpha/test_model.py", "def test_", "def check_", "tests/alpha has no tests"),
        ("tests/alpha/__init__.py", "", "", "tests/alpha/__init__.py would make"),
        ("tests/alpha/requirements.txt", "", "torch", "tests/alpha/requirements.txt does not pin torch"),
        ("beta_nano_gpt/requirements.txt", "numpy==2.4.6", "numpy==2.*", "beta_nano_gpt/requirements.txt does not pin"),
        ("beta_nano_gpt/requirements.txt", "numpy==2.4.6", "numpy>=2;python_version=='3.11'", "beta_nano_gpt/req"),
        ("alpha_gpt2/README.md", "## Numbers", "```bash\n## Numbers\n```", SECTIONS),
        ("alpha_gpt2/README.md", "## Numbers", "<!--\n## Numbers\n-->", SECTIONS),
        ("alpha_gpt2/model.py", "import numpy", "from ..beta_nano_gpt import x", f"alpha_gpt2/model.py{BETA}"),
        ("alpha_gpt2/model.py", "import numpy", "f('beta_nano_gpt.model')", f"alpha_gpt2/model.py{BETA}"),
        ("tests/tools/examples.py", "beta_nano", "beta", "tests/tools/examples.py does not say how to ask beta_nano_"),
        ("shared/tokenizer.py", None, None, "shared/tokenizer.py is missing"),
        ("alpha_gpt2/model.py", "import numpy", "import beta_nano_gpt.model", f"alpha_gpt2/model.py{BETA}"),
        ("alpha_gpt2/model.py", "import numpy", "def f():\n from beta_nano_gpt import x", f"alpha_gpt2/model.py{BETA}"),
        ("alpha_gpt2/model.py", "import numpy", "from tests.house import x", "alpha_gpt2/model.py imports tests"),
        ("alpha_gpt2/model.py", "import numpy", "import", "alpha_gpt2/model.py cannot be read"),
        ("alpha_gpt2/notes.ipynb", "import numpy", "import beta_nano_gpt", f"alpha_gpt2/notes.ipynb{BETA}"),
        ("tests/alpha/test_model.py", "import alpha_gpt2", "import beta_nano_gpt", f"tests/alpha/test_model.py{BETA}"),
        ("shared/sampling.py", "import numpy", "import alpha_gpt2", "shared/sampling.py imports alpha_gpt2"),
        ("shared/helpers.py", "", "", "shared/helpers.py does not belong there"),
    ],
)  # fmt: skip
def test_each_rule_notices_its_breach_and_nothing_else(made_up, path, before, after, complaint):
    file = made_up / path
    if before is None:
        file.unlink()
    else:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        assert before in text
        write(file, text.replace(before, after, 1))
    assert len(complaints(made_up)) == 1
    assert complaints(made_up)[0].startswith(complaint)


def test_the_pins_that_stand_in_two_places_agree():
    def pins(path, package):
        return {*re.findall(rf"\b{package}==([\w.]+)", (ROOT / path).read_text(encoding="utf-8"))}

    assert len(pins("tox.ini", "ruff")) == len(pins("tox.ini", "tox")) == 1
    assert pins("tox.ini", "ruff") == pins(".pre-commit-config.yaml", "ruff")
    workflows = [path.as_posix() for path in files(ROOT) if path.parts[:2] == (".github", "workflows")]
    for path in ("Makefile", *workflows):
        assert pins("tox.ini", "tox") == pins(path, "tox"), path


# -- make, on a machine that lacks something


def make(folder, *arguments):
    (folder / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    env = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    return subprocess.run(["make", *arguments], cwd=folder, env=env, capture_output=True, encoding="utf-8")


MISSING = {
    "is not there: install Python 3.11": None,
    "is not Python 3.11 to 3.13": "exit 1",
    "has no venv: on Debian and Ubuntu apt install python3.11-venv": "case $2 in *ensurepip*) exit 1; esac",
}


@pytest.mark.parametrize(("says", "python"), MISSING.items())
@pytest.mark.parametrize("target", ["test", "demo", "bench", "fuzz"])
def test_make_says_in_one_line_what_is_missing(tmp_path, target, says, python):
    if python:
        write(tmp_path / "python", f"#!/bin/sh\n{python}\n")
        (tmp_path / "python").chmod(0o755)
    result = make(tmp_path, target, f"PYTHON={tmp_path}/python")
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert says in lines[0]
    assert len(lines) == 2  # the other is make's own
    assert not (tmp_path / ".venv").exists()


def test_make_clean_leaves_what_people_made(tmp_path):
    for name in (".tox/jax/x", ".venv/x", "jax_nanogpt/__pycache__/x", "jax_nanogpt/out-shakespeare-char/x"):
        write(tmp_path / name, "")
    assert make(tmp_path, "clean").returncode == 0
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("x")]
    assert left == ["jax_nanogpt/out-shakespeare-char/x"]
