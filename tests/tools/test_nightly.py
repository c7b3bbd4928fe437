"""The nightly run: which pins it loosens, and how it finds the package that breaks a test."""

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conventions.rules import ROOT, env_of, projects
from tests.tools import nightly
from tests.tools.nightly import Environment


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    files = {
        "tox.ini": "[testenv]\ndeps = -r all.txt\n[testenv:alpha]\ndeps =\n    {[testenv]deps}\n    -r alpha/pins.txt\n"
        "    ruff==1.0\n[testenv:beta]\ndeps = -r beta.txt\n",
        "all.txt": "# what all need\npytest==9.2.0\n\n"
        "numpy==2.4.6; python_version >= '3'\nnumpy==1.0; python_version < '3'\n",
        "alpha/pins.txt": "jax[cpu]==0.10.2\nold==1.0; python_version < '3'\n",
        "beta.txt": "torch==2.0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(nightly, "ROOT", tmp_path)


def test_the_pins_of_an_environment_are_those_of_its_files_for_this_python(pinned):
    assert nightly.pins_of("alpha") == {"pytest": "9.2.0", "numpy": "2.4.6", "jax": "0.10.2"}
    assert nightly.pins_of("beta") == {"pytest": "9.2.0", "numpy": "2.4.6", "torch": "2.0"}


@pytest.mark.parametrize("env", ["shared", *map(env_of, projects(ROOT))])
def test_each_environments_pins_can_be_read(env):
    pins = nightly.pins_of(env)
    assert {"pytest", "hypothesis"} < pins.keys()
    for name, version in pins.items():
        Version(version), Requirement(f"{name}=={version}")


def test_a_pin_is_loosened_only_where_it_is_named():
    assert nightly.loosened({"jax": "1.0", "numpy": "2.0"}, {"jax"}) == ["jax>=1.0", "numpy==2.0"]


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Pins of three packages, which have newer releases; the test fails where `bad` is the newer one."""
    releases = {"bad": "2.0", "good": "2.0", "colored": "2.0"}
    there = {}

    def install(self, lines):
        there.update(
            line.split("==") if "==" in line else (line.split(">=")[0], releases[line.split(">=")[0]]) for line in lines
        )
        return True

    def test(self, *options):
        (self.folder / "cache").mkdir(exist_ok=True)
        return (1, ["test_x::test_y"]) if there["bad"] == "2.0" else (2, [])

    monkeypatch.setattr(nightly, "ROOT", tmp_path)
    monkeypatch.setattr(nightly, "pins_of", lambda env: dict.fromkeys(releases, "1.0"))
    monkeypatch.setattr(Environment, "make", install)
    monkeypatch.setattr(Environment, "install", install)
    monkeypatch.setattr(Environment, "installed", lambda self: dict(there))
    monkeypatch.setattr(Environment, "test", test)


def test_the_package_that_breaks_a_test_is_named(pretended):
    report, well = nightly.run("jax", set())
    assert not well and report.startswith("## jax: 1 passed, 1 failed")
    assert "| bad | 1.0 | 2.0 | breaks 1 |" in report
    assert "| good | 1.0 | 2.0 | breaks 0 |" in report
    assert "| colored | 1.0 | 1.0 |  |" in report  # held: a vendor's own pin
    assert report.endswith("\n- test_x::test_y\n")


def test_what_fails_with_the_pins_too_is_no_packages_fault(pretended, monkeypatch):
    monkeypatch.setattr(
        Environment, "test", lambda self, *options: (self.folder / "cache").mkdir(exist_ok=True) or (0, ["test_z"])
    )
    report, well = nightly.run("jax", set())
    assert not well and report.endswith("\n- test_z, with the pins too\n")
    assert "| bad | 1.0 | 2.0 | breaks 0 |" in report


def test_what_is_held_is_not_tried(pretended):
    report, well = nightly.run("jax", {"bad"})
    assert well and "## jax: 2 passed, 0 failed" in report
    assert "| bad | 1.0 | 1.0 |  |" in report and "| good | 1.0 | 2.0 |  |" in report
