"""The projects' environments and processes, the referee, and the report at the end."""

from functools import cache, partial
from pathlib import Path

import pytest

from tests.contract.parity import NANO, Outcome, Referee, write_report
from tests.contract.places import NEW_TOKENS, PROMPT
from tests.contract.served import Served
from tests.conventions.rules import ROOT
from tests.tools.examples import python_of


def pytest_addoption(parser):
    parser.addoption("--report", default=ROOT / "results" / "parity", type=Path, help="the folder of parity's report")
    group = parser.getgroup("interrupts", "Ctrl-C at random moments (make kills)")
    group.addoption("--interrupts", type=int, default=0, help="how many a project (default: %(default)s)")
    group.addoption("--interrupts-seed", type=int, default=0, help="of their moments (default: %(default)s)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """One worker of pytest-xdist runs all tests of a project, and so starts its one process."""
    for item in items:
        if callspec := getattr(item, "callspec", None):
            item.add_marker(pytest.mark.xdist_group(callspec.params.get("project", "none")))


@pytest.fixture
def report(request):
    """report(kind, value): for the summary at the end, also from a worker of pytest-xdist."""
    return lambda kind, value: request.node.user_properties.append((kind, value))


@pytest.fixture(scope="session")
def referee():
    return Referee(NANO)


@pytest.fixture(scope="session")
def tokens(referee):
    """What the examples in places.py must write."""
    ids = tuple(referee.encode(PROMPT))
    return list(referee.generate(ids, NEW_TOKENS)[len(ids) :])


@pytest.fixture(scope="session")
def pythons():
    """pythons(project): the python of its environment, which is made if it is missing."""
    return cache(partial(python_of, ROOT))


@pytest.fixture(scope="session")
def served(pythons, tmp_path_factory):
    """served(project).ask(...): the project's example, in one process for all tests."""
    processes = {}

    def get(project):
        if project not in processes:
            processes[project] = Served(pythons(project), ROOT, project, tmp_path_factory.mktemp(project))
        return processes[project]

    yield get
    for process in processes.values():
        process.close()


def pytest_terminal_summary(terminalreporter, config):
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [
        pair for report in reports if getattr(report, "when", "") == "call" for pair in report.user_properties
    ]
    if outcomes := [Outcome(**value) for kind, value in properties if kind == "parity"]:
        folder = config.getoption("--report")
        terminalreporter.section("parity with transformers in float32")
        terminalreporter.write(write_report(folder, outcomes))
        terminalreporter.line(f"\nwith a picture, by position, in {folder}")
    for kind, value in properties:
        if kind == "counts":
            terminalreporter.line(value)
