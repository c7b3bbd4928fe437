"""Each environment's tests with the newest releases in place of the pins, and which package breaks what.

    tox run -e nightly [-- jax neuron --hold torch]

What tox.ini pins itself (nvtripy, openai-whisper) stays. Where tests fail, each package that is newer than its pin is
tried alone among the pins, on those tests. The report is printed, and written to results/nightly; the exit status is 1
where something broke. The environments are made in .tox/nightly.
"""

import argparse
import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

from tests.conventions.rules import ROOT, env_of, projects

HELD = {"colored"}  # nvtripy pins it, and is installed without its dependencies


def pins_of(env: str) -> dict[str, str]:
    """Package and version, of each line for this Python in the files that testenv:env's deps name."""
    tox = _tox()
    deps = tox["testenv"]["deps"] + "\n" + tox[f"testenv:{env}"]["deps"]
    lines = [
        line for path in re.findall(r"^-r (\S+)$", deps, re.M) for line in (ROOT / path).read_text("utf-8").splitlines()
    ]
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name: str(pin.specifier)[2:] for pin in found if not pin.marker or pin.marker.evaluate()}


def loosened(pins: dict[str, str], names) -> list[str]:
    """The pins, with `>=` for `==` where they are one of names."""
    return [f"{name}{'>=' if name in names else '=='}{version}" for name, version in pins.items()]


def _tox() -> configparser.ConfigParser:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    return tox


class Environment:
    def __init__(self, env: str):
        self.env = env
        self.folder = ROOT / "results" / "nightly" / env
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.python = ROOT / ".tox" / "nightly" / env / "bin" / "python"

    def write(self, lines: list[str]) -> Path:
        path = self.folder / "requirements.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def make(self, lines: list[str]) -> bool:
        deps = f"testenv:{self.env}.deps=-r {self.write(lines)}"
        words = ["run", "--notest", "-e", self.env, "--workdir", ".tox/nightly", "--override", deps]
        return subprocess.run([sys.executable, "-m", "tox", *words], cwd=ROOT).returncode == 0

    def install(self, lines: list[str]) -> bool:
        words = ["-m", "pip", "install", "--quiet", "--requirement", self.write(lines)]
        return subprocess.run([self.python, *words], cwd=ROOT).returncode == 0

    def installed(self) -> dict[str, str]:
        words = [self.python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
        listed = subprocess.run(words, check=True, capture_output=True, text=True, encoding="utf-8").stdout
        return {_plain(package["name"]): package["version"] for package in json.loads(listed)}

    def test(self, *options: str) -> tuple[int, list[str]]:
        """How many tests passed, and the names of those that did not."""
        words = _tox()[f"testenv:{self.env}"]["commands"].replace("{posargs}", "").split()
        report = self.folder / "junit.xml"
        report.unlink(missing_ok=True)
        options = [*options, f"--junit-xml={report}", "--override-ini", f"cache_dir={self.folder / 'cache'}"]
        status = subprocess.run([self.python, "-m", *words, *options], cwd=ROOT).returncode
        cases = [*ElementTree.parse(report).iter("testcase")] if report.exists() else []
        failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        passed = sum(len(case) == 0 or {child.tag for child in case} <= {"system-out", "properties"} for case in cases)
        names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
        return passed, names or ([f"pytest ended with exit status {status}"] if status not in (0, 5) else [])

    def retry(self, pins: dict[str, str]) -> "list[str] | None":
        """Which of the tests that failed still do with these versions; None where pip refuses them."""
        shutil.copytree(self.folder / "failed", self.folder / "cache", dirs_exist_ok=True)
        return self.test("--last-failed")[1] if self.install(loosened(pins, ())) else None


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def run(env: str, hold: set[str]) -> tuple[str, bool]:
    """A section of the report, and whether all is well."""
    pins = pins_of(env)
    free = pins.keys() - hold - HELD
    place = Environment(env)
    if not place.make(loosened(pins, free)):
        return f"## {env}\n\nThe newest releases cannot be installed together.\n", False
    versions = place.installed()
    newer = {name for name in free if versions.get(_plain(name), pins[name]) != pins[name]}
    passed, failed = place.test()
    alone, anyway = {}, []
    if failed:
        shutil.copytree(place.folder / "cache", place.folder / "failed", dirs_exist_ok=True)
        anyway = place.retry(pins) or []
        for name in sorted(newer):
            broken = place.retry(pins | {name: versions[_plain(name)]})
            alone[name] = "cannot be installed" if broken is None else f"breaks {len({*broken} - {*anyway})}"
    rows = [
        f"| {name} | {pins[name]} | {versions.get(_plain(name), 'not installed')} | {alone.get(name, '')} |"
        for name in sorted(pins)
    ]
    table = "\n".join(
        ["| package | pinned | installed | alone, of the tests that failed |", "|---|---|---|---|", *rows]
    )
    names = "".join(f"\n- {name}{', with the pins too' * (name in anyway)}" for name in failed)
    return f"## {env}: {passed} passed, {len(failed)} failed\n\n{table}\n{names}\n", not failed


def main() -> int:
    known = ["shared", *map(env_of, projects(ROOT))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", nargs="*", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--hold", action="append", default=[], metavar="PACKAGE", help="leave this one as it is pinned")
    args = parser.parse_args()
    if unknown := {*args.env} - {*known}:
        parser.error(f"env is {min(unknown)}, one of {', '.join(known)} is expected")
    sections = [run(env, {*args.hold}) for env in args.env or known]
    report = "\n".join(section for section, _ in sections)
    (ROOT / "results" / "nightly" / "nightly.md").write_text(report, encoding="utf-8")
    print(report)
    return int(not all(well for _, well in sections))


if __name__ == "__main__":
    sys.exit(main())
