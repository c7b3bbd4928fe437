"""The commands of the READMEs given by --readme, each block a test."""

import pytest


def test_block(block, runner):
    outcome, why = runner.outcome(block)
    if outcome == "skipped":
        pytest.skip(why)
    if outcome == "failed":
        pytest.fail(why, pytrace=False)
