"""bench.py: what the harness asks of it, and its own output."""

import json

import numpy as np
import pytest

from jax_nanogpt import bench
from tests.jax import reference

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder, transformers' model)"""
    folder = tmp_path_factory.mktemp("model")
    return folder, reference.random_checkpoint(folder, positions=32)


def test_score_and_greedy_are_transformers(checkpoint):
    folder, model = checkpoint
    engine = bench.load(folder, "float32")
    ids = np.random.default_rng(0).integers(engine.config.vocab_size, size=engine.config.block_size).tolist()
    np.testing.assert_allclose(bench.score(engine, ids), reference.logits_of(model, [ids])[0], atol=1e-4)
    continued = bench.greedy(engine, ids[:5], 6)
    rows = reference.logits_of(model, [ids[:5] + continued])[0]
    assert continued == rows[4:-1].argmax(axis=1).tolist() and len(set(continued)) > 1


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_a_step_reads_the_weights_and_one_position_embedding(dtype, width, checkpoint):
    engine = bench.load(checkpoint[0], dtype)
    C, V = engine.config.n_embd, engine.config.vocab_size
    matrices, vectors = 12 * C**2 + V * C, 16 * C  # one layer: 9 C of biases, three layer norms, a row of positions
    scales = 4 * (9 * C + V) if dtype == "int8" else 0
    assert bench.step_bytes(engine) == width * matrices + max(width, 4 * (width == 1)) * vectors + scales


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.01), ("int8", 0.03)])
def test_narrow_weights_change_the_scores_little(dtype, limit, checkpoint):
    exact, ids = bench.score(bench.load(checkpoint[0], "float32"), range(20)), range(20)
    apart = np.abs(bench.score(bench.load(checkpoint[0], dtype), ids) - exact).max() / np.abs(exact).max()
    assert 1e-5 < apart < limit


def test_the_last_line_of_output_is_one_json_document(checkpoint, monkeypatch, capsys):
    """By a clock on which the calls of a work take 9, 0.5, 0.25 and 1 s; the first is left out."""
    times, greedy = iter(2 * [9, 0.5, 0.25, 1]), []
    monkeypatch.setattr(bench, "seconds", lambda call, engine, ids, count: greedy.append((ids, count)) or next(times))
    bench.main([f"--model={checkpoint[0]}", "--new_tokens=4", "--rounds=3", "--dtype=bfloat16"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["project"], found["dtype"]) == ("jax_nanogpt", "bfloat16") and found["first_token_s"] > 0
    assert found["engine"].startswith("cpu: jax ") and found["peak_rss_mb"] > 100
    assert found["decode"] == {"prompt_tokens": 16, "new_tokens": 4, "tokens_per_s": 4 / 0.5}
    assert found["prefill"] == {"prompt_tokens": 16, "new_tokens": 1, "tokens_per_s": 16 / 0.5}
    assert [(len(ids), count) for ids, count in greedy] == 4 * [(16, 4)] + 4 * [(16, 1)]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--new-tokens=1", "--new-tokens must be from 2 to 16, got 1"),
        ("--new-tokens=17", "--new-tokens must be from 2 to 16, got 17"),
        ("--rounds=0", "--rounds must be 1 or more, got 0"),
        ("--device=abacus", "--device must be one of auto, cpu, gpu, tpu, got 'abacus'"),
        ("--dtype=int3", "--dtype"),
        ("--model=nowhere", "'nowhere'"),
        ("--device=--", "--"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flag, message, checkpoint, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main([f"--model={checkpoint[0]}", flag])
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and message in errors and errors.count("\n") == 1
