"""How the OpenMP threads of PyTorch wait: next to other work, threads that spin hold up the ones they wait for."""

import os
import subprocess

import pytest

from tests.conventions.rules import ROOT
from tests.tools.bench import spinning
from tests.tools.examples import ask

COUNTS = {"neuron_nanogpt": 2000, "tripy_nanogpt": 3000}  # the others' threads are onnxruntime's and XLA's own


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """libgomp writes to stderr what it reads from the environment."""
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for name in "OMP_WAIT_POLICY", "GOMP_SPINCOUNT":
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("project", COUNTS)
def test_the_examples_threads_soon_sleep_beside_a_busy_core(project, pythons, tmp_path):
    with spinning():
        answer = ask(pythons(project), ROOT, project, tmp_path, model="gpt2-nano", prompt="To be", new_tokens=4)
    assert answer.status == 0 and f"GOMP_SPINCOUNT = '{COUNTS[project]}'" in answer.stderr


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")])
@pytest.mark.parametrize("project", COUNTS)
def test_the_benchmarks_threads_wait_as_the_environment_says(project, name, value, pythons, tmp_path, monkeypatch):
    def policy():
        command = [pythons(project), ROOT / project / "bench.py", "--model=nothing"]
        return subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, encoding="utf-8").stderr

    usual = f"GOMP_SPINCOUNT = '{COUNTS[project]}'"
    assert usual in policy()
    monkeypatch.setenv(name, value)
    assert f"{name} = '{value}'" in policy() and usual not in policy()
