"""Graphs that QEfficient exported, in qefficient/: recipe.py made them. Each is compiled and run here."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM
from qaic_gpt2.files import PROGRAM, WEIGHTS

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


def compiled(model, form, folder, source=FOLDER, **settings):
    path = shutil.copy(source / f"{form}.onnx", folder)
    model.compile(path, ctx_len=CTX_LEN, **settings)
    assert Path(path).read_bytes() == (source / f"{form}.onnx").read_bytes()
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
def test_it_is_fused_as_export_is(model, form, tmp_path):
    ours = model.compile(ctx_len=CTX_LEN)
    compiled(model, form, tmp_path)
    assert operators(model.qpc_path) == operators(ours)


def operators(qpc_path):
    return Counter(node.op_type for node in onnx.load(qpc_path / PROGRAM, load_external_data=False).graph.node)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.2)])
@pytest.mark.parametrize("form", FORMS)
def test_its_weights_are_quantized(model, expected, form, bits, tolerance, tmp_path):
    """Every product's: four in each of two layers, and the head's."""
    session = compiled(model, form, tmp_path, batch_size=2, **{f"int{bits}_matmul": True})
    counts = operators(model.qpc_path)
    assert counts["MatMulNBits"] == 9 and counts["MatMul"] == counts["Gemm"] == 0
    assert not (model.qpc_path.parent / WEIGHTS).exists()
    ids, logits = expected
    error = np.abs(session.prefill([*ids]) - logits[:, -1]).max()
    assert 0 < error < tolerance * np.abs(logits).max()


@pytest.mark.parametrize("form", FORMS)
def test_drafts_of_it_are_verified(model, expected, form, tmp_path):
    session = compiled(model, form, tmp_path)
    ids, logits = expected
    session.prefill([ids[0, :9]])
    np.testing.assert_allclose(session.verify(ids[0, 9:14], 9), logits[0, 9:14], atol=1e-4)


@pytest.mark.parametrize("change", [{"n_head": 1}, {"n_layer": 1}])
def test_another_model_than_the_folders_runs_as_it_is(change, model, expected, make_checkpoint, tmp_path):
    """And in int8 it is refused: the config says another number of heads, or of layers."""
    shape = {"vocab_size": 53, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2} | change
    other = QEFFAutoModelForCausalLM.from_pretrained(make_checkpoint(**shape))
    session = compiled(other, "plain", tmp_path)
    np.testing.assert_allclose(session.prefill([expected[0][0]]), expected[1][:1, -1], atol=1e-4)
    with pytest.raises(ValueError, match="onnx_path must be a GPT-2 as export or QEfficient writes it, with int8: "):
        compiled(other, "plain", tmp_path, int8_matmul=True)


def test_a_head_of_its_own_is_kept(model, expected, tmp_path_factory, tmp_path):
    """GPT-2's is the embedding's table: what computes anything else is not replaced."""
    graph, changed = onnx.load(FOLDER / "plain.onnx"), tmp_path_factory.mktemp("changed")
    [head] = [tensor for tensor in graph.graph.initializer if [*tensor.dims] == [16, 53]]
    head.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(head), head.name))
    onnx.save(graph, changed / "plain.onnx")
    session = compiled(model, "plain", tmp_path, changed)
    np.testing.assert_allclose(session.prefill([expected[0][0]]), 2 * expected[1][:1, -1], atol=1e-4)
    with pytest.raises(ValueError, match="with int8: its logits are not GPT-2's"):
        compiled(model, "plain", tmp_path, changed, int8_matmul=True)


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


def structure(path: Path) -> list:
    """What a graph and its functions consist of, without the names that torch invents."""
    model = onnx.load(path)
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    values = [value.SerializeToString() for value in [*model.graph.input, *model.graph.output]]
    sizes = sorted([*tensor.dims] for tensor in model.graph.initializer)
    return [[[node.op_type for node in body] for body in bodies], values, sizes]


@pytest.fixture(scope="module")
def made_again(tmp_path_factory) -> Path:
    """The folder of what QEfficient makes, where it is installed: at the commit of qaic_gpt2/requirements.txt."""
    spec = importlib.util.find_spec("QEfficient")
    if not spec:
        pytest.skip("needs QEfficient (make qeff)")
    folder = tmp_path_factory.mktemp("made")
    recipe, source = shutil.copy(FOLDER / "recipe.py", folder), Path(spec.origin).parents[1]
    for arguments in ["graphs"], ["signatures", source]:
        subprocess.run([sys.executable, recipe, *arguments], check=True)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_qefficient_still_exports_them(made_again, model, expected, form, tmp_path):
    assert structure(made_again / f"{form}.onnx") == structure(FOLDER / f"{form}.onnx")
    ids, logits = expected
    session = compiled(model, form, tmp_path, made_again, batch_size=2)
    np.testing.assert_allclose(session.prefill([*ids]), logits[:, -1], atol=1e-4)


def test_its_keywords_are_still_those_of_the_list(made_again):
    name = "signatures.json"
    assert json.loads((made_again / name).read_text("utf-8")) == json.loads((FOLDER / name).read_text("utf-8"))
