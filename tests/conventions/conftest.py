import shutil

import pytest

from tests.conventions.made_up import make_house


@pytest.fixture(scope="session")
def _made_once(tmp_path_factory):
    make_house(folder := tmp_path_factory.mktemp("house") / "made-up")
    return folder


@pytest.fixture
def made_up(_made_once, tmp_path):
    """A house in order, for a test to break."""
    return shutil.copytree(_made_once, tmp_path, dirs_exist_ok=True)
