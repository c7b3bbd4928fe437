"""A part of what make fuzz tries, the same each time: bad input for every script of every project."""

import pytest

from tests.contract import fuzz
from tests.conventions.rules import ROOT
from tests.tools.examples import EXAMPLES

CASES = 47  # of each project


@pytest.mark.parametrize("project", EXAMPLES)
def test_bad_input_ends_in_one_line_or_works(project, pythons, report):
    result = fuzz.fuzz(pythons(project), ROOT, project, "--cases=25", "--every=25", "--processes=2")
    report("counts", f"bad input for {project}: {fuzz.counted(result.passed + result.failed)}")
    assert not result.failed, result.told
    assert result.passed.total() >= CASES and result.passed["cuts"] == 20 and result.passed["processes"] == 2
