"""start_script: which Pythons it lets through, and characters that a console lacks. script: how it ends."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shared

ROOT = Path(shared.__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def the_same_ctrl_c():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("minor", range(6, 16))
def test_the_range_ends_where_it_says(minor, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, minor, 0, "final", 0))
    if 11 <= minor <= 13:
        shared.start_script("__main__")
    else:
        with pytest.raises(SystemExit) as ended:
            shared.start_script("__main__")
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"Python is 3.{minor}.0, 3.11 to 3.13 is expected\n"


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("utf-8", "我 ☕ é \\ud800".encode()),
        ("cp1252", b"\\u6211 \\u2615 \xe9 \\ud800"),
        ("ascii", b"\\u6211 \\u2615 \\xe9 \\ud800"),
    ],
)
def test_a_character_that_the_console_lacks_is_printed_as_its_escape(encoding, printed, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "version_info", (3, 12, 0, "final", 0))
    shared.start_script("__main__")
    print("我 ☕ é \ud800", end="", flush=True)
    assert raw.getvalue() == printed


def test_what_stands_in_stdouts_place_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 12, 0, "final", 0))
    for place in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", place)
        shared.start_script("__main__")


def test_a_script_that_is_imported_leaves_everything_as_it_was():
    before = signal.getsignal(signal.SIGINT), sys.stdout.errors
    shared.start_script("example")
    assert (signal.getsignal(signal.SIGINT), sys.stdout.errors) == before


# -- how a script ends


def ending(error):
    @shared.script
    def main(argv=None):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a name\nof two \x1b[2J lines\ud800"), "a name\\nof two \\x1b[2J lines\\ud800\n"),
        (OSError(2, "no such file", "here"), "[Errno 2] no such file: 'here'\n"),
        (MemoryError(), "there is not enough memory ()\n"),
        (type("ArrayMemoryError", (MemoryError,), {})("8 EB"), "there is not enough memory (8 EB)\n"),  # as NumPy's
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB\nmore"), "there is not enough memory (RESOURCE_EXHAUSTED: 9 GB)\n"),
        (RuntimeError("can't allocate memory: 8 EB"), "there is not enough memory (can't allocate memory: 8 EB)\n"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(error, line, capsys):
    with pytest.raises(SystemExit) as ended:
        ending(error)([])
    assert ended.value.code == 2 and capsys.readouterr().err == line


def test_a_value_that_argparse_takes_away_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        ending(AssertionError("it ran"))(["--prompt=--"])
    assert ended.value.code == 2 and capsys.readouterr().err == "--prompt=--: -- is no value\n"


def test_a_long_message_keeps_its_beginning_and_its_end(capsys):
    with pytest.raises(SystemExit):
        ending(ValueError(f"device is {'x' * 10**6}, cpu is expected"))([])
    error = capsys.readouterr().err
    assert error.startswith("device is xxx") and error.endswith("xxx, cpu is expected\n") and len(error) < 2100


INTO_A_DESTRUCTOR = """
import signal, time
from shared import script, start_script
start_script(__name__)

class Resource:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

@script
def main(argv=None):
    Resource()
    time.sleep(600)

main()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that one sends oneself")
def test_ctrl_c_is_not_lost_in_a_destructor():
    command = [sys.executable, "-c", INTO_A_DESTRUCTOR]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=120)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("ours", [RuntimeError("a shape"), RecursionError("deep"), KeyError("name"), AssertionError()])
def test_what_is_ours_keeps_its_traceback(ours):
    with pytest.raises(type(ours)):
        ending(ours)([])
