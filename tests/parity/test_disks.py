"""Folders that cannot be read or written, full disks: one line that names the file, and nothing half-written.

Root's own runs would prove nothing: they are made without root's capabilities, and then permissions bind root too.
"""

import os
import resource
from contextlib import contextmanager

import pytest
from examples import EXAMPLES
from places import Place, as_a_user

# what goes on where its own folder cannot be written: it compiles again the next time
GOES_ON = {"jax_nanogpt", "tripy_nanogpt"}


@pytest.fixture(scope="module")
def places(pythons, tmp_path_factory):
    """A place for each project, where all is compiled."""
    made = {}

    def get(project):
        if project not in made:
            made[project] = Place(project, pythons(project), tmp_path_factory.mktemp(project))
            assert made[project].run()[::2] == (0, "")
            (made[project].work / "dump.npz").unlink()
        return made[project]

    return get


@contextmanager
def without(permissions, path):
    mode = path.stat().st_mode
    path.chmod(mode & ~permissions)
    try:
        yield
    finally:
        path.chmod(mode)


READ, WRITE = 0o444, 0o222


def assert_refused(answer, name):
    status, _, errors = answer
    assert status == 2 and errors.count("\n") == 1 and name in errors, errors


def test_permissions_bind_in_these_tests(places, tmp_path):
    """Else the others would prove nothing."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with without(READ, tmp_path / "file"):
        child = os.posix_spawn  # noqa: F841


@pytest.mark.parametrize("what", ["weights", "config", "folder"])
@pytest.mark.parametrize("project", EXAMPLES)
def test_a_model_that_cannot_be_read_is_named(project, what, places):
    place = places(project)
    path = {"weights": place.model / "model.safetensors", "config": place.model / "config.json"}.get(what, place.model)
    with without(READ, path):
        assert_refused(place.run(preexec_fn=as_a_user), str(path))
    assert not place.stray()


@pytest.mark.parametrize("project", EXAMPLES)
def test_a_dump_into_a_folder_that_cannot_be_written_is_named(project, places):
    place = places(project)
    (place.work / "closed").mkdir(exist_ok=True)
    with without(WRITE, place.work / "closed"):
        assert_refused(place.run(dump="closed/dump.npz", preexec_fn=as_a_user), "closed/dump.npz")
    assert not place.stray() and not [*(place.work / "closed").iterdir()]


@pytest.mark.parametrize("project", EXAMPLES)
def test_a_dump_to_a_full_disk_leaves_the_old_one(project, places):
    place = places(project)
    (place.work / "dump.npz").write_bytes(b"the old one")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    assert_refused(place.run(preexec_fn=limit), "dump.npz cannot be written: ")
    assert (place.work / "dump.npz").read_bytes() == b"the old one" and not place.stray()
