"""bench.py: what `make bench` asks of it on a toy model, and the figures that follow from given times."""

import json
import types

import numpy as np
import pytest
import torch

from neuron_nanogpt import bench, engine

pytestmark = pytest.mark.engine

IDS = [7, 3, 9, 1]


def test_greedy_is_transformers_greedy(tiny):
    loaded, ids = bench.load(tiny[0], "float32", "cpu"), torch.tensor([IDS])
    expected = tiny[1].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert bench.greedy(loaded, IDS, 9) == expected[0, len(IDS) :].tolist()


def test_the_score_has_the_logits_after_each_token_by_the_cache(tiny, monkeypatch):
    loaded, ids, steps = bench.load(tiny[0], "float32", "cpu"), np.arange(16).tolist(), []
    decode = engine.Cached.decode
    monkeypatch.setattr(engine.Cached, "decode", lambda *args: steps.append(args) or decode(*args))
    expected = tiny[1](torch.tensor([ids])).logits[0]
    np.testing.assert_allclose(bench.score(loaded, ids), expected, atol=1e-4, rtol=0)
    assert len(steps) == len(ids) - 1


@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_a_step_reads_every_weight_once_and_one_position(dtype, tiny):
    weights = {name: p for name, p in tiny[1].named_parameters() if "wpe" not in name}
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[bench.DTYPES[dtype]]
    assert bench.step_bytes(bench.load(tiny[0], dtype, "cpu")) == size * sum(p.numel() for p in weights.values())


def test_the_figures_follow_from_the_times(long, run, monkeypatch):
    now, count = [0.0], 4

    def take(engine, prompt, new):
        now[0] += {1: 0.5, 16: 1.0}.get(len(prompt), 2.0)

    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(bench, "greedy", take)
    status, out, err = run(f"--model={long[0]}", f"--new-tokens={count}", "--device=cpu", script=bench)
    assert (status, err) == (0, "")
    document = json.loads(out.splitlines()[-1])
    assert document["project"] == "neuron_nanogpt" and document["dtype"] == "float32"
    assert document["first_token_s"] == 0.5 and document["engine"].startswith("cpu: TorchScript")
    assert document["decode"] == {"prompt_tokens": 16, "new_tokens": count, "tokens_per_s": count / 1.0}
    assert document["prefill"] == {"prompt_tokens": 70, "new_tokens": 1, "tokens_per_s": 70 / 2.0}
