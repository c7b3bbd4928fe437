"""make demo, on projects made here: what it prints of each, whether they agree, and its exit status."""

import json
import sys

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


@pytest.fixture
def example(add_file, monkeypatch):
    def example(name, body="", tokens="[300, 301]", logit=0.0):
        add_file(f"{name}_gpt/example.py", EXAMPLE.format(body=body, tokens=tokens, logit=logit))

    options = examples.Example("--prompt={prompt} --new={new_tokens} --dump={dump}")
    monkeypatch.setattr(examples, "EXAMPLES", {f"{name}_gpt": options for name in ("alpha", "beta", "gamma")})
    example("alpha")
    return example


def test_two_that_agree(checkout, example, capfd):
    example("beta", logit=1e-6)
    status = demo.main(checkout)
    out, err = capfd.readouterr()
    assert (status, err) == (0, "")
    assert "\n== alpha_gpt on a machine: an engine\n    " in out
    assert out.endswith("\nThey agree: the same 2 tokens, and no logit further apart than 1.0e-06.\n")


@pytest.mark.parametrize(
    ("different", "says"),
    [
        ({"tokens": "[300, 302]"}, "alpha_gpt and beta_gpt differ from token 3, after "),
        ({"tokens": "[300]"}, "alpha_gpt and beta_gpt differ from token 3, after "),
        ({"logit": "0.01"}, "the tokens are the same, but their logits differ by up to 1.0e-02"),
        ({"logit": "np.nan"}, "the tokens are the same, but their logits differ by up to nan"),
    ],
)
def test_two_that_disagree(checkout, example, capfd, different, says):
    example("beta", **different)
    assert demo.main(checkout) == 1
    assert f"\nThey DISAGREE: {says}" in capfd.readouterr().out


def test_one_that_fails_does_not_stop_the_rest(checkout, example, capfd):
    example("alpha", body="sys.exit('no memory')")
    example("beta")
    example("delta")
    assert demo.main(checkout) == 1
    out, err = capfd.readouterr()
    assert err == "no memory\n"
    assert "\nalpha_gpt: FAILED with exit status 1 in " in out and "\nbeta_gpt: done in " in out
    assert "\ndelta_gpt: FAILED" in out


def test_an_environment_that_cannot_be_installed(checkout, example, capfd, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    assert demo.main(checkout) == 1
    assert "alpha_gpt: FAILED to make its environment (tox run -e alpha)" in capfd.readouterr().out


def test_the_example_gets_the_prompt_that_the_demo_shows(checkout, example):
    example("alpha", body="open(options['--dump'] + '.json', 'w').write(__import__('json').dumps(options))")
    wanted = {"prompt": demo.PROMPT, "new_tokens": demo.NEW_TOKENS, "model": demo.MODEL}
    answer = examples.ask(checkout / ".tox" / "alpha" / "bin" / "python", checkout, "alpha_gpt", checkout, **wanted)
    options = json.loads((checkout / "dump.npz.json").read_text(encoding="utf-8"))
    assert answer.status == 0 and options["--prompt"] == demo.PROMPT and options["--new"] == str(demo.NEW_TOKENS)
    assert demo.MODEL == ROOT / "checkpoints" / "gpt2-nano" and demo.MODEL.is_dir()
