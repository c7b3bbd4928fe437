"""pytest tests/docs --readme README.md [--slow] [--install]: one test per block, named README.md:LINE"""

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.docs.readme import Runner, parse


def pytest_addoption(parser):
    group = parser.getgroup("README commands")
    group.addoption("--readme", action="append", default=[], metavar="FILE", help="run the commands of this README")
    group.addoption("--slow", action="store_true", help="also run the blocks that need minutes")
    install = "also run the blocks that need a package index, each in a clean venv, and those after it there"
    group.addoption("--install", action="store_true", help=install)


def pytest_generate_tests(metafunc):
    if "block" in metafunc.fixturenames:
        config = metafunc.config
        blocks = [block for path in config.option.readme for block in parse(Path(config.invocation_params.dir, path))]
        ids = [f"{os.path.relpath(block.readme, config.rootpath)}:{block.line}" for block in blocks]
        metafunc.parametrize("block", blocks, ids=ids)


@pytest.fixture(scope="session")
def runner(request):
    return Runner(slow=request.config.option.slow, install=request.config.option.install)


def pytest_terminal_summary(terminalreporter):
    """How many blocks ran, and why the others did not."""
    reports = [report for key in ("passed", "failed", "skipped") for report in terminalreporter.stats.get(key, [])]
    blocks = [report for report in reports if "test_readme.py::test_block[" in report.nodeid]
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in blocks if report.skipped)
    if blocks:
        skipped = "".join(f"; {count} {reason}" for reason, count in reasons.most_common())
        line = f"{len(blocks) - reasons.total()} of {len(blocks)} blocks of commands ran{skipped}"
        terminalreporter.section("READMEs")
        terminalreporter.write_line(line)
