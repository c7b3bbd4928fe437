"""The steps that tests/tools/training.py measures compute what PyTorch and transformers do, on toys. Run in jax's
environment, or where NANOGPT and LLM_C name clones."""

import os

import pytest

from tests.tools import training
from tests.tools.peers import training_task

SHAPE = {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 16}
SETTINGS = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "grad_clip": 0.5}
COUNT = 4

pytestmark = pytest.mark.engine


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def folder(request, tmp_path):
    training_task.write(tmp_path / "task", SHAPE | {"bias": request.param}, SETTINGS, (COUNT, 2, 9))
    return tmp_path / "task"


def reference(folder):
    """The losses by transformers and PyTorch's AdamW, which decays matrices and embeddings alone."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    task = training_task.read(folder)
    shape = {key: SHAPE[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=SHAPE["block_size"], **shape, **drop))
    weights = dict(model.transformer.named_parameters())
    for name, parameter in weights.items():
        parameter.data = torch.from_numpy(task.weights[name]) if name in task.weights else torch.zeros_like(parameter)
        parameter.requires_grad = name in task.weights
    used = [parameter for parameter in weights.values() if parameter.requires_grad]
    groups = [{"params": [p for p in used if p.ndim == 2]}, {"params": [p for p in used if p.ndim == 1]}]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = SETTINGS["weight_decay"], 0.0
    optimizer = torch.optim.AdamW(groups, SETTINGS["learning_rate"], (SETTINGS["beta1"], SETTINGS["beta2"]))
    losses = []
    for batch in torch.from_numpy(task.batches).long():
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(used, SETTINGS["grad_clip"])
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_our_iterations_are_those_of_pytorch(folder):
    pytest.importorskip("jax")
    from tests.tools.peers import jax_training

    expected = reference(folder)
    assert expected[-1] < expected[0] - 0.1
    ours = jax_training.load(folder, "float32")
    assert jax_training.train(ours, COUNT, 0.0) == pytest.approx(expected, abs=1e-5)
    again = jax_training.train(ours, 2, 0.0)
    assert len(again) == 2 and again[0] < expected[-1]  # it goes on
    assert jax_training.train(jax_training.load(folder, "float32"), 1, 0.5) != pytest.approx(expected[:1], abs=1e-4)
    half = jax_training.train(jax_training.load(folder, "bfloat16"), COUNT, 0.0)
    assert half == pytest.approx(expected, abs=training.WIDTHS["bfloat16"])


@pytest.mark.skipif("NANOGPT" not in os.environ, reason="NANOGPT does not name a clone of nanoGPT")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nanogpts_are_too(folder, dtype):
    from tests.tools.peers import nanogpt

    training.clone("nanoGPT", folder.parent / "nanoGPT")
    expected, most = reference(folder), training.WIDTHS[dtype] if dtype == "bfloat16" else 1e-5
    theirs = nanogpt.load(folder, dtype)
    assert nanogpt.train(theirs, COUNT, 0.0) == pytest.approx(expected, abs=most)
    nanogpt.set_dropout(theirs.model, 0.5)
    assert [m.attn.dropout for m in theirs.model.transformer.h] == [0.5] * SHAPE["n_layer"]
    assert nanogpt.train(nanogpt.load(folder, dtype), 1, 0.5) != pytest.approx(expected[:1], abs=1e-4)


@pytest.mark.skipif("LLM_C" not in os.environ, reason="LLM_C does not name a clone of llm.c")
def test_llm_cs_are_too_but_for_the_decay_of_vectors(folder):
    from tests.tools.peers import llmc

    training.clone("llm.c", folder.parent / "llm.c")
    assert llmc.train(llmc.load(folder, "float32"), COUNT, 0.0) == pytest.approx(reference(folder), abs=1e-3)
