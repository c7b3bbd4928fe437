"""The engine's graphs: transformers' logits at every step, saved without weights, reused only if nothing changed."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from neuron_nanogpt import compiler, engine, files, graphs, kernels, model
from shared.sampling import Sampler

pytestmark = pytest.mark.engine

STEP = Path("gpt2_step_neuron.pt")
TEXTS = [[7, 3, 9], [1], [5, 4, 3, 2, 1, 0]]


def load(folder, **settings):
    return engine.load(folder, settings.pop("dtype", "float32"), "cpu", **settings)


def steps(runner, rows, count, temperature=1):
    """Yields, `count` times, the rows and the logits of their next tokens."""
    rows, sampler = [row.copy() for row in rows], Sampler(temperature=temperature, seed=0)
    logits = runner.prefill(rows)
    for _ in range(count):
        yield rows, logits
        tokens = sampler(logits)
        rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]
        logits = runner.decode(tokens)


def greedy(runner, rows, count):
    *_, (rows, _) = steps(runner, rows, count + 1, temperature=0)
    return rows


def crops(reference, rows, width=16):
    """transformers' logits for each text's last `width` tokens: what nanoGPT's crop gives."""
    return np.stack([reference(torch.tensor([row[-width:]])).logits[0, -1].numpy() for row in rows])


@pytest.mark.parametrize(
    ("texts", "settings"),
    [
        (1, {}),
        (3, {}),
        (3, {"buckets": [4, 8]}),
        (3, {"window": True}),
        (1, {"window": True, "seq_len": 5}),
    ],
    ids=str,
)
def test_logits_are_those_of_transformers_before_and_past_the_context(texts, settings, tiny):
    runner, width = load(tiny[0], batch=texts, **settings), settings.get("seq_len", 16)
    for rows, logits in steps(runner, TEXTS[:texts], 30):
        np.testing.assert_allclose(logits, crops(tiny[1], rows, width), atol=1e-4, rtol=0)
    assert min(map(len, rows)) > 16


def test_logits_are_those_of_transformers_past_128_positions(long):
    runner = load(long[0])
    for rows, logits in steps(runner, [torch.randint(50, (126,)).tolist()], 18):
        np.testing.assert_allclose(logits, crops(long[1], rows, 140), atol=1e-4, rtol=0)
    assert [*runner.graphs] == ["step", "prefill_128", "prefill_140"]


def test_a_text_is_independent_of_its_batch_and_of_the_text_before(tiny):
    together, alone = load(tiny[0], batch=3), load(tiny[0])
    expected = greedy(together, TEXTS, 20)
    assert greedy(together, TEXTS, 20) == expected
    for text, row in zip(TEXTS, expected, strict=True):
        assert greedy(alone, [text], 20) == [row]


def test_the_smallest_bucket_that_holds_the_prompt_is_used(tiny):
    for length, bucket in (1, 4), (4, 4), (5, 8), (9, 16), (16, 16), (40, 16):
        runner = load(tiny[0], buckets=[8, 4])
        runner.prefill([[1] * length])
        assert [kind for kind in runner.graphs if kind != "step"] == [f"prefill_{bucket}"]


def test_default_buckets_are_powers_of_two_up_to_the_context():
    assert engine.all_buckets(None, 1024, 128) == [128, 256, 512, 1024]
    assert engine.all_buckets(None, 200, 128) == [128, 200]
    assert engine.all_buckets(None, 16, 16) == [16]


def test_on_the_cpu_a_short_prompt_is_not_padded_to_a_long_one(long):
    runner = load(long[0])
    runner.prefill([[1] * 5])
    assert "prefill_16" in runner.graphs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_files_hold_no_weights_and_an_empty_cache(dtype, tiny):
    greedy(load(tiny[0], dtype=dtype), [[1, 2]], 5)
    assert len(paths := [*Path().glob("*.pt")]) == 2
    for path in paths:
        graph = torch.jit.load(path)
        for name, tensor in graph.state_dict().items():
            assert not tensor.any(), name
            assert tensor.untyped_storage().nbytes() <= 4, name
        packed = [part.packed for part in graph.modules() if hasattr(part, "packed")]
        assert len(packed) == (0 if dtype == "float32" else 9)
        assert {torch.ops.quantized.linear_unpack_fp16(part)[0].shape for part in packed} <= {(1, 1)}


def test_all_graphs_share_the_weights_of_the_model(tiny):
    runner = load(tiny[0], buckets=[4, 16])
    for length in 2, 10:
        runner.prefill([[1] * length])
    assert len(runner.graphs) == 3
    for graph in runner.graphs.values():
        held = {name: tensor.data_ptr() for name, tensor in graph.state_dict().items()}
        for name, tensor in runner.gpt.state_dict().items():
            assert held[f"gpt.{name}"] == tensor.data_ptr()


# -- artifacts


def written(capsys):
    """The lines about graphs, by their first two words."""
    return [" ".join(line.split()[:2]) for line in capsys.readouterr().out.splitlines()]


def test_an_artifact_is_reused(tiny, capsys):
    expected = load(tiny[0]).prefill([[1, 2]])
    assert written(capsys) == [f"{STEP}: traced", "gpt2_prefill_16_neuron.pt: traced"]
    stamp = STEP.stat().st_mtime_ns
    np.testing.assert_array_equal(load(tiny[0]).prefill([[1, 2]]), expected)
    assert written(capsys) == [f"{STEP}: reused", "gpt2_prefill_16_neuron.pt: reused"]
    assert STEP.stat().st_mtime_ns == stamp


def test_the_sidecar_says_what_the_graph_was_traced_from(tiny):
    load(tiny[0], batch=2).build()
    assert not STEP.exists()
    load(tiny[0]).build()
    sidecar = json.loads(STEP.with_suffix(".json").read_text(encoding="utf-8"))
    assert sidecar["sha256"] == hashlib.sha256(STEP.read_bytes()).hexdigest()
    assert sidecar["inputs"] == [[[1, 1], "torch.int64"], [[1], "torch.int64"]] and sidecar["slots"] == 16
    assert sidecar["versions"] == {"torch": torch.__version__} and sidecar["device"] == "cpu"
    assert sidecar["graph"] == "Decode" and sidecar["dtype"] == "float32"


def change_n_head(folder):
    """Which changes the logits and no weight."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"n_head": 8}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "settings", "why"),
    [
        (change_n_head, {}, "config changed)"),
        (None, {"recompile": True}, "--recompile)"),
    ],
)
def test_an_artifact_of_something_else_is_traced_again_and_says_why(change, settings, why, tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny[0], tmp_path / "model")
    assert load(folder).step_graph(1)
    if change:
        change(folder)
    capsys.readouterr()
    assert load(folder, **settings).step_graph(1)
    line = capsys.readouterr().out
    assert line.startswith(f"{STEP}: traced in ") and f" s ({why}" in line
    assert load(folder, **settings | {"recompile": False}).step_graph(1)
    assert written(capsys) == [f"{STEP}: reused"]


def test_settings_have_files_of_their_own(tiny, capsys):
    """The documented name is that of the default."""
    others = {"batch": 2}, {"dtype": "bfloat16"}, {"dtype": "int8", "batch": 2}, {"window": True}
    for settings in {}, *others, {}, *others:
        load(tiny[0], **settings).build()
    files = ["step_neuron", "prefill_16_neuron", "step_b2_neuron", "prefill_16_b2_neuron", "step_bfloat16_neuron"]
    files += ["prefill_16_bfloat16_neuron", "step_b2_int8_neuron", "prefill_16_b2_int8_neuron", "window_16_neuron"]
    lines = written(capsys)
    assert lines == [f"gpt2_{file}.pt: {verb}" for verb in ("traced", "reused") for file in files]


def test_an_artifact_is_reused_for_other_weights_of_the_same_shapes(tiny, tmp_path, random_checkpoint, capsys):
    """The files hold none: they come from the checkpoint."""
    load(tiny[0]).prefill([[1, 2]])
    reference = random_checkpoint(tmp_path / "model", seed=1)
    capsys.readouterr()
    logits = load(tmp_path / "model").prefill([[1, 2]])
    assert written(capsys) == [f"{STEP}: reused", "gpt2_prefill_16_neuron.pt: reused"]
    np.testing.assert_allclose(logits, crops(reference, [[1, 2]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("module", [model, kernels, graphs], ids=lambda module: module.__name__)
def test_an_artifact_of_other_code_is_traced_again(module, tiny, tmp_path, monkeypatch, capsys):
    assert load(tiny[0]).step_graph(1)
    changed = tmp_path / "changed.py"
    changed.write_bytes(Path(module.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(module, "__file__", str(changed))
    assert load(tiny[0]).step_graph(1)
    assert capsys.readouterr().out.endswith("s (code changed)\n")


def truncate():
    STEP.write_bytes(STEP.read_bytes()[:-100])


def replace():
    torch.jit.save(torch.jit.script(torch.nn.Identity()), STEP)


def remove_sidecar():
    STEP.with_suffix(".json").unlink()


def damage_sidecar():
    STEP.with_suffix(".json").write_text("[" * 100_000, encoding="utf-8")


@pytest.mark.parametrize("harm", [truncate, replace, remove_sidecar, damage_sidecar])
def test_a_file_whose_sha256_does_not_match_its_json_is_not_loaded(harm, tiny, monkeypatch, capsys):
    assert load(tiny[0]).step_graph(1)
    harm()
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", lambda *_: pytest.fail("it was loaded"))
        patch.setattr(compiler.time, "sleep", lambda seconds: None)
        with pytest.raises(compiler.ArtifactError, match="delete it or use --recompile") as caught:
            assert load(tiny[0]).step_graph(1)
    assert "\n" not in str(caught.value) and str(STEP) in str(caught.value)
    capsys.readouterr()
    for settings, verb in ({"recompile": True}, "traced"), ({}, "reused"):
        assert load(tiny[0], **settings).step_graph(1)
        assert written(capsys) == [f"{STEP}: {verb}"]


def test_a_run_waits_while_another_replaces_the_files(tiny, monkeypatch, capsys):
    """The graph is there already, and its description comes at the end of the third pause."""
    assert load(tiny[0]).step_graph(1)
    description, pauses = STEP.with_suffix(".json").read_bytes(), []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            STEP.with_suffix(".json").write_bytes(description)

    STEP.with_suffix(".json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(compiler.time, "sleep", sleep)
    capsys.readouterr()
    assert load(tiny[0]).step_graph(1)
    assert written(capsys) == [f"{STEP}: reused"] and len(pauses) == 3


def test_an_interrupted_write_leaves_no_file(tiny, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        assert load(tiny[0]).step_graph(1)
    assert not list(Path().iterdir())
