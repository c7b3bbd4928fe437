"""eval.py as a command: whose loss it prints, and what it refuses."""

import math
import re
import shutil

import numpy as np
import pytest

from jax_nanogpt import eval, weight_loader
from jax_nanogpt.checkpoint import Checkpoints
from shared.tokenizer import load_tokenizer

LINE = r"([\d,]+) tokens, ([\d,]+) bytes: loss (\d+\.\d+), perplexity (\d+\.\d+), (\d+\.\d+) bits per byte"


@pytest.fixture
def figures(capsys):
    """eval.py in this process: figures(flags...) -> tokens, bytes, loss, perplexity and bits per byte."""

    def call(*flags):
        eval.main([*map(str, flags), "--device=cpu"])
        call.first, line = capsys.readouterr().out.splitlines()[-2:]
        return [float(number.replace(",", "")) for number in re.fullmatch(LINE, line).groups()]

    return call


@pytest.fixture
def text_file(dataset, tmp_path):
    """The first 17 characters of val.bin: one context of 16 tokens, and the token after it."""
    text = load_tokenizer(dataset).decode(np.fromfile(dataset / "val.bin", np.uint16)[:17].tolist())
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return tmp_path / "text.txt"


def test_the_loss_of_one_context_is_that_of_train_pys_evaluation(run, finished, dataset, tmp_path, figures, text_file):
    shutil.copytree(dataset, tmp_path / "short")
    np.fromfile(dataset / "val.bin", np.uint16)[:17].tofile(tmp_path / "short" / "val.bin")
    evaluated = run(finished, "--init_from=resume", "--eval_only", f"--dataset={tmp_path / 'short'}")
    tokens, size, loss, perplexity, bits = figures(f"--out_dir={finished}", f"--input={text_file}")
    assert figures.first.startswith(f"{finished} at iteration 6 (0.0M parameters) on cpu: jax ")
    assert (tokens, size) == (16, 17) and f"val loss {loss:.4f}" in evaluated
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert bits == pytest.approx(loss * tokens / math.log(2) / size, abs=1e-3)


def test_of_an_out_dir_the_best_checkpoint_is_evaluated_also_if_it_is_not_the_last(
    finished, tmp_path, figures, text_file
):
    shutil.copytree(finished, tmp_path / "out")
    checkpoints = Checkpoints.resume(tmp_path / "out")
    best, last = checkpoints.best(), checkpoints.last() + 1
    _, params = checkpoints.restore_model(best)
    checkpoints.save(last, params, {"count": np.zeros(1)}, checkpoints.about(best), checkpoints.val_loss(best) + 1)
    figures(f"--out_dir={tmp_path / 'out'}", f"--input={text_file}")
    assert figures.first.startswith(f"{tmp_path / 'out'} at iteration {best} ")


def test_an_exported_model_has_the_loss_of_its_out_dir(finished, tmp_path, figures, text_file):
    of_out_dir = figures(f"--out-dir={finished}", f"--input={text_file}")
    weight_loader.main([f"--out_dir={finished}", f"--to={tmp_path / 'model'}"])
    assert figures(f"--model={tmp_path / 'model'}", f"--input={text_file}", "--dtype=float32") == of_out_dir


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=gpt2-nano", "--out_dir=OUT"], "--model must not be given beside --out_dir, got gpt2-nano"),
        (["--out_dir=nowhere"], "nowhere"),
        (["--out_dir=OUT", "--input=nowhere"], "--input must be a file of UTF-8 text, got 'nowhere'"),
        (["--out_dir=OUT", "--input=TMP/latin"], "/latin': 'utf-8' codec can't decode byte"),
        (["--out_dir=OUT", "--input=TMP/empty"], "--input must hold two tokens or more, got 0 in"),
        (["--out_dir=OUT", "--input=TMP/greek"], "'λ' is not one of the"),
        (["--out_dir=OUT", "--dtype=int8"], "--dtype"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, finished, tmp_path, capsys):
    for name, content in ("latin", b"\xe4"), ("empty", b""), ("greek", "λ".encode()):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        eval.main([flag.replace("OUT", str(finished)).replace("TMP", str(tmp_path)) for flag in flags])
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert message in printed.err and printed.err.count("\n") == 1
