"""Ctrl-C at any moment, and two runs at once in one folder: nothing half-written, and the next run works."""

import random
import signal
import subprocess
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
    """And now it compiles, and writes what it compiled."""
    assert process.stdout.readline()


def until_it_writes(process):
    seen = ""
    while PROMPT not in seen:
        seen += (more := process.stdout.read(1))
        assert more, f"it ended too soon: {process.communicate()}"


def interrupt(process):
    """(exit status, stdout, stderr). Python ignores a Ctrl-C in a destructor and in JAX's callback of the garbage
    collector: after 20 s it is pressed again."""
    press_ctrl_c(process)
    try:
        return ended(process, timeout_s=20)
    except subprocess.TimeoutExpired:
        press_ctrl_c(process)
        return ended(process)


def python_ignored_it(errors):
    return errors.startswith("Exception ignored in") and "KeyboardInterrupt" in errors


def assert_interrupted(place, status, errors, importing=False):
    """In silence. But while the script imports its packages, these decide how it ends: jaxlib sometimes crashes."""
    if importing:
        assert status != 0
    else:
        assert status in (130, -signal.SIGINT), errors  # the second in JAX's scripts, and while Python ends
        assert errors == "" or python_ignored_it(errors)
    assert not place.stray() and not place.running()


def assert_next_run_works(place, tokens):
    status, _, errors = place.run()
    assert (status, errors) == (0, "")
    assert place.dump()["tokens"].tolist() == tokens
    assert not place.stray()


@pytest.mark.parametrize("project", EXAMPLES)
def test_ctrl_c_at_every_stage(project, place, tokens):
    for stage in until_it_imports, until_it_has_named_its_model, until_it_writes:
        status = 0
        while status == 0:
            (place.work / "dump.npz").unlink(missing_ok=True)
            process = place.start("--max-new-tokens=200")
            stage(process)
            status, _, errors = interrupt(process)
            assert status or python_ignored_it(errors), "it ended too soon"
        assert_interrupted(place, status, errors, importing=stage == until_it_imports)
        assert not (place.work / "dump.npz").exists()
    assert_next_run_works(place, tokens)


@pytest.mark.parametrize("project", EXAMPLES)
def test_ctrl_c_ends_a_benchmark(project, place):
    process = place.start(f"--model={place.model}", "--new-tokens=8", "--rounds=1000000", script="bench.py")
    until_it_has_named_its_model(process)
    status, _, errors = interrupt(process)
    assert_interrupted(place, status, errors)


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
        status, out, errors = ended(process)
        seconds.append(time.monotonic() - start)
        ends.append(status)
        if status:
            assert number >= 0
            assert_interrupted(place, status, errors, importing=not out)
        else:
            assert errors == "" or python_ignored_it(errors)
            assert place.dump()["tokens"].tolist() == tokens
    assert_next_run_works(place, tokens)
    interrupted = count - ends[2:].count(0)
    report("counts", f"{project}: {count} interrupts, {interrupted} of them before all was done")
    assert interrupted > count // 4


@pytest.mark.parametrize("project", EXAMPLES)
def test_two_runs_at_once_in_one_folder(project, place, tokens, referee):
    """With nothing compiled, and one dump for both."""
    for _, out, errors in map(ended, [place.start(), place.start()]):
        assert errors == "" and referee.text(tokens) in out
    given = place.dump()
    assert given["tokens"].tolist() == tokens and np.isfinite(given["logits"]).all()
    assert not place.stray()
    assert_next_run_works(place, tokens)
