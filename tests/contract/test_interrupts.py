"""Ctrl-C at any moment, two runs at once in one folder: one line, nothing half-written, and the next run goes on."""

import random
import time

import numpy as np
import pytest

from tests.contract.places import PROMPT, Place, ended, imports, press_ctrl_c, wait_until
from tests.tools.examples import EXAMPLES


@pytest.fixture
def place(project, pythons, tmp_path):
    return Place(project, pythons(project), tmp_path)


def until_it_imports(process):
    wait_until(process, lambda: imports(process.pid))


def until_it_has_named_its_model(process):
    """And now it reads, compiles and writes what it compiled."""
    assert process.stdout.readline()


def until_it_writes(process):
    seen = ""
    while PROMPT not in seen:
        seen += (more := process.stdout.read(1))
        assert more, f"it ended too soon: {process.communicate()}"


def assert_it_was_interrupted(status, errors):
    lines = [line for line in errors.splitlines() if line]
    assert status == 130 and len(lines) == 1 and lines[0].startswith("interrupted"), (status, errors)


def assert_it_is_gone(place):
    assert not place.stray() and not place.running()


@pytest.mark.parametrize("project", EXAMPLES)
def test_ctrl_c_at_every_stage_is_one_line_and_the_next_run_goes_on(project, place, tokens):
    for stage in until_it_imports, until_it_has_named_its_model, until_it_writes:
        long = {"jax_nanogpt": "--max_new_tokens=200"}.get(project, "--max-new-tokens=200")
        process = place.start(long)
        stage(process)
        press_ctrl_c(process)
        status, _, errors = ended(process)
        assert_it_was_interrupted(status, errors)
        assert_it_is_gone(place)
        assert not (place.work / "dump.npz").exists()
    status, _, errors = place.run()
    assert (status, errors) == (0, "")
    assert place.dump()["tokens"].tolist() == tokens
    assert not place.stray()


@pytest.mark.parametrize("project", EXAMPLES)
def test_ctrl_c_ends_a_benchmark_and_what_it_started(project, place):
    process = place.start(f"--model={place.model}", "--new-tokens=8", script="bench.py")
    until_it_has_named_its_model(process)
    processes = 2 if project in ("qaic_gpt2", "tripy_nanogpt") else 1  # these two begin with one of its own
    wait_until(process, lambda: [*map(imports, place.running())] == [True] * processes)
    press_ctrl_c(process)
    status, _, errors = ended(process)
    assert_it_was_interrupted(status, errors)
    assert_it_is_gone(place)


@pytest.mark.parametrize("project", EXAMPLES)
def test_ctrl_c_at_random_moments(request, project, place, tokens, report):
    """From the first import on, every other time with nothing compiled. A moment may come when all is done."""
    count = request.config.getoption("--interrupts")
    if not count:
        pytest.skip("--interrupts=0: make kills has them")
    draw, ends = random.Random(f"{project} {request.config.getoption('--interrupts-seed')}"), []
    seconds = []
    for number in range(-2, count):
        cold = number % 2 == 0
        if cold:
            place.forget()
        process, start = place.start(), time.monotonic()
        if number >= 0:
            until_it_imports(process)
            time.sleep(draw.uniform(0, seconds[number % 2]))
            press_ctrl_c(process)
        status, _, errors = ended(process)
        seconds.append(time.monotonic() - start)
        ends.append(status)
        if status:
            assert number >= 0
            assert_it_was_interrupted(status, errors)
        else:
            assert errors == "" and place.dump()["tokens"].tolist() == tokens
        assert_it_is_gone(place)
    status, _, errors = place.run()
    assert (status, errors) == (0, "") and place.dump()["tokens"].tolist() == tokens
    report("counts", f"{project}: {count} interrupts, {ends[2:].count(130)} of them before all was done")
    assert ends.count(130) > count // 2


@pytest.mark.parametrize("project", EXAMPLES)
def test_two_runs_at_once_in_one_folder(project, place, tokens, referee):
    """With nothing compiled, and one dump for both."""
    for _, out, errors in map(ended, [place.start(), place.start()]):
        assert errors == "" and referee.text(tokens) in out
    given = place.dump()
    assert given["tokens"].tolist() == tokens and np.isfinite(given["logits"]).all()
    assert not place.stray()
    status, out, errors = place.run()
    assert (status, errors) == (0, "") and referee.text(tokens) in out
