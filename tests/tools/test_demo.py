"""make demo, in a made-up house of two projects: what it shows of each, whether they agree, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conventions.rules import ROOT
from tests.tools import demo, examples

EXAMPLE = """import sys
import numpy as np
options = dict(word.partition("=")[::2] for word in sys.argv[1:])
print("gpt2-nano (3.6M parameters) on a machine: an engine")
{body}
tokens, logits = np.array({tokens}), np.zeros((2, 5)) + {logit}
np.savez(open(options["--dump"], "wb"), prompt_ids=np.array([3, 4]), tokens=tokens, logits=logits)
"""
OPTIONS = "--prompt={prompt} --new={new_tokens} --dump={dump}"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def house(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    write(tmp_path / ".gitignore", ".tox/\n")
    for env in ("alpha", "beta", "gamma"):
        write(tmp_path / ".tox" / env / "bin" / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (tmp_path / ".tox" / env / "bin" / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", "true")  # tox, which has made them
    known = {f"{name}_gpt": examples.Example(OPTIONS) for name in ("alpha", "beta", "gamma")}
    monkeypatch.setattr(examples, "EXAMPLES", known)
    return tmp_path


def example(root, name, body="", tokens="[300, 301]", logit=0.0):
    write(root / f"{name}_gpt" / "example.py", EXAMPLE.format(body=body, tokens=tokens, logit=logit))


def shown(house, capfd):
    status = demo.main(house)
    out, err = capfd.readouterr()
    return status, out, err


def test_without_projects_there_is_nothing_to_demo(tmp_path, capfd):
    assert shown(tmp_path, capfd) == (0, "There are no projects in this checkout yet: nothing to demo.\n", "")


def test_two_that_agree(house, capfd):
    example(house, "alpha")
    example(house, "beta", logit=1e-6)
    status, out, err = shown(house, capfd)
    assert status == 0 and err == ""
    assert "\n== alpha_gpt on a machine: an engine\n    " in out
    assert out.endswith("\nThey agree: the same 2 tokens, and no logit further apart than 1.0e-06.\n")


def test_two_that_write_other_tokens(house, capfd):
    example(house, "alpha")
    example(house, "beta", tokens="[300, 302]")
    status, out, _ = shown(house, capfd)
    verdict = out.splitlines()[-3:]
    assert status == 1
    assert verdict[0].startswith("They DISAGREE: alpha_gpt and beta_gpt part at token 3, behind ")
    assert [line.partition(": ")[0] for line in verdict[1:]] == ["  alpha_gpt", "  beta_gpt"]
    assert verdict[1].partition(": ")[2] != verdict[2].partition(": ")[2]


def test_two_whose_texts_end_at_different_places(house, capfd):
    example(house, "alpha")
    example(house, "beta", tokens="[300]")
    status, out, _ = shown(house, capfd)
    assert status == 1 and "part at token 3" in out


@pytest.mark.parametrize("logit", ["0.01", "np.nan"])
def test_the_same_tokens_from_other_logits(house, capfd, logit):
    example(house, "alpha")
    example(house, "beta", logit=logit)
    status, out, _ = shown(house, capfd)
    assert status == 1 and "They DISAGREE: the tokens are the same, but their logits are up to" in out


def test_one_that_fails_does_not_stop_the_rest(house, capfd):
    example(house, "alpha", body="sys.exit('no memory')")
    example(house, "beta")
    write(house / "gamma_gpt" / "model.py", "")
    write(house / "delta_gpt" / "example.py", "")
    status, out, err = shown(house, capfd)
    assert status == 1 and err == "no memory\n"
    assert [line.rpartition(" in ")[0] for line in out.splitlines()[-4:]] == [
        "alpha_gpt: FAILED with exit status 1",
        "beta_gpt: done",
        "delta_gpt: FAILED, for tests/tools/examples.py does not say how to ask it,",
        "gamma_gpt: FAILED, for it has no example,",
    ]


def test_an_environment_that_cannot_be_made(house, capfd, monkeypatch):
    example(house, "alpha")
    monkeypatch.setattr(sys, "executable", "false")
    status, out, _ = shown(house, capfd)
    assert status == 1
    assert out.splitlines()[-1] == "alpha_gpt: FAILED to make its environment (tox run -e alpha) in 0 s"


def test_the_demo_asks_for_the_prompt_that_it_shows(house, capfd):
    example(house, "alpha", body="open(options['--dump'] + '.json', 'w').write(__import__('json').dumps(options))")
    wanted = {"prompt": demo.PROMPT, "new_tokens": demo.NEW_TOKENS, "model": demo.MODEL}
    python = house / ".tox" / "alpha" / "bin" / "python"
    answer = examples.ask(python, house, "alpha_gpt", house, **wanted)
    options = json.loads((house / "dump.npz.json").read_text(encoding="utf-8"))
    assert answer.status == 0 and options["--prompt"] == demo.PROMPT and options["--new"] == str(demo.NEW_TOKENS)
    assert demo.MODEL == ROOT / "checkpoints" / "gpt2-nano" and demo.MODEL.is_dir()
