"""Graphs that QEfficient exported, in qefficient/: recipe.py made them. Each is compiled and run here."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM

pytestmark = pytest.mark.engine

FOLDER = Path(__file__).parent / "qefficient"
FORMS = ("plain", "functions")  # functions: with use_onnx_subfunctions=True
CTX_LEN = 24


@pytest.fixture(scope="module")
def expected():
    """(ids, transformers' logits after each)"""
    saved = np.load(FOLDER / "expected.npz")
    return saved["ids"], saved["logits"]


@pytest.fixture(scope="module")
def model(make_checkpoint):
    """Of the graphs' shape; its weights have no part in what is compiled."""
    return QEFFAutoModelForCausalLM.from_pretrained(
        make_checkpoint(vocab_size=53, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    )


def compiled(model, form, folder, **settings):
    path = shutil.copy(FOLDER / f"{form}.onnx", folder)
    model.compile(path, ctx_len=CTX_LEN, **settings)
    assert Path(path).read_bytes() == (FOLDER / f"{form}.onnx").read_bytes()
    return model.session


@pytest.mark.parametrize("chunk", [1, 4, 24])
@pytest.mark.parametrize("form", FORMS)
def test_its_logits_are_transformers(model, expected, form, chunk, tmp_path):
    """Prefill in chunks, and decoding; for two rows, of which one is shorter."""
    session = compiled(model, form, tmp_path, batch_size=2, prefill_seq_len=chunk)
    ids, logits = expected
    for length in (1, 3, 4, 5, 20):
        np.testing.assert_allclose(session.prefill([*ids[:, :length]]), logits[:, length - 1], atol=1e-4)
    session.prefill([ids[0, :9], ids[1, :2]])
    for step in range(9, 20):
        result = session.decode(np.array([ids[0, step], ids[1, step - 7]]))
        np.testing.assert_allclose(result, [logits[0, step], logits[1, step - 7]], atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_an_earlier_text_in_its_cache_is_not_visible(model, expected, form, tmp_path):
    session = compiled(model, form, tmp_path)
    first = session.prefill([expected[0][0, :3]])
    for cache in session.cache.values():
        cache[:] = 1e4
    np.testing.assert_array_equal(session.prefill([expected[0][0, :3]]), first)


@pytest.mark.parametrize("form", FORMS)
def test_int8_of_it_is_refused_rather_than_nothing(model, form, tmp_path):
    with pytest.raises(ValueError, match="onnx_path must be a GPT-2 as export writes it, with int8: "):
        compiled(model, form, tmp_path, int8_matmul=True)


def test_the_two_forms_are_what_they_are_for():
    """One has the index that onnxruntime refuses, the other a function for each block."""
    graphs = {form: onnx.load(FOLDER / f"{form}.onnx") for form in FORMS}
    functions = {form: {function.name for function in graph.functions} for form, graph in graphs.items()}
    assert functions == {
        "plain": {"CtxScatter", "CtxGather"},
        "functions": {"CtxScatter", "CtxGather", "QEffGPT2Block"},
    }
    constants = [node.attribute[0].t for node in graphs["plain"].graph.node if node.op_type == "Constant"]
    assert any(onnx.numpy_helper.to_array(tensor).tolist() == 2**31 - 1 for tensor in constants)
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.suffix != ".py") < 200_000


def test_qefficient_still_makes_them(tmp_path):
    """Where it is installed, at the commit of qaic_gpt2/requirements.txt."""
    if not importlib.util.find_spec("QEfficient"):
        pytest.skip("QEfficient is not installed")
    shutil.copy(FOLDER / "recipe.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "recipe.py", "graphs"], check=True)
    for form in FORMS:
        ours, theirs = (onnx.load(folder / f"{form}.onnx").graph for folder in (FOLDER, tmp_path))
        assert [node.op_type for node in ours.node] == [node.op_type for node in theirs.node]
