"""pytest tests/docs --readme README.md [--readme OTHER.md] [--slow]: one test per block, named README.md:LINE"""

import os
from pathlib import Path

import pytest

from tests.docs.readme import Runner, parse


def pytest_addoption(parser):
    group = parser.getgroup("README commands")
    group.addoption("--readme", action="append", default=[], metavar="FILE", help="run the commands of this README")
    group.addoption("--slow", action="store_true", help="also run the blocks that need minutes")


def pytest_generate_tests(metafunc):
    if "block" in metafunc.fixturenames:
        config = metafunc.config
        blocks = [block for path in config.option.readme for block in parse(Path(config.invocation_params.dir, path))]
        ids = [f"{os.path.relpath(block.readme, config.rootpath)}:{block.line}" for block in blocks]
        metafunc.parametrize("block", blocks, ids=ids)


@pytest.fixture(scope="session")
def runner(request):
    return Runner(slow=request.config.option.slow)
