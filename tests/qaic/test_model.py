"""The graph and its artifacts, against transformers, onnx and onnxruntime's own quantizer."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
import yaml
from onnx import numpy_helper
from onnxruntime.quantization import matmul_nbits_quantizer

from qaic_gpt2 import auto_model, exporter, files, fusion, quantizer, runtime, weight_loader
from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM
from qaic_gpt2.files import ArtifactError
from qaic_gpt2.runtime import Session

pytestmark = pytest.mark.engine


def artifact(folder, export_dir):
    """Its folder; not shared with other tests."""
    model = QEFFAutoModelForCausalLM.from_pretrained(folder)
    model.export(export_dir)
    return model.compile(ctx_len=64).parent


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """An artifact in an export of its own: for copies that a test may change."""
    return artifact(tiny, tmp_path_factory.mktemp("built"))


def expected_logits(reference, ids):
    with torch.no_grad():
        return reference(torch.tensor(ids)).logits.numpy()


def test_the_exported_graph_is_what_qefficient_documents(tiny):
    model = QEFFAutoModelForCausalLM.from_pretrained(tiny)
    path = model.export()
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 17)]
    caches = [f"past_{kind}.{layer}" for layer in range(3) for kind in ("key", "value")]
    inputs, outputs = (
        {
            value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in values
        }
        for values in (graph.graph.input, graph.graph.output)
    )
    tokens, cache = ["batch_size", "seq_len"], ["batch_size", 4, "ctx_len", 16]
    assert inputs == {"input_ids": tokens, "position_ids": tokens} | dict.fromkeys(caches, cache)
    assert outputs == {"logits": ["batch_size", 1, 97]} | {f"{name}_RetainedState": cache for name in caches}


@pytest.mark.parametrize("name", ["EXPORT_FORMAT", "FORMAT"])
def test_another_format_makes_another_artifact(tiny, compiled, monkeypatch, name):
    first = compiled(tiny, ctx_len=64)
    monkeypatch.setattr(auto_model, name, getattr(auto_model, name) + 1)
    other = QEFFAutoModelForCausalLM.from_pretrained(tiny)
    other.compile(ctx_len=64)
    assert other.qpc_path != first.qpc_path
    assert (other.onnx_path != first.onnx_path) == (name == "EXPORT_FORMAT")


def test_other_settings_make_another_artifact(tiny, compiled):
    settings = [{}, {"ctx_len": 63}, {"prefill_seq_len": 31}, {"batch_size": 2}, {"num_cores": 14}, {"num_devices": 2}]
    settings += [{"mxfp6_matmul": True}, {"mxint8_kv_cache": True}, {"int8_matmul": True}, {"int4_matmul": True}]
    folders = {compiled(tiny, **{"ctx_len": 64} | other).qpc_path for other in settings}
    assert len(folders) == len(settings)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_weight_is_stored_once(tiny, dtype):
    model = QEFFAutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
    graph = onnx.load(model.export()).graph
    loaded = weight_loader.load(tiny, dtype).state_dict()
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert stored.keys() == loaded.keys()
    for name, tensor in loaded.items():
        np.testing.assert_array_equal(stored[name], tensor.numpy())
    size = sum(tensor.numel() * tensor.element_size() for tensor in loaded.values())
    assert (model.onnx_path.parent / exporter.WEIGHTS).stat().st_size < size + exporter.PAGE * len(loaded)


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_logits_are_transformers_at_every_position(tiny, reference, chunk, compiled):
    """Prefill in chunks of each prefix of three rows, and decoding to the end of the context."""
    session = compiled(tiny, prefill_seq_len=chunk, ctx_len=96, batch_size=3).session
    ids = np.random.default_rng(0).integers(97, size=(3, 95))
    expected = expected_logits(reference, ids)
    for length in (1, 3, 4, 5, 31, 32, 33, 64, 95):
        np.testing.assert_allclose(session.prefill(ids[:, :length]), expected[:, length - 1], atol=1e-4)
    session.prefill(ids[:, :2])
    for place in range(2, 95):
        np.testing.assert_allclose(session.decode(ids[:, place]), expected[:, place], atol=1e-4)


def test_layer_norms_of_a_tiny_variance_are_transformers(make_checkpoint, compiled):
    """Of about 1e-5, their epsilon: with another one the logits would differ by a tenth and more."""

    def shrink(name, parameter):
        parameter *= 0.02 if name.endswith(("wte.weight", "wpe.weight")) else 0.002 if "c_proj" in name else 1

    folder, ids = make_checkpoint(shrink, n_layer=1), [[5, 3, 9, 1, 4]]
    expected = expected_logits(transformers.GPT2LMHeadModel.from_pretrained(folder).eval(), ids)[:, -1]
    logits = compiled(folder).session.prefill(ids)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_rows_of_unequal_lengths_are_what_they_are_alone(tiny, reference, compiled):
    rng, lengths, steps = np.random.default_rng(1), (1, 9, 40, 4, 76), 20
    session = compiled(tiny, prefill_seq_len=8, ctx_len=96, batch_size=5).session
    rows = [rng.integers(97, size=length).tolist() for length in lengths]
    logits = [session.prefill(rows)]
    for _ in range(steps):
        tokens = logits[-1].argmax(axis=1)
        rows = [[*ids, int(token)] for ids, token in zip(rows, tokens, strict=True)]
        logits.append(session.decode(tokens).copy())
    for row, (ids, length) in enumerate(zip(rows, lengths, strict=True)):
        expected = expected_logits(reference, [ids])[0, length - 1 :]
        np.testing.assert_allclose([step[row] for step in logits], expected, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7])  # None: all 8 positions, of which the default 128 are more
def test_rows_that_fill_the_context_are_what_they_are_alone(make_checkpoint, compiled, chunk):
    """The last chunk has no padding, which would be written to the last slot."""
    folder = make_checkpoint(n_layer=1, n_positions=8, vocab_size=11, bos_token_id=0, eos_token_id=0)
    reference = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    session = compiled(folder, batch_size=4, ctx_len=8, prefill_seq_len=chunk).session
    rows = [[5, 1, 2, 3, 4, 6, 7, 8], [9, 3], [1, 2, 3, 4, 5, 6, 7], [8, 7, 6, 5, 4, 3, 2, 1]]
    for row, logits in zip(rows, session.prefill(rows), strict=True):
        np.testing.assert_allclose(logits, expected_logits(reference, [row])[0, -1], atol=1e-4)


def test_an_earlier_text_in_the_cache_is_not_visible(tiny, compiled):
    session = compiled(tiny, prefill_seq_len=4, ctx_len=96).session
    first = session.prefill([[5, 6, 7]])
    session.prefill([list(range(90))])
    np.testing.assert_array_equal(session.prefill([[5, 6, 7]]), first)


def test_the_cache_is_written_in_place(tiny, compiled):
    """One row a call, in the bound memory; the rest of the cache stays as it is, bit for bit."""
    session = compiled(tiny, prefill_seq_len=1, ctx_len=96).session
    cache = session.cache["past_value.2"]
    cache[:] = np.random.default_rng(0).normal(size=cache.shape)
    before = cache.copy()
    session.positions[:] = 7
    session.decode(np.array([3]))
    changed = (cache != before).any(axis=(0, 1, 3))
    assert np.flatnonzero(changed).tolist() == [7]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_mask_is_finite_in_float16_and_hides_every_later_slot(tiny, dtype, compiled):
    session = compiled(tiny, dtype, prefill_seq_len=32, ctx_len=96).session
    clean = session.prefill([[5, 6, 7]])
    for cache in session.cache.values():
        cache[:] = 60000.0  # near float16's largest: a slot after the text must weigh exactly 0
    np.testing.assert_array_equal(session.prefill([[5, 6, 7]]), clean)
    assert np.isfinite(clean).all()


@pytest.mark.parametrize(
    ("settings", "limit"), [({"dtype": "float16"}, 2e-3), ({"int8_matmul": True}, 3e-2), ({"int4_matmul": True}, 0.2)]
)
def test_lower_precisions_are_close(settings, limit, nano, compiled):
    session = compiled(nano, **settings).session
    exact = compiled(nano).session
    ids = [np.random.default_rng(0).integers(1407, size=60).tolist()]
    expected = exact.prefill(ids)
    assert 0 < np.abs(session.prefill(ids) - expected).max() < limit * np.abs(expected).max()


def test_float16_weights_are_widened_once(nano, compiled, tmp_path, monkeypatch):
    """Not in every call; what is computed is cast there."""

    class Profiled(onnxruntime.SessionOptions):
        def __init__(self):
            super().__init__()
            self.enable_profiling, self.profile_file_prefix = True, str(tmp_path / "profile")

    monkeypatch.setattr(runtime.onnxruntime, "SessionOptions", Profiled)
    session = runtime.Session(compiled(nano, dtype="float16").qpc_path)
    session.prefill([[1]])
    events = json.loads(Path(session.session.end_profiling()).read_text(encoding="utf-8"))
    ran = [event["args"] for event in events if event["name"].endswith("_kernel_time")]
    shapes = [shape for args in ran if args["op_name"] == "Cast" for shape in args["output_type_shape"][0].values()]
    weights = [[*tensor.shape] for tensor in weight_loader.load(nano).parameters()]
    assert any(args["op_name"] == "Gemm" for args in ran) and not [shape for shape in shapes if shape in weights]


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_equal_those_of_onnxruntimes_quantizer(bits):
    weight = np.random.default_rng(0).normal(size=(256, 48)).astype(np.float32)  # K, N
    graph = onnx.parser.parse_graph("g (float[1, 256] x) => (float[1, 48] y) { y = MatMul(x, w) }")
    graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    settings = matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(block_size=64, is_symmetric=True, bits=bits)
    theirs = matmul_nbits_quantizer.MatMulNBitsQuantizer(model, bits=bits, algo_config=settings)
    theirs.process()
    theirs = [numpy_helper.to_array(tensor) for tensor in theirs.model.model.graph.initializer]
    blocks, scales = quantizer.blocks(weight.T, 64, bits)
    expected = next(a for a in theirs if a.dtype == np.float32).reshape(scales.shape)
    np.testing.assert_allclose(scales, expected, rtol=1e-6)
    apart = next(a for a in theirs if a.dtype == np.uint8).reshape(blocks.shape).astype(int) - blocks
    assert np.abs(apart).max() <= (1 if bits == 8 else 16) and (apart == 0).mean() > 0.999  # a rounding at one half


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [256, 192, 96, 48])
def test_blocks_are_exact_integer_arithmetic_on_any_cpu(tmp_path, width, bits):
    """With the largest products, whose sums of two do not fit into 16 bits, in blocks of 128, 64, 32 and 16.

    AVX2 instructions saturate there (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html);
    onnxruntime's kernels for 8-bit blocks add such products separately.
    """
    rng, rows = np.random.default_rng(0), 12
    weight = rng.choice([-1, 1], size=(rows, width)).astype(np.float32)
    weight[: rows // 2] = weight[: rows // 2, :1]  # sums as large as they can be
    graph = onnx.parser.parse_graph(f"g (float[M, {width}] x) => (float[M, {rows}] y) {{ y = Identity(x) }}")
    graph.initializer.append(numpy_helper.from_array(weight, "w"))
    with (tmp_path / exporter.WEIGHTS).open("wb") as file:
        build = fusion.Builder(fusion.Graph(graph), tmp_path, file, bits)
        build.times_blocks("x", "w", "y", rows=True)
    for field, content in ("node", build.nodes), ("initializer", build.tensors.values()):
        graph.ClearField(field)
        getattr(graph, field).extend(content)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in (("", 17), ("com.microsoft", 1))]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    blocks, scales = quantizer.blocks(weight, quantizer.largest_block(width, bits))
    stored = (blocks.astype(np.float64) - 128) * scales[..., None]  # +1 and -1: exact in 4 bits too, but for +1
    if bits == 4:
        stored = np.sign(stored)
        stored[weight.reshape(stored.shape) * np.sign(-scales[..., None]) < 0] *= 7 / 8
    for count in (1, 2, 5, 33):
        x = rng.choice([-1, 1], size=(count, width)).astype(np.float32)
        x[:, : width // 2] = 1
        expected = x @ stored.reshape(rows, width).T
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-5 * width)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.3), (4, 0.22)])
def test_blocks_are_a_fraction_of_the_size_and_the_tied_table_is_stored_once(nano, compiled, bits, most):
    """In 4 bits the embedding has a table of its own, in 8."""
    folder = compiled(nano, **{f"int{bits}_matmul": True}).qpc_path
    exported = (folder.parents[1] / exporter.WEIGHTS).stat().st_size
    assert (folder / exporter.WEIGHTS).stat().st_size < most * exported
    tensors = onnx.load(folder / "program.onnx", load_external_data=False).graph.initializer
    places = [(tensor.name, exporter.entry(tensor, "offset")) for tensor in tensors]
    tables = {place for name, place in places if name.startswith("wte.weight.blocks")}
    assert len(tables) == (1 if bits == 8 else 2) and "wte.weight" not in dict(places)


# -- onnxruntime's fused operators


def operators(folder):
    return [node.op_type for node in onnx.load(folder / "program.onnx", load_external_data=False).graph.node]


@pytest.mark.parametrize("options", [{}, {"int8_matmul": True}, {"int4_matmul": True}])
def test_the_program_has_one_operator_for_each_attention(tiny, compiled, options):
    found = operators(compiled(tiny, ctx_len=64, **options).qpc_path)
    assert found.count("GroupQueryAttention") == 3 and found.count("SkipLayerNormalization") == 6
    assert not {"ScatterND", "Softmax", "Where", "Transpose"} & {*found} and len(found) < 15 * 3


def edit(tiny, folder, change):
    """A graph like the export, in folder, whose nodes were changed."""
    exported = QEFFAutoModelForCausalLM.from_pretrained(tiny).export()
    graph = onnx.load(exported)
    assert sum(change(node) or 0 for node in graph.graph.node)
    onnx.save(graph, folder / "other.onnx")
    return folder / "other.onnx"


def rename(old, new):
    def change(node):
        found = node.op_type == old
        node.op_type = new if found else node.op_type
        return found

    return change


def weak_mask(node):
    """Hides later positions by -10 alone."""
    value = node.op_type == "Constant" and numpy_helper.to_array(node.attribute[0].t)
    if found := np.array_equal(value, np.float32(-1e4)):
        node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.float32(-10).reshape(())))
    return found


@pytest.mark.parametrize(
    "change", [rename("LessOrEqual", "Less"), rename("ArgMax", "ArgMin"), rename("Tanh", "Erf"), weak_mask]
)
def test_a_graph_that_computes_something_else_is_compiled_as_it_is(tiny, tmp_path, change):
    path, model = edit(tiny, tmp_path, change), QEFFAutoModelForCausalLM.from_pretrained(tiny)
    model.compile(path, ctx_len=64)
    assert operators(model.qpc_path).count("ScatterND") == 6
    program, graph = model.session, onnxruntime.InferenceSession(path)
    ids = np.random.default_rng(0).integers(97, size=(1, 9))
    feeds = {"input_ids": ids, "position_ids": np.arange(9)[None]}
    feeds |= {value.name: np.zeros((1, 4, 64, 16), np.float32) for value in graph.get_inputs()[2:]}
    np.testing.assert_allclose(program.prefill(ids), graph.run(["logits"], feeds)[0][:, 0], atol=1e-4)
    with pytest.raises(ValueError, match="onnx_path must be a GPT-2 as export or QEfficient writes it, with int8"):
        model.compile(path, ctx_len=64, int8_matmul=True)


@pytest.mark.parametrize("n_head", [64, 16])
def test_heads_that_the_operator_refuses_are_compiled_as_they_are(make_checkpoint, compiled, n_head):
    """Of sizes that are no multiple of 8."""
    folder, ids = make_checkpoint(n_layer=1, n_head=n_head), [[5, 3, 9, 1]]
    model = compiled(folder)
    expected = expected_logits(transformers.GPT2LMHeadModel.from_pretrained(folder).eval(), ids)[:, -1]
    np.testing.assert_allclose(model.session.prefill(ids), expected, atol=1e-4)
    assert "GroupQueryAttention" not in operators(model.qpc_path)


def test_a_compiled_model_starts_without_torch_transformers_and_onnx(tiny):
    code = (
        "import sys; from pathlib import Path; from qaic_gpt2 import bench, example; "
        "engine = bench.load(Path(sys.argv[1]), 'float32'); print(bench.greedy(engine, [1, 2], 3)); "
        "sys.exit(bool({'torch', 'transformers', 'onnx'} & {*sys.modules}))"
    )
    command, root = [sys.executable, "-c", code, str(tiny)], Path(exporter.__file__).parents[1]
    runs = [subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8") for _ in range(2)]
    assert [run.returncode for run in runs] == [1, 0], runs[1].stderr  # the first exports and compiles
    assert runs[0].stdout == runs[1].stdout


def test_the_artifact_is_in_the_compilers_formats(tiny, compiled):
    folder = compiled(
        tiny, prefill_seq_len=16, ctx_len=64, batch_size=2, num_cores=14, mxfp6_matmul=True
    ).qpc_path.parent
    shapes = json.loads((folder / "specializations.json").read_text(encoding="utf-8"))
    sizes = {"batch_size": "2", "ctx_len": "64"}
    assert shapes == {
        "specializations": [
            {"name": "Prefill", "symbols": sizes | {"seq_len": "16"}},
            {"name": "Decode", "symbols": sizes | {"seq_len": "1"}},
        ]
    }
    entries = yaml.safe_load((folder / "custom_io.yaml").read_text(encoding="utf-8"))
    assert [*entries[0]] == ["IOName", "Precision"] and {entry["Precision"] for entry in entries} == {"float16"}
    graph = onnx.load(folder.parent / "model.onnx", load_external_data=False).graph
    names = {value.name for value in [*graph.input, *graph.output]} - {"input_ids", "position_ids", "logits"}
    assert {entry["IOName"] for entry in entries} == names and len(entries) == len(names) == 12
    noted = json.loads((folder / "compile.json").read_text(encoding="utf-8"))["for_the_card"]
    assert noted == {"num_cores": 14, "num_devices": 1, "mxfp6_matmul": True, "mxint8_kv_cache": False}


def test_the_card_gets_one_program_if_prefill_is_decode(tiny, compiled):
    folder = compiled(tiny, prefill_seq_len=1, mxint8_kv_cache=True, ctx_len=96).qpc_path.parent
    shapes = json.loads((folder / "specializations.json").read_text(encoding="utf-8"))["specializations"]
    assert [shape["symbols"]["seq_len"] for shape in shapes] == ["1"]
    entries = yaml.safe_load((folder / "custom_io.yaml").read_text(encoding="utf-8"))
    assert {entry["Precision"] for entry in entries} == {"mxint8"}


def test_the_compiled_program_needs_no_second_copy_of_the_weights(tiny, compiled):
    folder = compiled(tiny, ctx_len=64).qpc_path
    assert sum(path.stat().st_size for path in folder.parent.rglob("*")) < 100_000
    options = onnxruntime.SessionOptions()
    with pytest.raises(Exception, match="model.onnx.data"):  # in another folder
        onnxruntime.InferenceSession(folder / "program.onnx", options)


def test_other_weights_in_the_same_folder_make_another_artifact(tiny, tmp_path):
    """QEfficient's own key, of the config and the path, would miss them."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    first = QEFFAutoModelForCausalLM.from_pretrained(folder).export()
    moved = QEFFAutoModelForCausalLM.from_pretrained(shutil.copytree(folder, tmp_path / "moved")).export()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    other = QEFFAutoModelForCausalLM.from_pretrained(folder).export()
    assert first == moved and first != other


@pytest.mark.parametrize("name", ["qpc/program.onnx", "specializations.json", "../model.onnx.data"])
def test_a_changed_artifact_is_not_loaded(built, tmp_path, name):
    folder = shutil.copytree(built.parent, tmp_path / "export") / built.name
    Session(folder / "qpc")
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name}: SHA-256 does not match compile.json"):
        Session(folder / "qpc")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: [],
        lambda record: record | {"sha256": []},
        lambda record: record | {"sha256": "qpc/program.onnx"},
        lambda record: record | {"sha256": {"qpc/program.onnx": record["sha256"]["qpc/program.onnx"]}},
        lambda record: record | {"weights": 5},
        lambda record: {name: value for name, value in record.items() if name != "weights"},
        lambda record: "[" * 100_000,
    ],
)
def test_an_artifact_with_a_damaged_record_is_not_loaded(built, tmp_path, change):
    folder = shutil.copytree(built.parent, tmp_path / "export") / built.name
    record = change(json.loads((folder / "compile.json").read_text(encoding="utf-8")))
    (folder / "compile.json").write_text(record if isinstance(record, str) else json.dumps(record), encoding="utf-8")
    with pytest.raises(ArtifactError, match="compile.json.*: remove the folder to recompile"):
        Session(folder / "qpc")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_truncated_export_is_not_compiled(tiny, tmp_path, name):
    path = QEFFAutoModelForCausalLM.from_pretrained(tiny).export(tmp_path).with_name(name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        ArtifactError, match=f"{path}: SHA-256 does not match export.json: remove the folder to export again"
    ):
        artifact(tiny, tmp_path)


def test_an_artifact_moves_with_its_export(tiny, tmp_path):
    folder = artifact(tiny, tmp_path / "a")
    first = Session(folder / "qpc").prefill([[1, 2, 3]])
    (tmp_path / "a").rename(tmp_path / "b")
    moved = tmp_path / "b" / folder.relative_to(tmp_path / "a")
    np.testing.assert_array_equal(Session(moved / "qpc").prefill([[1, 2, 3]]), first)


@pytest.mark.parametrize("step", ["export", "compile"])
def test_an_interrupt_leaves_no_part_of_an_artifact(tiny, tmp_path, monkeypatch, step):
    model = QEFFAutoModelForCausalLM.from_pretrained(tiny)
    if step == "compile":
        model.export(tmp_path)
    before = set(tmp_path.rglob("*"))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.export(tmp_path)
        model.compile(ctx_len=64, onnx_path=model.onnx_path)
    assert set(tmp_path.rglob("*")) == before


def test_a_graph_of_another_form_is_refused(tmp_path, tiny):
    graph = onnx.parser.parse_graph("g (int64[1] input_ids) => (int64[1] logits) { logits = Identity(input_ids) }")
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="onnx_path must be a graph with QEfficient's inputs"):
        QEFFAutoModelForCausalLM.from_pretrained(tiny).compile(tmp_path / "other.onnx", ctx_len=64)
    assert os.listdir(tmp_path) == ["other.onnx"]


# -- threads


PROBE = """
import os, sys, threading, torch
from qaic_gpt2 import threads
found = []
with threads.on_usable_cores():
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
thread.join()
print(threads.thread_count(), sorted(found[0]), len(os.sched_getaffinity(0)))
"""


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_PROC_BIND", "true"), ("OMP_NUM_THREADS", "3"), ("OMP_PROC_BIND", "")]
)
def test_threads_have_the_cores_of_the_process(name, value):
    """OpenMP has bound the thread that imports torch to one of them."""
    environment = {key: text for key, text in os.environ.items() if not key.startswith("OMP_")} | {name: value}
    root, cores = Path(exporter.__file__).parents[1], sorted(os.sched_getaffinity(0))
    probe = subprocess.run([sys.executable, "-c", PROBE], cwd=root, env=environment, stdout=subprocess.PIPE, check=True)
    bound = 1 if value == "true" else len(cores)
    assert probe.stdout.decode() == f"{3 if value == '3' else len(cores)} {cores} {bound}\n"


def test_threads_keep_to_the_cores_that_were_chosen():
    environment = {key: text for key, text in os.environ.items() if not key.startswith("OMP_")}
    root, last = Path(exporter.__file__).parents[1], max(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(last), sys.executable, "-c", PROBE]
    for bind in "true", "false":
        probe = subprocess.run(command, cwd=root, env=environment | {"OMP_PROC_BIND": bind}, stdout=subprocess.PIPE)
        assert probe.stdout.decode() == f"1 [{last}] 1\n"


# -- old exports


def test_exports_that_were_not_used_for_a_day_are_removed_but_for_the_last(tmp_path):
    now = time.time()
    for number in range(12):
        folder = tmp_path / f"GPT2LMHeadModel-{number}"
        folder.mkdir()
        (folder / "model.onnx").write_text("", encoding="utf-8")
        os.utime(folder, (now, now - (number - 8) * files.IDLE_S))  # of 9 to 11: a day and longer ago
    (tmp_path / "other").mkdir()
    files.prune(tmp_path, "GPT2LMHeadModel-*")
    left = {int(path.name.partition("-")[2]) for path in tmp_path.glob("GPT2LMHeadModel-*")}
    assert left == {*range(9)} and (tmp_path / "other").exists()  # 8 is not among the last 8, but was used today


def test_an_export_and_a_compile_prune_and_a_use_counts(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("QEFF_HOME", str(tmp_path))
    monkeypatch.setattr(files, "KEPT", 1)
    old = []
    for dtype in "float32", "float16":
        model = QEFFAutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
        model.compile(ctx_len=64)
        old += [model.onnx_path.parent, model.qpc_path.parent]
    for folder in old:
        os.utime(folder, (0, 0))
    assert model.compile(ctx_len=64).parent == old[3] and old[3].stat().st_mtime > 0
    model.compile(ctx_len=63)
    assert old[3].is_dir()  # it is used
    os.utime(old[3], (0, 0))
    model.compile(ctx_len=62)
    assert not old[3].is_dir() and old[0].is_dir()
    export = tmp_path / "GPT2LMHeadModel-new"
    monkeypatch.setattr(auto_model, "EXPORT_FORMAT", 10**6)
    QEFFAutoModelForCausalLM.from_pretrained(tiny).export()
    assert not old[0].is_dir() and not export.exists()


# -- the digest, which names an export. tests/contract/odd.py has what a checkpoint may hold

INDEX, SHARDS = "model.safetensors.index.json", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("weights", [["model.safetensors"], [INDEX, *SHARDS]], ids=["whole", "shards"])
def test_the_digest_covers_each_file_that_is_read_and_no_other(weights, tmp_path):
    for name in "config.json", *weights, "model_ema.safetensors":
        (tmp_path / name).write_text("{}", encoding="utf-8")
    if INDEX in weights:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(enumerate(SHARDS))}), encoding="utf-8")
    digests = [weight_loader.digest(tmp_path)]
    for name in weights:
        (tmp_path / name).write_text((tmp_path / name).read_text(encoding="utf-8") + " ", encoding="utf-8")
        digests.append(weight_loader.digest(tmp_path))
    (tmp_path / "config.json").write_text('{"n_head": 6}', encoding="utf-8")  # the same shapes, other logits
    digests.append(weight_loader.digest(tmp_path))
    assert len({*digests}) == len(digests)
    (tmp_path / "model_ema.safetensors").unlink()
    assert weight_loader.digest(tmp_path) == digests[-1]


# -- the SHA-256 of large files


@pytest.fixture
def large(tmp_path, monkeypatch):
    """(a large file that is not young, the list of what was read to be hashed)"""
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    (tmp_path / "large").write_bytes(bytes(files.LARGE))
    time.sleep(2 * files.TICK_NS / 1e9)
    digest, read = hashlib.file_digest, []
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind))
    return tmp_path / "large", read


def real_sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_file_is_hashed_once_until_it_changes(large, tmp_path):
    path, read = large
    assert {files.sha256(path) for _ in range(3)} == {real_sha256(path)} and len(read) == 1
    moved = path.rename(tmp_path / "moved")
    times = moved.stat().st_atime_ns, moved.stat().st_mtime_ns
    time.sleep(2 * files.TICK_NS / 1e9)
    with moved.open("r+b") as file:
        file.write(b"1")
    os.utime(moved, ns=times)  # the same size and time as before
    assert files.sha256(moved) == real_sha256(moved)


def test_a_file_that_was_just_written_is_hashed_again(large, monkeypatch):
    """It may change within the same tick of the clock, and keep its times."""
    path, read = large
    monkeypatch.setattr(files, "TICK_NS", 10**12)
    assert files.sha256(path) == files.sha256(path) == real_sha256(path) and len(read) == 2


@pytest.mark.parametrize("content", ["", "[1]", "[" * 100_000, '{"1:2": 5}', None])
def test_damaged_or_missing_known_hashes_are_no_error(large, tmp_path, content):
    path, read = large
    (tmp_path / "home").mkdir()
    if content is None:
        (tmp_path / "home").rmdir()
        (tmp_path / "home").write_text("a file", encoding="utf-8")
    else:
        (tmp_path / "home" / files.KNOWN_HASHES).write_text(content, encoding="utf-8")
    assert files.sha256(path) == files.sha256(path) == real_sha256(path)
