"""make fuzz notices each way in which a script may end badly: a made-up one does, when it is given --dump=device."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.contract import fuzz, fuzz_input
from tests.conventions.rules import ROOT

EXAMPLE = """import argparse, os, signal, sys, time
import numpy as np

def fail(message):
    print(ascii(message), file=sys.stderr)
    sys.exit(2)

def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.error = fail
    for flag in "--model", "--prompt", "--dump":
        parser.add_argument(flag, default="")
    args = parser.parse_args(argv)
    tokens = [1]
    if args.dump == "device":
        {body}
    try:
        with open(args.model + "/merges.txt", "rb") as file:
            size = len(file.read())
        with open(args.dump, "wb") as file:
            np.savez(file, tokens=np.array({tokens}))
    except (OSError, ValueError, TypeError) as error:
        fail(error)

if __name__ == "__main__":
    main()
"""


# runs each script of alpha_gpt by itself, as fuzz_run.py does its cases
EACH = """import json, sys
from pathlib import Path
from tests.contract.fuzz_input import Case
from tests.contract.fuzz_run import complaint, load, prepare, renewed, run_here

root, scratch = map(Path, sys.argv[1:])
_, case, template = prepare(root, "alpha_gpt", scratch)
for name, script in load(root, "alpha_gpt").items():
    limit = 2 if name == "sleeps.py" else 60
    *ended, _ = run_here(script.main, ("--dump=device",), renewed(case, template), limit)
    wrong = complaint(Case("found", name, ()), case, template, [1], limit, *ended)
    print(f"{name} {wrong or 'is well'}: {' '.join(ended[2].split())}", flush=True)
"""


def write_script(root, name, body="fail('no file')", tokens="tokens"):
    (root / "alpha_gpt").mkdir(exist_ok=True)
    (root / "shared").mkdir(exist_ok=True)
    (root / "alpha_gpt" / name).write_text(EXAMPLE.format(body=body, tokens=tokens), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    def run(body="fail('no file')", tokens="tokens", *options):
        write_script(tmp_path, "example.py", body, tokens)
        options = options or ("--cases=1", "--processes=0", "--every=50", "--limit=60")
        return fuzz.fuzz(Path(sys.executable), tmp_path, "alpha_gpt", *options)

    return run


def test_a_script_that_ends_well_is_passed_and_its_cases_are_counted(run):
    result = run("fail('no file')", "tokens", "--cases=20", "--processes=2", "--every=20", "--limit=60")
    assert not result.failed, result.told
    kinds = result.passed
    assert kinds["flags"] + kinds["prompts"] + kinds["files"] == 20 and min(kinds.values()) > 0
    assert kinds["cuts"] == 4 * 6 and kinds["processes"] == 2


BAD_ENDS = {
    "raises": ("raise RuntimeError('ours')", "exit status 1: Traceback (most recent call last)"),
    "traces": ("print('Traceback (most recent call last)', file=sys.stderr); sys.exit(2)", "a traceback"),
    "talks": ("print('one\\ntwo', file=sys.stderr); sys.exit(2)", "2 lines on stderr"),
    "says_nothing": ("sys.exit(2)", "0 lines on stderr"),
    "sleeps": ("time.sleep(600)", "KeyboardInterrupt"),
    "leaves_a_part": ("open('dump.npz.part', 'w'); fail('no space')", "dump.npz.part is left"),
    "leaves_a_half": ("open(os.environ['TMPDIR'] + '/half', 'w'); fail('no space')", "tmp/half is left"),
    "fails_and_writes": ("open('dump.npz', 'w'); fail('no space')", "it failed, and wrote dump.npz"),
    "executes": ("os.mkdir('model/executed'); fail('no model')", "what was in a file was executed"),
    "takes_the_device": ("os.remove('device'); open('device', 'w'); fail('no device')", "a device was replaced"),
    "ends_well": ("fail('no file')", "is well: 'no file'"),
}


@pytest.fixture(scope="module")
def bad_ends(tmp_path_factory):
    """What is said of each, in one process."""
    root, scratch = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("scratch")
    for name, (body, _) in BAD_ENDS.items():
        write_script(root, f"{name}.py", body)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, ROOT, ROOT)))}
    command = [sys.executable, "-c", EACH, root, scratch]
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    return dict(line.split(".py ", 1) for line in result.stdout.splitlines())


@pytest.mark.parametrize("name", BAD_ENDS)
def test_each_bad_end_is_told_from_a_good_one(bad_ends, name):
    assert BAD_ENDS[name][1] in bad_ends[name]


@pytest.mark.parametrize(
    ("body", "said"),
    [("sys.exit(2)", "0 lines on stderr"), ("os.kill(os.getpid(), signal.SIGKILL)", "the process died")],
)
def test_a_bad_end_is_found_once_and_its_case_named(run, body, said):
    result = run(body)
    assert result.failed.total() == 1, result.told
    line = next(line for line in result.told.splitlines() if re.match(r"FAILED alpha_gpt \d+ found: example.py", line))
    assert "--dump=device" in line and said in result.told


def test_a_cut_file_that_makes_another_text_is_found(run):
    result = run(tokens="[size]")
    assert result.failed["cuts"] == 2 and "a file that is cut makes the tokens [0], the whole" in result.told


def test_a_seed_draws_the_same_cases_again_and_another_seed_others():
    flag = fuzz_input.Flag(["--n"], "n", int, [], True)
    words = fuzz_input.words_for("example.py", [flag])
    first, again, other = (fuzz_input.drawn(words, 20, seed) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 20


def test_the_last_line_counts_and_the_status_tells(monkeypatch, capsys):
    results = {"alpha": ("", {"flags": 3}, {}), "beta": ("FAILED beta 1", {"cuts": 1}, {"cuts": 1})}
    results = {name: fuzz.Result(told, *map(Counter, counts)) for name, (told, *counts) in results.items()}
    monkeypatch.setattr(fuzz, "python_of", lambda root, name: None)
    monkeypatch.setattr(fuzz, "fuzz", lambda python, root, name, *options: results[name])
    assert fuzz.main(ROOT, ["--project=alpha", "--seed=5"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("seed 5: ") and out[-1] == "3 passed, 0 failed"
    assert fuzz.main(ROOT, ["--project=alpha", "--project=beta"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "FAILED beta 1" in out and out[-2:] == ["cuts 2, flags 3", "4 passed, 1 failed"]
