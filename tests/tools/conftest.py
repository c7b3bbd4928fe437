import subprocess
import sys

import pytest


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty repository with the environments alpha, beta and gamma; a test adds projects."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text(".tox/\nresults/\n", encoding="utf-8")
    for env in ("alpha", "beta", "gamma"):
        python = tmp_path / ".tox" / env / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
        python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", "true")  # `true -m tox` has nothing to install
    return tmp_path


@pytest.fixture
def add_file(checkout):
    def add(name, text):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text, encoding="utf-8")

    return add
