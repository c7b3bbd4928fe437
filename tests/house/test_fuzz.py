"""make fuzz notices each way in which a script may end badly: a made-up one does, when it is given --dump=device."""

import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import fuzz
import fuzz_input
import pytest
from house import ROOT

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


@pytest.fixture
def run(tmp_path):
    def run(body="fail('no file')", tokens="tokens", *options):
        project = tmp_path / "alpha_gpt"
        shutil.rmtree(project, ignore_errors=True)
        project.mkdir()
        (project / "example.py").write_text(EXAMPLE.format(body=body, tokens=tokens), encoding="utf-8")
        (tmp_path / "shared").mkdir(exist_ok=True)
        options = options or ("--cases=1", "--processes=0", "--every=50", "--limit=2")
        return fuzz.fuzz(Path(sys.executable), tmp_path, "alpha_gpt", *options)

    return run


def test_a_script_that_ends_well_is_passed_and_its_cases_are_counted(run):
    result = run("fail('no file')", "tokens", "--cases=40", "--processes=3", "--every=20")
    assert not result.failed, result.told
    kinds = result.passed
    assert kinds["flags"] + kinds["prompts"] + kinds["files"] == 40 and min(kinds.values()) > 0
    assert kinds["cuts"] == 4 * 6 and kinds["processes"] == 3


@pytest.mark.parametrize(
    "body, said",
    [
        ("raise RuntimeError('ours')", "exit status 1: 'Traceback (most recent call last)"),
        ("print('Traceback (most recent call last)', file=sys.stderr); sys.exit(2)", "a traceback"),
        ("print('one\\ntwo', file=sys.stderr); sys.exit(2)", "2 lines on stderr"),
        ("sys.exit(2)", "0 lines on stderr"),
        ("time.sleep(60)", "KeyboardInterrupt"),
        ("open('dump.npz.part', 'w'); fail('no space')", "dump.npz.part is left"),
        ("open(os.environ['TMPDIR'] + '/half', 'w'); fail('no space')", "tmp/half is left"),
        ("open('dump.npz', 'w'); fail('no space')", "it failed, and wrote dump.npz"),
        ("os.mkdir('model/executed'); fail('no model')", "what was in a file was executed"),
        ("os.remove('device'); open('device', 'w'); fail('no device')", "a device was replaced"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "the process died"),
    ],
)
def test_each_bad_end_is_found_once_and_its_case_named(run, body, said):
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
