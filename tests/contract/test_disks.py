"""Folders that cannot be read or written, full disks: one line that names the file, and nothing half-written."""

import resource
import subprocess
from contextlib import contextmanager
from functools import cache

import pytest

from tests.contract.places import Place, as_a_user
from tests.tools.examples import EXAMPLES


@pytest.fixture(scope="module")
def places(pythons, tmp_path_factory):
    """places(project): where everything is compiled."""

    @cache
    def get(project):
        place = Place(project, pythons(project), tmp_path_factory.mktemp(project))
        assert place.run()[::2] == (0, "")
        (place.work / "dump.npz").unlink()
        return place

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


def full_after(size):
    """As preexec_fn: a disk on which no file can grow larger."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def assert_refused(answer, name):
    status, _, errors = answer
    assert status == 2 and errors.count("\n") == 1 and name in errors, errors


def test_permissions_apply_to_root_in_these_tests(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with without(READ, tmp_path / "file"):
        child = subprocess.run(["cat", tmp_path / "file"], preexec_fn=as_a_user, capture_output=True)
    assert child.returncode and b"Permission denied" in child.stderr


@pytest.mark.parametrize("project", EXAMPLES)
def test_a_model_that_cannot_be_read_is_named(project, places):
    place = places(project)
    weights = place.model / "model.safetensors"
    with without(READ, weights):
        assert_refused(place.run(preexec_fn=as_a_user), str(weights))
    assert not place.stray()


@pytest.mark.parametrize("project", ["qaic_gpt2"])  # of each project in the next test, where the same lines write
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
    "jax_nanogpt": "home",
    "neuron_nanogpt": "work/gpt2_step_neuron.pt",
    "qaic_gpt2": "home/qeff",
    "tripy_nanogpt": "root/tripy_nanogpt/executables",
}


@pytest.mark.parametrize("project", EXAMPLES)
def test_what_is_compiled_and_cannot_be_kept(project, pythons, tmp_path, tokens):
    """In a read-only folder, and on a full disk: it is an error, or the run goes on without."""
    place, kept = Place(project, pythons(project), tmp_path), tmp_path / KEPT[project]
    dump = {"dump": tmp_path / "dump.npz", "new_tokens": 2}  # and that is small enough for either
    with without(WRITE, kept if project == "jax_nanogpt" else kept.parent):
        closed = place.run(**dump, preexec_fn=as_a_user)
    full = place.run(**dump, preexec_fn=full_after(40_000))
    for status, out, errors in closed, full:
        if project == "jax_nanogpt":
            assert (status, errors) == (0, "")
        elif project == "tripy_nanogpt":
            assert status == 0 and errors.count("\n") == 1 and "the next run compiles again: " in errors
        else:
            assert_refused((status, out, errors), kept.name)
        if status == 0:
            assert place.dump(dump["dump"])["tokens"].tolist() == tokens[:2]
    assert not place.stray()
