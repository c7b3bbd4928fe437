"""A report of each project on this machine's CPU, by a copy of its folder and in its own environment."""

import json
import os
import shutil
import subprocess

import pytest

from tests.contract.places import copy_of
from tests.conventions.rules import ROOT
from tests.tools.examples import EXAMPLES, python_of


@pytest.mark.parametrize("project", EXAMPLES)
def test_a_report_on_this_machine_says_cpu_and_that_all_is_as_expected(project, tmp_path):
    root = copy_of(project, tmp_path / "root")
    script = root / "tests" / "tools" / "report.py"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "tools" / "report.py", script)
    kept = {"QEFF_HOME": str(tmp_path / "qeff"), "HF_HUB_OFFLINE": "1"}
    command = [python_of(ROOT, project), script, project, "--device=cpu"]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | kept, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (found["device"], found["verdict"]) == ("cpu", "as expected")
    assert found["figures"]["decode"]["tokens_per_s"] > 0 and found["packages"]["numpy"]
    assert "as expected (up to" in (tmp_path / "report.md").read_text(encoding="utf-8")
