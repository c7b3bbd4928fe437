"""Graphs: the same logits as the model, saved without weights, used again only where nothing changed."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from neuron_nanogpt import compiler, kernels, model, run_model, weight_loader
from neuron_nanogpt.run_model import Cached, NeuronStep, Window, choose_buckets, generate, padded
from shared.sampling import Sampler

pytestmark = pytest.mark.engine

STEP = Path("gpt2_step_neuron.pt")
FACTS = {"model": "tiny", "weights": "a hash", "dtype": "float32"}


def make(gpt, batch=1, buckets=None, window=None, recompile=False, facts=FACTS):
    engine, told = compiler.CPU("no Neuron"), []

    def build(module, inputs, name, more, aliases=None):
        return compiler.build(engine, module, inputs, Path(name), facts | more, aliases, recompile, told.append)

    gpt = gpt if gpt.lm_head.weight.is_mkldnn else engine.prepare(gpt)
    buckets = choose_buckets(buckets, gpt.config.block_size)
    runner = Window(build, gpt, batch, window) if window else Cached(build, engine, gpt, batch, buckets)
    return runner, told


def crops(reference, rows, width=16):
    """transformers' logits for each text's last `width` tokens: what nanoGPT's crop gives."""
    return np.stack([reference(torch.tensor([row[-width:]])).logits[0, -1].numpy() for row in rows])


def greedy(runner, rows, count):
    rows = [row.copy() for row in rows]
    for _ in generate(runner, rows, count, Sampler(temperature=0)):
        pass
    return rows


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_are_those_of_transformers_across_the_edge_of_the_context(batch, gpt, tiny):
    runner, _ = make(gpt, batch)
    rows = [[7, 3, 9], [1], [5, 4, 3, 2, 1, 0]][:batch]
    for _, logits in generate(runner, rows, 30, Sampler(temperature=1, seed=0)):
        np.testing.assert_allclose(logits, crops(tiny[1], [row[:-1] for row in rows]), atol=1e-4, rtol=0)
    assert min(map(len, rows)) > 16


def test_window_and_cache_agree_with_transformers_for_200_tokens(gpt, tiny):
    text = [7, 3, 9]
    expected = text.copy()
    for _ in range(200):
        expected.append(int(crops(tiny[1], [expected])[0].argmax()))
    assert greedy(make(gpt)[0], [text], 200) == [expected]
    assert greedy(make(gpt, window=16, recompile=True)[0], [text], 200) == [expected]


def test_logits_are_those_of_transformers_past_128_positions(long):
    """Past the first bucket, and past the last."""
    runner, rows = make(weight_loader.load(long[0]))[0], [torch.randint(50, (126,)).tolist()]
    logits = np.concatenate([step for _, step in generate(runner, rows, 18, Sampler(temperature=1, seed=0))])
    expected = long[1](torch.tensor([rows[0][:140]])).logits[0, 125:140].numpy()
    np.testing.assert_allclose(logits[:15], expected, atol=1e-4, rtol=0)
    for i, step in enumerate(logits[15:], 141):
        np.testing.assert_allclose(step[None], crops(long[1], [rows[0][:i]], 140), atol=1e-4, rtol=0)
    assert [*runner.prefills] == [128, 140]


def test_a_short_window_is_the_crop_to_it(gpt, tiny):
    runner, _ = make(gpt, window=5)
    rows = [[7, 3]]
    for _, logits in generate(runner, rows, 12, Sampler(temperature=1, seed=0)):
        np.testing.assert_allclose(logits, crops(tiny[1], [rows[0][:-1]], 5), atol=1e-4, rtol=0)


def test_a_row_is_the_same_alone_and_beside_others(gpt):
    texts = [[7, 3, 9], [1, 2, 3, 4, 5, 6, 7], [1]]
    together = greedy(make(gpt, 3)[0], texts, 20)
    for text, made in zip(texts, together, strict=True):
        assert greedy(make(gpt, recompile=True)[0], [text], 20) == [made]


def test_a_new_text_owes_nothing_to_the_one_before(gpt):
    runner, _ = make(gpt)
    alone = greedy(make(gpt)[0], [[1, 2]], 8)
    greedy(runner, [[9, 8, 7, 6, 5]], 9)
    assert greedy(runner, [[1, 2]], 8) == alone
    assert greedy(runner, [[1, 2]], 8) == alone


def test_the_smallest_bucket_that_holds_the_prompt_is_taken(gpt):
    for length, bucket in (1, 4), (4, 4), (5, 8), (9, 16), (16, 16), (40, 16):
        runner, told = make(gpt, buckets="4,8,16", recompile=True)
        runner.logits([[1] * length])
        assert [line.split(":")[0] for line in told] == [str(STEP), f"gpt2_prefill_{bucket}_neuron.pt"]


def test_default_buckets_are_powers_of_two_up_to_the_context():
    assert choose_buckets(None, 1024) == [128, 256, 512, 1024]
    assert choose_buckets(None, 200) == [128, 200]
    assert choose_buckets(None, 16) == [16]


def test_files_hold_no_weights_and_an_empty_cache(gpt):
    runner, _ = make(gpt)
    greedy(runner, [[1, 2]], 5)
    make(gpt)[0].logits([[1, 2]])
    for path in STEP, Path("gpt2_prefill_16_neuron.pt"):
        for name, tensor in torch.jit.load(path).state_dict().items():
            assert not tensor.any(), name
            assert tensor.untyped_storage().nbytes() <= 4, name


def test_all_graphs_share_the_weights_of_the_model(gpt):
    runner, _ = make(gpt, buckets="4,16")
    runner.logits([[1, 2]])
    runner.logits([[1] * 10])
    expected = gpt.wpe.weight.data_ptr()
    for graph in runner.decode, *runner.prefills.values():
        held = {v.data_ptr() for v in graph.code_with_constants[1].const_mapping.values() if not v.is_mkldnn}
        assert expected in held
        assert not any(v.is_mkldnn for v in graph.code_with_constants[1].const_mapping.values())


def test_an_artifact_is_used_again(gpt):
    first = make(gpt)
    expected = first[0].logits([[1, 2]])
    stamp = STEP.stat().st_mtime_ns
    again = make(gpt)
    np.testing.assert_array_equal(again[0].logits([[1, 2]]), expected)
    assert [line.split()[1] for line in first[1]] == ["traced", "traced"]
    assert [line.split()[1] for line in again[1]] == ["reused", "reused"]
    assert STEP.stat().st_mtime_ns == stamp


def test_the_sidecar_says_what_the_graph_was_made_from(gpt):
    make(gpt, batch=2)
    sidecar = json.loads(STEP.with_suffix(".json").read_text(encoding="utf-8"))
    assert sidecar["sha256"] == hashlib.sha256(STEP.read_bytes()).hexdigest()
    assert sidecar["inputs"] == [[[2, 1], "torch.int64"], [[2], "torch.int64"]]
    assert sidecar["versions"] == {"torch": torch.__version__} and sidecar["device"] == "cpu"
    assert sidecar["graph"] == "decode" and FACTS.items() <= sidecar.items()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"batch": 2}, "inputs was [[[1, 1]"),
        ({"window": 8}, "graph was decode and is window"),
        ({"facts": FACTS | {"weights": "another"}}, "the weights changed"),
        ({"facts": FACTS | {"dtype": "bfloat16"}}, "dtype was float32 and is bfloat16"),
        ({"recompile": True}, "it is asked for"),
    ],
)
def test_an_artifact_of_something_else_is_traced_again_and_says_why(change, why, gpt):
    make(gpt)
    _, told = make(gpt, **change)
    assert told[0].startswith(f"{STEP}: traced in ") and f"s, for {why}" in told[0]
    assert "reused" in make(gpt, **{k: v for k, v in change.items() if k != "recompile"})[1][0]


CHANGES = [
    (model, 'approximate="tanh"', 'approximate="none"'),
    (kernels, "ROWS = 16", "ROWS = 32"),
    (run_model, "        return logits, *cache", "        return 2 * logits, *cache"),
    (run_model, "        return logits, *made", "        return 2 * logits, *made"),
    (run_model, "input_ids, length)[0]", "input_ids, length - 1)[0]"),  # of NeuronStep, Prefill's base
]


@pytest.mark.parametrize(
    ("module", "right", "wrong"), CHANGES, ids=["model", "kernels", "Decode", "Prefill", "NeuronStep"]
)
def test_a_change_of_the_code_that_makes_a_graph_is_noticed(module, right, wrong, gpt, tmp_path, monkeypatch):
    make(gpt)[0].logits([[1, 2]])
    changed = tmp_path / "changed.py"
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert text.count(right) == 1
    changed.write_text(text.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(module, "__file__", str(changed))
    runner, told = make(gpt)
    runner.logits([[1, 2]])
    assert any(line.endswith("for the code changed") for line in told)


def truncate():
    STEP.write_bytes(STEP.read_bytes()[:-100])


def replace():
    torch.jit.save(torch.jit.script(torch.nn.Identity()), STEP)


def orphan():
    STEP.with_suffix(".json").unlink()


def damage():
    STEP.with_suffix(".json").write_text("[", encoding="utf-8")


def damage_deeply():
    STEP.with_suffix(".json").write_text("[" * 100_000, encoding="utf-8")


@pytest.mark.parametrize("harm", [truncate, replace, orphan, damage, damage_deeply])
def test_a_file_that_nobody_vouches_for_is_not_loaded(harm, gpt, monkeypatch):
    make(gpt)
    harm()
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(compiler.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="delete it, or say --recompile") as caught:
        make(gpt)
    assert "\n" not in str(caught.value) and str(STEP) in str(caught.value)
    monkeypatch.undo()


def test_a_run_waits_for_another_that_puts_its_files_in_place(gpt, monkeypatch):
    """The graph is there already, and its description comes at the end of the third pause."""
    make(gpt)
    described, pauses = STEP.with_suffix(".json").read_bytes(), []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            STEP.with_suffix(".json").write_bytes(described)

    STEP.with_suffix(".json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(compiler.time, "sleep", sleep)
    assert "reused" in make(gpt)[1][0]
    assert len(pauses) == 3


def test_recompile_replaces_a_foreign_file(gpt, tmp_path, monkeypatch):
    make(gpt)
    replace()
    assert "traced" in make(gpt, recompile=True)[1][0]
    assert "reused" in make(gpt)[1][0]


def test_what_fails_leaves_no_file(gpt, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(gpt)
    assert not list(Path().iterdir())


def test_the_window_graph_takes_the_length_as_data(gpt, tiny):
    """One trace, with a text of one token in it, serves texts of every length."""
    graph = torch.jit.freeze(torch.jit.trace(NeuronStep(kernels.prepare(gpt)).eval(), padded([[0]], 16)))
    for length in range(1, 17):
        row = torch.randint(50, (length,)).tolist()
        np.testing.assert_allclose(graph(*padded([row], 16)), crops(tiny[1], [row]), atol=1e-4, rtol=0)
