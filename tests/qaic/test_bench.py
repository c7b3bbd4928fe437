"""bench.py: its engine generates and scores what transformers does; no test here depends on a real time."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from qaic_gpt2 import backend, bench

DTYPES = {
    "float32": 4,
    "float16": 2,
    "int8": 1 + 4 / 128,
    "int4": 1 / 2 + 4 / 32,
}  # bytes a weight, with the scale of its block


@pytest.fixture(scope="module")
def small(make_checkpoint):
    return make_checkpoint(n_layer=2, n_positions=48, n_embd=128, bos_token_id=0, eos_token_id=0)


@pytest.fixture(scope="module")
def engine(small):
    return bench.load(small, "float32")


@pytest.fixture(scope="module")
def logits(small):
    """transformers', after each of 47 ids."""
    ids = np.random.default_rng(0).integers(97, size=47).tolist()
    with torch.no_grad():
        return ids, transformers.GPT2LMHeadModel.from_pretrained(small).eval()(torch.tensor([ids])).logits[0].numpy()


def test_scores_are_transformers_logits(engine, logits):
    ids, expected = logits
    np.testing.assert_allclose(bench.score(engine, ids), expected, atol=1e-4)


def test_greedy_is_the_largest_logit_after_each_token(engine):
    ids = [5, 3, 9]
    tokens = bench.greedy(engine, ids, 40)
    scores = bench.score(engine, ids + tokens[:-1])[len(ids) - 1 :]
    assert tokens == scores.argmax(axis=1).tolist() and len(set(tokens)) > 1


@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_a_step_reads_each_weight_once_and_one_position(small, dtype, logits):
    ids, expected = logits
    engine = bench.load(small, dtype)
    parameters = dict(transformers.GPT2LMHeadModel.from_pretrained(small).transformer.named_parameters())
    weights = sum(parameter.numel() for parameter in parameters.values()) - 48 * 128  # the positions
    size = 4 if engine.session.record["casts_float16"] else DTYPES[dtype]
    assert bench.step_bytes(engine) == pytest.approx(size * weights, rel=0.1)  # vectors stay float32
    limit = 0.5 if dtype == "int4" else 0.05
    assert np.abs(bench.score(engine, ids) - expected).max() < limit * np.abs(expected).max()


def test_the_last_line_is_one_json_document(small, capsys):
    bench.main([f"--model={small}", "--new-tokens=8", "--device=cpu", "--rounds=1"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["project"] == "qaic_gpt2" and document["dtype"] == "float32"
    assert (document["decode"]["prompt_tokens"], document["decode"]["new_tokens"]) == (16, 8)
    assert (document["prefill"]["prompt_tokens"], document["prefill"]["new_tokens"]) == (24, 1)
    assert document["engine"].startswith("onnxruntime ") and document["peak_rss_mb"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--new-tokens=1"], "--new-tokens must be from 2 to 240, got 1"),
        (["--new-tokens=241"], "--new-tokens must be from 2 to 240, got 241"),
        (["--rounds=0"], "--rounds must be 1 or more, got 0"),
        (["--device=tpu"], "--device must be one of auto, cpu, qaic, got 'tpu'"),
        (["--dtype=int3"], "argument --dtype: invalid choice: 'int3'"),
        (["--model=--"], "-- must not be the value of a flag"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(["--model=gpt2-nano", *flags])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


def test_a_card_is_not_measured(small, monkeypatch):
    monkeypatch.setattr(backend, "missing", lambda compile_only: None)
    with pytest.raises(ValueError, match="--device must be cpu here, got auto"):
        bench.load(small, "float32")


def test_a_damaged_checkpoint_is_one_line(small, tmp_path, capfd):
    folder = shutil.copytree(small, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as caught:
        bench.main([f"--model={folder}", "--new-tokens=8"])
    error = capfd.readouterr().err
    assert caught.value.code == 2 and str(folder) in error and error.count("\n") == 1
