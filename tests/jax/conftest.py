"""No test asks a hub, and none traces or compiles a program again that another one has."""

import os
import sys
from pydoc_data.topics import topics

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import jax
import pytest

from jax_nanogpt import train
from jax_nanogpt.data.corpus import write_characters
from tests.jax.runs import TINY


def pytest_addoption(parser):
    group = parser.getgroup("kills", "kill -9 in training (make kills)")
    group.addoption("--kills", type=int, default=4, help="how many (default: %(default)s)")
    group.addoption("--kills-seed", type=int, default=0, help="of their moments (default: %(default)s)")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for the scripts that tests start
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session", autouse=True)
def one_optimizer_per_settings():
    """JAX traces a program again for another optimizer, and a new one is another: runs of equal settings share one."""
    make, made = train.make_optimizer, {}

    def make_once(config):
        key = tuple(value for name, value in vars(config).items() if name not in train.FREE)
        if key not in made:
            made[key] = make(config)
        return made[key]

    train.make_optimizer = make_once
    yield
    train.make_optimizer = make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_characters(folder, "".join(topics[name] for name in sorted(topics)[:8]))
    return folder


@pytest.fixture
def run(dataset, monkeypatch, capsys):
    """train.py in this process: run(out_dir, flags...) -> what it printed."""

    def call(out_dir, *flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, f"--dataset={dataset}", f"--out_dir={out_dir}", *flags])
        train.main()
        printed, call.errors = capsys.readouterr()
        return printed

    return call
