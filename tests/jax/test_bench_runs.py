"""bench.py and bench_gpu.py beside torch and transformers, on toys: what is to be timed takes half a second, unrun."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jax_nanogpt import bench, bench_gpu, weight_loader
from jax_nanogpt.model import GPTConfig, count_params, init_params
from jax_nanogpt.train import Config

CONFIG = GPTConfig(block_size=32, vocab_size=50, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(autouse=True)
def half_a_second(monkeypatch):
    for module in bench, bench_gpu:
        monkeypatch.setattr(module, "seconds", lambda call: 0.5)


def test_bench_prints_one_json_document_last(monkeypatch, capsys, tmp_path):
    pytest.importorskip("torch")
    weight_loader.save(tmp_path, CONFIG, init_params(CONFIG, jax.random.key(0)))
    settings = Config(iters_per_call=2, batch_size=3, block_size=8)
    exact = GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=2, n_embd=16, bias=False, dropout=0.1)
    toy = settings, exact, np.zeros((2, 1, 3, 9), np.int32)
    monkeypatch.setattr(bench, "shakespeare", lambda: toy)
    bench.main([f"--model={tmp_path}", "--new-tokens=4"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["project"] == "jax_nanogpt"
    rows = {row["work"]: row for row in document["results"]}
    rates = {
        "train": 2 * 3 * 8,
        "train_bfloat16": 2 * 3 * 8,
        "sample": 7,
        "sample_batch10": 10 * 7,
        "sample_past_edge": 64,
        "prefill": 16,
        "decode": 4,
    }
    assert {work: row["tokens_per_s"] for work, row in rows.items()} == {work: n / 0.5 for work, n in rates.items()}
    assert {work: row["ratio"] for work, row in rows.items()} == dict.fromkeys(rates, 1) | {"sample_batch10": 10}
    assert rows["train"]["ms_per_iteration"] == 250 and rows["train"]["ratio_autocast"] == 1
    read = bench.step_bytes(CONFIG, init_params(CONFIG, jax.random.key(0)), 1, 16 + 4 / 2)
    assert rows["decode"]["mbu"] == pytest.approx(read * 4 / 0.5 / (2**28 / 0.5), abs=5e-4)
    assert rows["prefill"]["ttft_ms"] == rows["decode"]["ttft_ms"] == 500


def test_the_measuring_script_runs_with_its_peer(capsys):
    pytest.importorskip("torch")
    flags = ["--shape=tiny", "--batch=2", "--block_size=16", "--iters=3", "--new-tokens=4", "--peak=1e-4"]
    bench_gpu.main([*flags, "--device=cpu"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    rates = {"train": 3 * 2 * 16, "sample": 4, "sample_batch64": 64 * 4}
    assert {row["work"]: row["tokens_per_s"] for row in results} == {work: n / 0.5 for work, n in rates.items()}
    assert all(row["ratio"] == 1 and row["peer"]["name"].startswith("transformers") for row in results)
    config = GPTConfig(block_size=16, vocab_size=512, n_layer=2, n_head=2, n_embd=64)
    params = init_params(config, jax.random.key(0))
    assert results[0]["parameters"] == count_params(params)
    assert results[0]["mfu"] == bench_gpu.arithmetic(config, params, 3 * 2 * 16 / 0.5, 1e-4)["mfu"] > 0


def test_a_step_reads_each_weight_once_and_each_texts_keys_and_values():
    """By transformers' arrays: all but the position embeddings, and a cache of as many positions."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    c = replace(CONFIG, n_layer=2)
    shape = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
    config = transformers.GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, **shape)
    model = transformers.GPT2LMHeadModel(config)
    weights = sum(p.nbytes for p in model.parameters()) - model.transformer.wpe.weight.nbytes
    for batch, positions in (1, 1), (3, 7):
        cache = model(torch.zeros((batch, positions), dtype=torch.long)).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert bench.step_bytes(c, init_params(c, jax.random.key(0)), batch, positions) == weights + held
