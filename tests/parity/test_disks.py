"""Folders that cannot be read or written, full disks: one line that names the file, and nothing half-written.

Root's own runs would prove nothing: they are made without root's capabilities, and then permissions bind root too.
"""

import resource
import subprocess
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


READ, WRITE, ENTER = 0o444, 0o222, 0o111


def full_after(size):
    """A disk on which no file can grow further: in a child, before it executes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def assert_refused(answer, name):
    status, _, errors = answer
    assert status == 2 and errors.count("\n") == 1 and name in errors, errors


def test_permissions_bind_in_these_tests(tmp_path):
    """Else the others would prove nothing."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with without(READ, tmp_path / "file"):
        child = subprocess.run(["cat", tmp_path / "file"], preexec_fn=as_a_user, capture_output=True)
    assert child.returncode and b"Permission denied" in child.stderr


@pytest.mark.parametrize("what", ["model.safetensors", "."])
@pytest.mark.parametrize("project", EXAMPLES)
def test_a_model_that_cannot_be_read_is_named(project, what, places):
    place = places(project)
    with without(READ | ENTER, place.model / what):
        assert_refused(place.run(preexec_fn=as_a_user), str(place.model / what))
    assert not place.stray()


@pytest.mark.parametrize("project", EXAMPLES)
def test_a_dump_into_a_folder_that_cannot_be_written_is_named(project, places):
    place = places(project)
    closed = place.work / "closed"
    closed.mkdir()
    with without(WRITE, closed):
        assert_refused(place.run(dump="closed/dump.npz", preexec_fn=as_a_user), "closed/dump.npz cannot be written: ")
    assert not place.stray() and not [*closed.iterdir()]


@pytest.mark.parametrize("project", EXAMPLES)
def test_a_dump_to_a_full_disk_leaves_the_old_one(project, places):
    place = places(project)
    (place.work / "dump.npz").write_bytes(b"the old one")
    assert_refused(place.run(preexec_fn=full_after(100_000)), "dump.npz cannot be written: ")
    assert (place.work / "dump.npz").read_bytes() == b"the old one" and not place.stray()


# -- where a project keeps what it compiled

KEPT = {
    "jax_nanogpt": ("home", None),  # it goes on, and compiles again the next time
    "neuron_nanogpt": ("work", "gpt2_step_neuron.pt"),
    "qaic_gpt2": ("home", "qeff"),
    "tripy_nanogpt": ("root/tripy_nanogpt", "executables"),  # and this one says so
}


@pytest.mark.parametrize("project", EXAMPLES)
def test_where_nothing_can_be_kept_it_says_so(project, pythons, tmp_path, right_text):
    """In a folder that cannot be written, and on a disk that is full."""
    place = Place(project, pythons(project), tmp_path)
    folder, named = KEPT[project]
    with without(WRITE, tmp_path / folder):
        closed = place.run(dump=tmp_path / "dump.npz", preexec_fn=as_a_user)
    full = place.run(dump="/dev/null", preexec_fn=full_after(20_000))
    for status, out, errors in closed, full:
        if project in GOES_ON:
            assert status == 0 and right_text in out
            assert errors.count("\n") == 0 if named is None
        else:
            assert_refused((status, out, errors), named)
    assert not place.stray()
    assert place.run()[::2] == (0, "")
