"""Folders that cannot be read or written, full disks: one line that names the file, and nothing half-written."""

import os
import resource
import subprocess
from contextlib import contextmanager
from functools import cache

import pytest

from tests.contract.places import Place, as_a_user
from tests.tools.examples import EXAMPLES

READ, WRITE = 0o444, 0o222
KEPT = {  # where a project keeps what it compiled
    "jax_nanogpt": "home",
    "neuron_nanogpt": "work/gpt2_step_neuron.pt",
    "qaic_gpt2": "home/qeff",
    "tripy_nanogpt": "root/tripy_nanogpt/executables",
}


@pytest.fixture(scope="module")
def places(pythons, tmp_path_factory):
    """places(project): where everything is compiled."""

    @cache
    def get(project):
        place = Place(project, pythons(project), tmp_path_factory.mktemp(project))
        assert place.run()[::2] == (0, "")
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


def full_after(size):
    """As preexec_fn: a disk on which no file can grow larger."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def assert_refused(place, answer, name):
    status, _, errors = answer
    assert status == 2 and errors.count("\n") == 1 and name in errors, errors
    assert not place.stray()


def test_permissions_apply_to_root_in_these_tests(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with without(READ, tmp_path / "file"):
        child = subprocess.run(["cat", tmp_path / "file"], preexec_fn=as_a_user, capture_output=True)
    assert child.returncode and b"Permission denied" in child.stderr


@pytest.mark.parametrize("project", EXAMPLES)
def test_unreadable_weights_are_named(project, places):
    place = places(project)
    weights = place.model / "model.safetensors"
    with without(READ, weights):
        assert_refused(place, place.run(preexec_fn=as_a_user), str(weights))


@pytest.mark.parametrize("project", ["qaic_gpt2"])  # the same lines write it in each project
def test_a_dump_into_a_read_only_folder_is_refused(project, places):
    place = places(project)
    closed = place.work / "closed"
    closed.mkdir()
    with without(WRITE, closed):
        answer = place.run(dump="closed/dump.npz", preexec_fn=as_a_user)
    assert_refused(place, answer, "closed/dump.npz cannot be written: ")
    assert not [*closed.iterdir()]


@pytest.mark.parametrize("project", EXAMPLES)
def test_a_dump_to_a_full_disk_leaves_the_old_one(project, places):
    place = places(project)
    (place.work / "dump.npz").write_bytes(b"the old one")
    assert_refused(place, place.run(preexec_fn=full_after(100_000)), "dump.npz cannot be written: ")
    assert (place.work / "dump.npz").read_bytes() == b"the old one"


@pytest.mark.parametrize("project", EXAMPLES)
def test_what_is_compiled_and_cannot_be_kept(project, pythons, tmp_path, tokens):
    """In a read-only folder, and on a full disk: it is an error, or the run goes on without."""
    place, kept = Place(project, pythons(project), tmp_path), tmp_path / KEPT[project]
    dump = {"dump": tmp_path / "dump.npz", "new_tokens": 2}  # small enough for either
    with without(WRITE, kept if project == "jax_nanogpt" else kept.parent):
        read_only = place.run(**dump, preexec_fn=as_a_user)
    for answer in read_only, place.run(**dump, preexec_fn=full_after(40_000)):
        status, _, errors = answer
        if project in ("neuron_nanogpt", "qaic_gpt2"):
            assert_refused(place, answer, kept.name)
            continue
        said = ["the next run compiles again: "] if project == "tripy_nanogpt" else []
        assert status == 0 and errors.count("\n") == len(said) and all(words in errors for words in said), errors
        kept_elsewhere = f"{place.temporary}/cache-{os.getuid()}/jax_nanogpt/"  # without a home that can be written
        assert not [path for path in place.stray() if not path.startswith(kept_elsewhere)]
        assert place.dump(dump["dump"])["tokens"].tolist() == tokens[:2]
