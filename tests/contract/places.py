"""A project in a folder of its own: copies of its code and of the checkpoint, a home, a folder for temporary files.

Whatever a run leaves behind is in that folder.
"""

import ctypes
import io
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np

from tests.contract.parity import NANO
from tests.conventions.rules import ROOT
from tests.tools.examples import command

PROMPT, NEW_TOKENS = "To be, or not to be", 24
CAP_LAST, PR_CAPBSET_DROP = 63, 24


def copy_of(project, folder):
    left_out = shutil.ignore_patterns("executables", "out*", "__pycache__")
    for name in (project, "shared"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    return folder


class Place:
    """Runs a project's scripts as a user would."""

    def __init__(self, project, python, folder):
        self.project, self.python, self.folder = project, python, folder
        self.root, self.work, self.model = copy_of(project, folder / "root"), folder / "work", folder / "model"
        self.code = {*self.root.rglob("*")}
        shutil.copytree(NANO, self.model)
        self.home, self.temporary = folder / "home", folder / "temporary"
        for path in self.work, self.home, self.temporary:
            path.mkdir()

    def environment(self):
        home = {"HOME": self.home, "XDG_CACHE_HOME": self.home, "QEFF_HOME": self.home / "qeff"}
        away = {"JAX_COMPILATION_CACHE_DIR", "TIKTOKEN_CACHE_DIR"}
        kept = {name: value for name, value in os.environ.items() if name not in away}
        switches = {"PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return kept | {name: str(path) for name, path in home.items()} | {"TMPDIR": str(self.temporary)} | switches

    def start(self, *more, script=None, dump="dump.npz", new_tokens=NEW_TOKENS, preexec_fn=None):
        """The example, or another script with the flags more, as a terminal's job: Ctrl-C goes to its whole group."""
        settings = {"model": self.model, "prompt": PROMPT, "new_tokens": new_tokens, "dump": dump}
        words = [self.root / self.project / script] if script else command(self.root, self.project, **settings)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        return subprocess.Popen(
            [self.python, *words, *more],
            cwd=self.work,
            env=self.environment(),
            start_new_session=True,
            preexec_fn=preexec_fn,
            **pipes,
        )

    def run(self, *more, **settings):
        """(exit status, stdout, stderr)"""
        return ended(self.start(*more, **settings))

    def dump(self, name="dump.npz"):
        return dict(np.load(io.BytesIO((self.work / name).read_bytes())))

    def forget(self):
        """Removes everything that was compiled."""
        for folder in self.work, self.home, self.root / self.project / "executables":
            shutil.rmtree(folder, ignore_errors=True)
        self.work.mkdir()
        self.home.mkdir()

    def running(self):
        """The ids of processes started here: each has a path of this folder in its arguments."""
        listed = subprocess.run(["ps", "-eww", "-o", "pid=,args="], capture_output=True, check=True)
        folder = f"{self.folder}/".encode()
        return [int(line.split()[0]) for line in listed.stdout.splitlines() if folder in line]

    def stray(self):
        """What a run must not leave: temporary files."""
        found = [path for path in self.folder.rglob("*") if path not in self.code and path.is_file()]
        return [str(path) for path in found if self.temporary in path.parents or is_temporary(path.name)]


def is_temporary(name):
    return name.startswith(".") or name.endswith((".part", ".tmp"))


def ended(process, timeout_s=300):
    out, errors = process.communicate(timeout=timeout_s)
    return process.returncode, out, errors


def imports(pid):
    """Whether it has loaded a library that pip installed: its slow imports have begun."""
    return "site-packages" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


def wait_until(process, happened):
    while not happened():
        assert process.poll() is None, f"it ended too soon: {process.communicate()}"
        time.sleep(0.002)


def press_ctrl_c(process):
    os.killpg(process.pid, signal.SIGINT)


def as_a_user():
    """As preexec_fn: drops root's capabilities, so that permissions apply to root too."""
    if os.getuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in range(CAP_LAST + 1):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
