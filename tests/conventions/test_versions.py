"""The Pythons that a project runs on: refused in one line where it does not, and told of in one way."""

import ast
import re
import subprocess
import sys

import pytest

import shared
from tests.conventions.rules import ROOT, files, projects

STATED = "3.11 to 3.13"
# of the standard library alone: it starts train.py, which checks
UNCHECKED = {"jax_nanogpt/launch/loopback.py"}
SOURCES = [path for path in files(ROOT) if path.suffix == ".py"]
SCRIPTS = [
    path.as_posix()
    for path in SOURCES
    if path.parts[0] in projects(ROOT)
    and 'if __name__ == "__main__"' in (ROOT / path).read_text(encoding="utf-8")
    and path.as_posix() not in UNCHECKED
]
# without site-packages: nothing of others is imported before the check
AS_OTHER = (
    "import sys, runpy; sys.version_info = (3, {minor}, 5, 'final', 0); runpy.run_path({path!r}, run_name='__main__')"
)


def run_as_other(minor, path, cwd):
    code = AS_OTHER.format(minor=minor, path=str(path))
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=cwd, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_python_is_refused_in_one_line(script, tmp_path):
    result = run_as_other(9, ROOT / script, tmp_path)
    assert result.stderr == "Python is 3.9.5, 3.11 to 3.13 is expected\n"
    assert (result.returncode, result.stdout) == (2, "")


def test_scripts_were_found_in_every_project():
    assert {script.partition("/")[0] for script in SCRIPTS} == {*projects(ROOT)}


@pytest.mark.parametrize("script", ["shared/__init__.py", *SCRIPTS])
def test_python_3_8_reads_a_script_as_far_as_the_check(script):
    ast.parse((ROOT / script).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_every_source_is_written_for_the_oldest_python_that_runs_it():
    for path in SOURCES:
        oldest = (3, 10) if path.parts[0] == "shared" or path.parts[:2] == ("tests", "shared") else shared.FIRST
        ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path), feature_version=oldest)


@pytest.mark.parametrize("path", ["README.md", "Makefile", *(f"{project}/README.md" for project in projects(ROOT))])
def test_the_range_is_stated(path):
    assert STATED in (ROOT / path).read_text(encoding="utf-8")


def test_the_range_is_tested():
    tox, make, ci = ((ROOT / path).read_text("utf-8") for path in ("tox.ini", "Makefile", ".github/workflows/ci.yml"))
    sections = re.findall(r"\[testenv:(\w+)-py3\{([\d,]+)\}\]", tox)
    assert sections == [("shared", "10,12,13"), ("jax", "12,13")]
    for env, minors in sections:
        for minor in minors.split(","):
            assert f"{env}-py3{minor}" in make and f'python: "3.{minor}", env: {env}-py3{minor}' in ci
