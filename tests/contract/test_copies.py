"""A project's folder, shared and checkpoints, copied elsewhere: all that a user of one project needs."""

import shutil

import pytest

from tests.contract.places import Place
from tests.conventions.rules import ROOT, example_of
from tests.tools.examples import EXAMPLES

MORE = {"tripy_nanogpt": ["--quant-mode=float8"]}  # which is calibrated on a text


@pytest.mark.parametrize("project", EXAMPLES)
def test_a_copied_folder_works(project, pythons, tmp_path):
    place = Place(project, pythons(project), tmp_path)
    (place.root / "checkpoints").unlink()
    shutil.copytree(ROOT / "checkpoints", place.root / "checkpoints")
    assert {path.name for path in place.root.iterdir()} == {project, "shared", "checkpoints"}
    status, out, errors = place.run(*MORE.get(project, []), "--max-new-tokens=8", script=example_of(ROOT, project))
    assert status == 0, errors
    assert out.startswith("gpt2-nano (3.6M parameters")
