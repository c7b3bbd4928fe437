"""pytest tests/docs --readme README.md [--readme OTHER.md] [--slow]: one test a block, README.md:42."""

from collections import Counter
from pathlib import Path

import pytest

from tests.docs import readme


def pytest_addoption(parser):
    group = parser.getgroup("README commands")
    group.addoption("--readme", action="append", default=[], metavar="FILE", help="run the commands of this README")
    group.addoption("--slow", action="store_true", help="also run the blocks that need minutes")


def pytest_configure(config):
    for path in config.getoption("--readme"):
        if not Path(config.invocation_params.dir, path).is_file():
            raise pytest.UsageError(f"--readme {path}: there is no such file")
    config.stash[_runner] = readme.Runner(slow=config.getoption("--slow"))


_runner = pytest.StashKey[readme.Runner]()


def _name(config, path: Path) -> str:
    return path.relative_to(config.rootpath).as_posix() if path.is_relative_to(config.rootpath) else path.name


def pytest_generate_tests(metafunc):
    if "block" in metafunc.fixturenames:
        paths = [Path(metafunc.config.invocation_params.dir, path).resolve() for path in metafunc.config.option.readme]
        if not paths:
            nothing = pytest.param(None, marks=pytest.mark.skip(reason="no --readme was given"), id="none")
            return metafunc.parametrize("block", [nothing])
        blocks = [block for path in paths for block in readme.parse(path)]
        ids = [f"{_name(metafunc.config, block.readme)}:{block.line}" for block in blocks]
        return metafunc.parametrize("block", blocks, ids=ids)
    return None


@pytest.fixture
def runner(request):
    return request.config.stash[_runner]


def pytest_terminal_summary(terminalreporter, config):
    left = {block: files for block, files in config.stash[_runner].left.items() if files}
    if left:
        terminalreporter.section("files that README blocks left behind")
    for (path, line), files in left.items():
        folders = Counter(Path(file).parts[0] + "/" * ("/" in file) for file in files)
        counts = (f"{name} ({count} files)" if name.endswith("/") else name for name, count in folders.items())
        terminalreporter.line(f"{_name(config, path)}:{line}: {', '.join(counts)}")
