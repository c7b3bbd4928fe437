"""tripy_cpu against torch, nvtripy's own classes and what nvtripy documents. Nothing here knows how a program runs."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tripy_nanogpt import tripy_cpu

# isort: split
import nvtripy as tp  # after tripy_cpu, which prepares the import

from tripy_nanogpt.device import choose_device

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(tripy_cpu.ENGINE is None, reason="TensorRT is here: this is for machines without it"),
]
GPU = tp.device("gpu")
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
FAST = pytest.mark.parametrize("fast", [False, True])


def to_gpu(tensor):
    return tp.copy(tp.Tensor(tensor.contiguous()), GPU)


def to_torch(tensor):
    return torch.from_dlpack(tensor).clone()


def at(position):
    return to_gpu(torch.tensor([position], dtype=torch.int32))


def info(*shape, dtype=tp.float32):
    return tp.InputInfo(shape, dtype=dtype)


def run(function, *tensors):
    """function compiled for these tensors' types and shapes, and run on them."""
    infos = [tp.InputInfo(tuple(t.shape), dtype=getattr(tp, str(t.dtype).removeprefix("torch."))) for t in tensors]
    return to_torch(tp.compile(function, args=infos)(*map(to_gpu, tensors)))


def ordered(x):
    """Halves as integers, one apart where they are one ulp apart."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -32768 - bits, bits)


def agree(ours, expected):
    """Half precision: rounded once an operation, so 99 % are equal and the rest within 2 ulp."""
    if ours.dtype is torch.float32:
        assert torch.allclose(ours, expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    else:
        apart = (ordered(ours) - ordered(expected)).abs()
        near_zero = (ours.float() - expected.float()).abs() < 1e-3  # sums that cancel: an ulp of what was added
        assert ((apart == 0).float().mean() >= 0.99) and ((apart <= 2) | near_zero).all()


# -- where it switches on


def python(code, *path):
    lines = f"import sys; sys.path[:0] = {[*map(str, path), str(ROOT)]}\nfrom tripy_nanogpt import tripy_cpu\n{code}"
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, encoding="utf-8")


def test_engine_names_versions():
    torch_version = torch.__version__.partition("+")[0]
    assert f"nvtripy {tp.__version__}'s front end, executed by torch {torch_version}" == tripy_cpu.ENGINE


def test_real_installation_is_not_shadowed(tmp_path):
    (tmp_path / "mlir_tensorrt").mkdir()
    (tmp_path / "mlir_tensorrt" / "__init__.py").touch()
    done = python("print(tripy_cpu.ENGINE, 'tensorrt' in sys.modules, 'torch' in sys.modules)", tmp_path)
    assert done.stdout.split() == ["None", "False", "False"], done.stderr


def test_waiting_threads_soon_sleep(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for given, count in (None, "3000"), ("7", "7"):
        monkeypatch.setenv("GOMP_SPINCOUNT", given) if given else monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        assert python("import os; print(os.environ['GOMP_SPINCOUNT'])").stdout.split() == [count]


def test_other_version_is_refused(tmp_path):
    folder = tmp_path / "nvtripy-0.1.6.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: nvtripy\nVersion: 0.1.6\n", encoding="utf-8")
    done = python("", tmp_path)
    line = "ImportError: nvtripy 0.1.6 does not run on the CPU: pip install --no-deps nvtripy==0.1.7"
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (1, line)


def test_stack_information_is_nvtripys():
    from nvtripy.utils import stack_info

    spec = importlib.util.spec_from_file_location("untouched", stack_info.__file__)
    untouched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(untouched)
    ours, expected = stack_info.get_stack_info(1), untouched.get_stack_info(1)
    assert [vars(i) for i in ours[1:]] == [vars(i) for i in expected[1:]]
    assert (ours[0].function, ours[0].line) == (expected[0].function, expected[0].line)


# -- values


def test_outputs_do_not_alias_constants_inputs_or_each_other():
    constant, x = torch.ones(2, 3), torch.arange(6.0).reshape(2, 3)
    kept = tp.Tensor(constant)
    function = tp.compile(lambda x: [kept + 0.0, x, tp.reshape(x, (3, 2)), tp.permute(x, (1, 0))], args=[info(2, 3)])
    given = to_gpu(x)
    for _ in range(2):
        outputs = [torch.from_dlpack(out) for out in function(given)]
        for out, expected in zip(outputs, (constant, x, x.reshape(3, 2), x.t()), strict=True):
            assert torch.equal(out, expected)
            out.fill_(7)
        assert torch.equal(to_torch(given), x)


def test_an_output_that_others_are_computed_from_keeps_its_value():
    weight, bias = tp.Tensor(torch.eye(160)), tp.Tensor(torch.ones(160))

    def function(x):
        product = x @ weight
        return [product, tp.reshape(product, (1, 160)), product + bias, tp.reshape(product, (160,)) + bias]

    x = torch.randn(1, 160)
    outputs = tp.compile(function, args=[info(1, 160)])(to_gpu(x))
    for out, expected in zip(outputs, (x, x, x + 1, x[0] + 1), strict=True):
        assert torch.allclose(to_torch(out), expected, atol=1e-5)


def test_constants_are_baked_in():
    weight, vector, x = torch.randn(200, 200), torch.randn(200), torch.randn(1, 200)
    kept = tp.Tensor(weight), tp.Tensor(vector)
    function = tp.compile(lambda x: x @ kept[0] + kept[1], args=[info(1, 200)])
    expected = x @ weight + vector
    weight.zero_(), vector.zero_()
    assert torch.allclose(to_torch(function(to_gpu(x))), expected, atol=1e-4)


@pytest.mark.parametrize("left", [(1, 1, 160), (1, 5, 160), (5, 3, 160), (160,)], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_with_weights(dtype, transposed, left):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(192, 160).to(dtype) * 0.1, torch.randn(192).to(dtype), torch.randn(left).to(dtype)
    given, added = tp.Tensor(weight if transposed else weight.t().contiguous()), tp.Tensor(bias)
    product = (x.double() @ weight.double().t()).to(dtype)
    expected = (product.double() + bias.double()).to(dtype)

    def linear(x):
        return x @ (tp.transpose(given, 1, 0) if transposed else given) + added

    agree(run(linear, x), expected)
    if x.ndim == 3:  # with the dimensions in another order in memory
        agree(run(lambda x: linear(tp.permute(x, (2, 1, 0))), x.permute(2, 1, 0)), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("inputs", [160, 161])
def test_the_threads_share_the_product_of_one_row(inputs, threads):
    before, weight, x = torch.get_num_threads(), torch.randn(1, inputs, 193), torch.randn(1, 1, inputs)
    kept, ones = tp.Tensor(weight), tp.Tensor(torch.ones(193))
    torch.set_num_threads(threads)
    try:
        for ours, expected in (lambda x: x @ kept, x @ weight), (lambda x: x @ kept + ones, x @ weight + 1):
            assert torch.allclose(run(ours, x), expected, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_allclose_is_torchs():
    x = torch.randn(2, 3)
    for y in x, x + 1, x + 1e-9, torch.cat([x[:1], x[1:] + 1]):
        assert tp.allclose(tp.Tensor(x), tp.Tensor(y)) == torch.allclose(x, y)
    assert torch.equal(run(lambda x: tp.prod(x, dim=(0, 2)), x[None]), x.prod(1))


@pytest.mark.parametrize("part", [slice(2), slice(-1, None), slice(None, None, -2), slice(3, 1), slice(1, 9, 2), 4])
def test_slices(part):
    x = torch.arange(15.0).reshape(5, 3)
    expected = torch.from_numpy(x.numpy()[part].copy())
    assert torch.equal(run(lambda x: x[part], x), expected)


def test_views_of_views():
    x = torch.arange(24.0)

    def views(reshape, permute, x):
        y = permute(reshape(x + 1.0, (2, 3, 4)), (2, 0, 1))  # 4, 2, 3
        z = permute(y + y, (1, 0, 2))  # in memory as y is
        parts = [y[1], reshape(y[2:4, 1], (6,)), permute(y[0], (1, 0)), z[1], reshape(z, (24,))]
        return [*parts, permute(z, (1, 2, 0))[1]]

    compiled = tp.compile(partial(views, tp.reshape, tp.permute), args=[info(24)])
    for ours, expected in zip(compiled(to_gpu(x)), views(torch.reshape, torch.permute, x), strict=True):
        assert torch.equal(to_torch(ours), expected)


def test_dynamic_shapes_at_the_edges():
    def function(x):
        return tp.softmax(tp.reshape(x, (-1,)), dim=0) * tp.cast(x.shape[0], tp.float32) + tp.iota((x.shape[0],))

    function = tp.compile(function, args=[info((1, 3, 6))])
    for n in (1, 3, 6, 2, 1):
        x = torch.randn(n)
        assert torch.allclose(to_torch(function(to_gpu(x))), x.softmax(0) * n + torch.arange(n), atol=1e-6)
    for n in (0, 7):
        with pytest.raises(tp.TripyException, match="Unexpected tensor shape"):
            function(to_gpu(torch.randn(n)))


def test_sizes_as_inputs():
    function = tp.compile(lambda x, n: tp.reshape(x, (-1, n)), args=[info(12), tp.DimensionInputInfo((2, 3, 6))])
    x = torch.arange(12.0)
    for n in (2, 3, 6, 3):
        assert torch.equal(to_torch(function(to_gpu(x), tp.DimensionSize(n))), x.reshape(-1, n))


# -- operations that are fused


def gelu(x, factor=0.044715):
    return 0.5 * x * (1.0 + tp.tanh(math.sqrt(2 / math.pi) * (x + factor * (x * x * x))))


@pytest.mark.parametrize("rows, onednn_rows", [(1, 64), (5, 64), (5, 4)])
@pytest.mark.parametrize("factor", [0.044715, 0.05])
def test_a_fused_linear_layer_keeps_all_that_is_asked_for(rows, onednn_rows, factor, monkeypatch):
    monkeypatch.setattr(tripy_cpu.weights, "ONEDNN_ROWS", onednn_rows)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(192, 160) * 0.1, torch.randn(192), torch.randn(1, rows, 160)
    w, b = tp.Tensor(weight), tp.Tensor(bias)

    def layer(x):
        y, z = x @ tp.transpose(w, 1, 0) + b, x @ tp.transpose(w, 1, 0) + (b + 1.0)  # y is an output, and z is not
        return [gelu(y, factor), y, gelu(y, factor) + y, gelu(z, factor)]

    def expected(y):
        return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + factor * y**3)))

    outputs = tp.compile(layer, args=[info(1, rows, 160)])(to_gpu(x))
    y = F.linear(x.double(), weight.double(), bias.double())
    for out, right in zip(outputs, (expected(y), y, expected(y) + y, expected(y + 1)), strict=True):
        assert torch.allclose(to_torch(out).double(), right, atol=1e-5)


MASKS = {
    "first": torch.arange(6) < 4,
    "last": torch.arange(6) >= 2,
    "all": torch.ones(6, dtype=torch.bool),
    "nothing": torch.zeros(6, dtype=torch.bool),
    "one row of holes": torch.tensor([1, 0, 1, 1, 0, 1]) == 1,
    "causal": torch.ones(6, 6, dtype=torch.bool).tril(),
    "anticausal": torch.ones(6, 6, dtype=torch.bool).triu(),
}


EXACT = [(mask, dim, torch.float32) for mask in MASKS for dim in (3, 2)]
HALVES = [(mask, 3, dtype) for mask in ("first", "causal") for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("mask, dim, dtype", EXACT + HALVES)
def test_attention_with_any_mask(mask, dim, dtype):
    """Rounded once in half precision."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 8, 6, 64).to(dtype).unbind()
    visible = MASKS[mask].expand(1, 1, 6, 6) if MASKS[mask].ndim == 2 else MASKS[mask].reshape(1, 1, 1, 6)

    def attend(q, k, v, visible):
        scores = (q @ tp.transpose(k, -2, -1)) * 0.125
        return tp.softmax(tp.where(visible, scores, float("-inf")), dim=dim) @ v

    scores = (q.double() @ k.double().transpose(-2, -1) * 0.125).masked_fill(~visible, -torch.inf)
    agree(run(attend, q, k, v, visible.contiguous()), (scores.softmax(dim) @ v.double()).to(dtype))


ELEMENTWISE = ("exp", "tanh", "sigmoid", "sin", "cos", "relu")
ROUNDED_ONCE = {name: (getattr(tp, name), getattr(torch, name), (1000,)) for name in ELEMENTWISE} | {
    "gelu": (tp.gelu, F.gelu, (1000,)),
    "tanh gelu": (gelu, partial(F.gelu, approximate="tanh"), (1000,)),
    "sum": (partial(tp.sum, dim=1), partial(torch.sum, dim=1), (64, 2048)),
    "softmax": (partial(tp.softmax, dim=-1), partial(torch.softmax, dim=-1), (64, 2048)),
    "product": (lambda x, y: x @ y, torch.matmul, (64, 2048), (2048, 64)),
}


@HALF
@pytest.mark.parametrize("name", ROUNDED_ONCE)
def test_half_precision_is_rounded_once(name, dtype):
    torch.manual_seed(0)
    ours, expected, *shapes = ROUNDED_ONCE[name]
    tensors = [torch.randn(shape).abs().to(dtype) for shape in shapes]
    agree(run(ours, *tensors), expected(*(tensor.double() for tensor in tensors)).to(dtype))


# -- errors


def test_torchs_error_names_the_users_line():
    with pytest.raises(tp.TripyException) as caught:
        (tp.ones((2, 3)) @ tp.ones((4, 5))).eval()  # here
    assert "MatrixMultiply" in str(caught.value) and "# here" in str(caught.value)
    assert "tripy_cpu/" not in str(caught.value)


def test_an_operation_without_a_kernel_is_named():
    def plugin(x):
        return tp.plugin(name="CustomGeluPluginDynamic", inputs=[x], output_info=[(1, tp.float32)], type_id=0)

    with pytest.raises(tp.TripyException, match="Plugin: the CPU has no kernel for this operation"):
        tp.compile(plugin, args=[info(2)])


def test_an_index_out_of_range_raises_nvtripys_error():
    function = tp.compile(lambda x, i: tp.gather(x, 0, i), args=[info(3, 2), info(1, dtype=tp.int32)])
    with pytest.raises(tp.TripyException, match="index out of range"):
        function(to_gpu(torch.ones(3, 2)), at(3))


def test_float8_does_not_leave_through_dlpack():
    x = tp.quantize(tp.Tensor([1.0, 2.0]), 1.0, tp.float8).eval()
    with pytest.raises(Exception, match="Unsupported kFloat bits 8"):
        torch.from_dlpack(x)


# -- caches: where(slots == position, new, old) is a write in place that nobody can see

S = 16


def update(new, old, position):
    at_position = tp.reshape(tp.arange(S, dtype=tp.int32), (1, S, 1)) == tp.reshape(position, (1, 1, 1))
    cache = tp.where(at_position, new, old)
    return [cache, tp.sum(cache)]


NEW, OLD, POSITION = info(2, 1, 3), info(2, S, 3), info(1, dtype=tp.int32)


@pytest.fixture(scope="module")
def cache_update():
    return tp.compile(update, args=[NEW, OLD, POSITION])


def new(value):
    return to_gpu(torch.full((2, 1, 3), float(value)))


def zeros():
    return to_gpu(torch.zeros(2, S, 3))


def test_cache_is_written_in_place(cache_update):
    cache, _ = cache_update(new(1), zeros(), at(0))
    where = cache.trace_tensor.producer.data.data.data_ptr()
    cache, _ = cache_update(new(1), cache, at(1))
    assert cache.trace_tensor.producer.data.data.data_ptr() == where


@pytest.mark.parametrize("order", [range(11), range(10, -1, -1), (3, 0, 5, 10, 8, 1, 2, 9, 4, 6, 7)], ids=str)
def test_older_caches_keep_their_values(cache_update, order):
    """In whatever order they are read again. Position 1 is written twice, and two caches have two futures."""
    torch.manual_seed(0)
    expected, held = [torch.zeros(2, S, 3)], [zeros()]
    for i, position in [(-1, 0), (-1, 1), (-1, 2), (-1, 1), (-1, 15), (-1, 3), (-1, -1), (-1, 16), (1, 1), (4, 1)]:
        row, value = torch.randn(2, 1, 3), expected[i].clone()
        if 0 <= position < S:
            value[:, position] = row[:, 0]
        cache, total = cache_update(to_gpu(row), held[i], at(position))
        assert torch.allclose(to_torch(total), value.sum(), atol=1e-5)
        held.append(cache)
        expected.append(value)
    for i in order:
        assert torch.equal(to_torch(held[i]), expected[i])


def test_view_outside_nvtripy_is_not_written(cache_update):
    cache, _ = cache_update(new(1), zeros(), at(0))
    view = torch.from_dlpack(cache)
    before = view.clone()
    newer, _ = cache_update(new(5), cache, at(0))
    assert torch.equal(view, before) and to_torch(newer)[0, 0, 0] == 5
    view.fill_(9)
    assert to_torch(newer)[0, 1, 0] == 0


def test_one_cache_given_twice():
    def both(new, a, b, position):
        return update(new, a, position)[0], update(new * 2.0, b, position)[0]

    same = zeros()
    a, b = tp.compile(both, args=[NEW, OLD, OLD, POSITION])(new(1), same, same, at(4))
    assert (to_torch(a)[:, 4] == 1).all() and (to_torch(b)[:, 4] == 2).all() and (to_torch(same) == 0).all()


def test_cache_that_is_read_after_the_update_is_not_written():
    function = tp.compile(lambda n, old, i: [update(n, old, i)[0], old * 2.0], args=[NEW, OLD, POSITION])
    start = torch.randn(2, S, 3)
    cache, doubled = function(new(1), to_gpu(start), at(2))
    assert torch.equal(to_torch(doubled), start * 2) and (to_torch(cache)[:, 2] == 1).all()


def test_view_of_a_cache_is_not_written_by_the_next_update():
    def function(new, old, position):
        cache = update(new, old, position)[0]
        return [tp.reshape(cache, (2, 3 * S)), cache, tp.reshape(cache, (2, S, 3))]

    compiled = tp.compile(function, args=[NEW, OLD, POSITION])
    flat, cache, same = compiled(new(1), zeros(), at(0))
    compiled(new(5), cache, at(0))
    assert to_torch(flat)[0, 0] == to_torch(same)[0, 0, 0] == to_torch(cache)[0, 0, 0] == 1


def test_other_conditions_are_not_taken_for_slots():
    kept = tp.Tensor(torch.tensor([0, 1, 1, 2], dtype=torch.int32))

    def function(new, old, position):
        return [tp.where(tp.reshape(kept, (4, 1)) == tp.reshape(position, (1, 1)), new, old)]

    compiled = tp.compile(function, args=[info(1, 3), info(4, 3), POSITION])
    out = to_torch(compiled(to_gpu(torch.ones(1, 3)), to_gpu(torch.zeros(4, 3)), at(1))[0])
    assert out[:, 0].tolist() == [0, 1, 1, 0]


# -- quantization


@pytest.mark.parametrize("kind, low, high", [(tp.int8, -128, 127), (tp.int4, -8, 7)])
def test_integers_round_half_to_even_and_saturate(kind, low, high):
    x = torch.tensor([-1000.0, -1.5, -0.5, 0.49, 0.5, 1.5, 2.5, 1000.0])
    q = tp.dequantize(tp.quantize(tp.Tensor(x), 1.0, kind), 1.0, tp.float32)
    assert to_torch(q).tolist() == [low, -2, 0, 0, 0, 2, 2, high]


def test_float8_is_torchs():
    x = torch.randn(1000) * 100
    q = tp.quantize(tp.Tensor(x), 0.5, tp.float8)
    expected = (x / 0.5).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.5
    assert torch.equal(to_torch(tp.dequantize(q, 0.5, tp.float32)), expected)


def quantized(kind, dtype=torch.float32, out=320, into=256):
    """x -> x @ a quantized weight, and that weight, [in, out], by definition."""
    torch.manual_seed(0)
    low, high, quant = {"int8": (-128, 127, tp.int8), "int4": (-8, 7, tp.int4)}[kind[:4]]
    output_first = kind in ("int8", "int4-out")
    stored = torch.randn(out, into) if output_first else torch.randn(into, out)
    if quant is tp.int8:  # a scale for each output
        axis, other = (0, 1) if output_first else (1, 0)
        scale = (stored.abs().amax(other) / high).to(dtype)
        spread = scale.float().unsqueeze(other)
    else:  # blocks of rows; int4-in and int4-odd are [in, out], as ModelOpt's
        axis, block = None, 64 if output_first else 128
        scale = (stored.unflatten(0, (-1, block)).abs().amax(1) / high).to(dtype)
        spread = scale.float().repeat_interleave(block, 0)
    dense = ((stored.to(dtype).float() / spread).round().clamp(low, high) * spread).to(dtype)
    given, factors = tp.Tensor(stored.to(dtype)), tp.Tensor(scale)

    def linear(x):
        w = tp.dequantize(tp.quantize(given, factors, quant, axis), factors, getattr(tp, str(dtype)[6:]), axis)
        return x @ (tp.transpose(w, 1, 0) if output_first else w)

    return linear, dense.t() if output_first else dense


def error_of(linear, dense, rows):
    x = torch.randn(1, rows, dense.shape[0]).to(dense.dtype)
    ours, expected = run(linear, x), x.double() @ dense.double()
    return (ours.double() - expected).norm() / expected.norm()


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "int8-in", "int4-out", "int4-in", "int4-odd"])
def test_quantized_products(kind, dtype, rows):
    linear, dense = quantized(kind, dtype, out=321 if kind == "int4-odd" else 320)
    assert error_of(linear, dense, rows) < (1e-6 if dtype is torch.float32 else 5e-4)


def test_a_part_of_a_quantized_matrix_is_not_taken_for_the_whole():
    torch.manual_seed(0)
    given, scale, x = tp.Tensor(torch.ones(256, 192)), tp.Tensor(torch.full((2, 192), 0.5)), torch.randn(3, 128)

    def linear(x):
        w = tp.dequantize(tp.quantize(given, scale, tp.int4), scale, tp.float32)
        return x @ w[:128]

    agree(run(linear, x), x @ torch.ones(128, 192))


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("kind, out, into", [("int8", 320, 256), ("int4-in", 320, 256), ("int4-in", 3072, 768)])
def test_fast_products_are_within_1e_2(kind, out, into, rows, monkeypatch):
    """With scales as large as weights, too."""
    monkeypatch.setattr(tripy_cpu.weights, "FAST", True)
    assert 1e-5 < error_of(*quantized(kind, out=out, into=into), rows) < 1e-2


@pytest.mark.parametrize(("least", "fast"), [(1.2, True), (1.3, False)])
def test_int8_may_take_a_quarter_more_time_than_float16(least, fast, monkeypatch):
    times = iter([[9, least], [1, 9]])  # other work makes some of them slow
    monkeypatch.setattr(tripy_cpu.weights.timeit, "repeat", lambda *_, **__: next(times))
    monkeypatch.setattr(tripy_cpu.weights, "computes", lambda kind: True)
    monkeypatch.setattr(tripy_cpu.weights, "uniform", lambda *_: (None, 0))  # no product runs
    assert tripy_cpu.weights.is_fast.__wrapped__("Int8") is fast


def test_int8_keeps_14_bits_of_each_row():
    """The largest of a row is 63 * 126 steps."""
    torch.manual_seed(0)
    q, scale = torch.randint(-127, 128, (320, 256), dtype=torch.int8), torch.rand(320, 1)
    x = torch.randn(3, 256) * torch.tensor([[1.0], [1e3], [0.0]])
    exact = x.double() @ (q * scale).double().t()
    error = (tripy_cpu.weights.Int8(q, scale)(x) - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-9)
    assert (error < 3e-4).all() and error[0] > 1e-5 and error[2] == 0


@pytest.mark.parametrize("kind, size", [("int8", 0.27), ("int4-in", 0.15)])
@FAST
def test_quantized_weights_are_saved_at_their_size(kind, size, fast, monkeypatch, tmp_path):
    monkeypatch.setattr(tripy_cpu.weights, "FAST", fast)
    linear, dense = quantized(kind, out=1024, into=1024)
    program = tp.compile(linear, args=[info(1, 1024)])
    program.save(str(tmp_path / "a.executable"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < size * 4 * dense.numel()


# -- a CPU that lacks instructions

SLOW = "float32 (torch has no faster kernel for this CPU)"


def refuse(*args):
    raise RuntimeError("mkldnn: this kernel needs avx512bw, avx512vl and avx512dq")


def saturate(product):
    """As int8 kernels do without VNNI: sums of two products are held in 16 bits."""
    return lambda q, *rest: product(q.clamp(-64, 64), *rest)


@pytest.mark.parametrize(
    ("kernel", "kind", "instead"),
    [
        ("_make_per_channel_quantized_tensor", "int8", refuse),
        ("_make_per_channel_quantized_tensor", "int8", saturate(torch._make_per_channel_quantized_tensor)),
        ("_weight_int4pack_mm_for_cpu", "int4-in", refuse),
        ("_convert_weight_to_int4pack_for_cpu", "int4-in", refuse),
    ],
)
def test_fast_multiplies_in_float16_without_a_kernel_that_computes_right(kernel, kind, instead, monkeypatch):
    monkeypatch.setattr(tripy_cpu.weights, "FAST", True)
    monkeypatch.setattr(torch, kernel, instead)
    assert error_of(*quantized(kind), rows=1) < 5e-4


def without_float16(monkeypatch):
    monkeypatch.setattr(tripy_cpu.weights, "Float16", refuse)


@pytest.mark.parametrize("kind", ["int8", "int4-in"])
def test_fast_is_exact_and_says_so_without_any_kernel(kind, monkeypatch):
    monkeypatch.setattr(tripy_cpu.weights, "FAST", None)
    monkeypatch.setattr(torch, "_make_per_channel_quantized_tensor", refuse)
    without_float16(monkeypatch)
    assert f"quantized weights multiplied in {SLOW}" in choose_device("auto", fast=True)
    assert error_of(*quantized(kind), rows=1) < 1e-6


@HALF
def test_half_precision_is_multiplied_in_float32_without_a_kernel(dtype, monkeypatch):
    product = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: refuse() if x.dtype is dtype else product(x, *rest))
    without_float16(monkeypatch)
    assert f", {str(dtype)[6:]} multiplied in {SLOW}" in choose_device("auto")
    weight, x = torch.randn(192, 160).to(dtype), torch.randn(1, 160).to(dtype)
    kept = tp.Tensor(weight)
    agree(run(lambda x: x @ tp.transpose(kept, 1, 0), x), (x.double() @ weight.double().t()).to(dtype))


def test_this_cpus_kernels_are_used_where_they_compute_right(monkeypatch):
    monkeypatch.setattr(tripy_cpu.weights, "FAST", None)
    assert choose_device("auto") == f"cpu: {tripy_cpu.ENGINE}"
    assert choose_device("auto", fast=True) == f"cpu: {tripy_cpu.ENGINE}, quantized weights multiplied in low precision"


# -- files


@pytest.fixture
def saved(tmp_path):
    """kind -> a program with two weights, and its file"""

    def save(kind="int4-in"):
        linear, _ = quantized(kind)
        kept = tp.Tensor(torch.randn(256, 256))
        program = tp.compile(lambda x: [linear(x @ kept), x], args=[info(1, (1, 2, 4), 256)])
        program.save(str(tmp_path / "a.executable"))
        return program, tmp_path / "a.executable"

    return save


@pytest.mark.parametrize("kind", ["int8", "int4-in"])
@FAST
def test_save_and_load(saved, kind, fast, monkeypatch):
    monkeypatch.setattr(tripy_cpu.weights, "FAST", fast)
    first, path = saved(kind)
    x = to_gpu(torch.randn(1, 3, 256))
    expected = to_torch(first(x)[0])
    for _ in range(2):
        assert torch.equal(to_torch(tp.Executable.load(str(path))(x)[0]), expected)
        first.save(str(path))  # after it has run, too


def test_saved_programs_hold_data_only(saved):
    data = saved()[1].read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["tripy_cpu"])["format"] == "tripy_cpu 6"
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} <= {"F32", "I8", "I32", "BOOL"}


@pytest.mark.parametrize("spoil", ["half", "empty", "pickle", "foreign", "operation", "name"])
def test_spoilt_programs_are_refused(saved, spoil):
    _, path = saved()
    data = path.read_bytes()
    changed = {
        "half": data[: len(data) // 2],
        "empty": b"",
        "pickle": b"\x80\x04\x95" + data[3:],
        "foreign": data.replace(b"tripy_cpu 6", b"tripy_cpu 9"),
        "operation": data.replace(b"fused.Linear", b"fused.Linear2"),
        "name": data.replace(b']], [[\\"%t', b']], [[\\"%u'),
    }[spoil]
    assert changed != data
    path.write_bytes(changed)
    with pytest.raises(tp.TripyException, match="is not an executable for the CPU"):
        tp.Executable.load(str(path))


def test_equal_weights_are_held_once():
    weight, held = torch.randn(300, 300), []
    for _ in range(2):
        kept = tp.Tensor(weight.clone())
        program = tp.compile(lambda x, kept=kept: x @ kept, args=[info(1, 300)])
        held += program._executable.constants.values()
    first, second = held
    assert first is second and torch.equal(first.tensors()[0], weight)


def is_in_huge_pages(tensor):
    """Whether Linux was asked for huge pages where a tensor is."""
    here, middle = False, tensor.data_ptr() + tensor.nbytes // 2
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(found[1], 16) <= middle < int(found[2], 16)
        elif here and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"{middle:x} is not mapped")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages")
def test_weights_are_in_huge_pages(tmp_path):
    path = str(tmp_path / "a.executable")

    def compiled():
        kept = tp.Tensor(torch.randn(768, 3072))
        program = tp.compile(lambda x: x @ kept, args=[info(1, 768)])
        program.save(path)
        return program

    for make in compiled, lambda: tp.Executable.load(path):
        program = make()
        program(to_gpu(torch.ones(1, 768)))
        (weight,) = program._executable.constants.values()
        assert is_in_huge_pages(weight.product.weight)
        del program, weight  # else the next program shares it


def test_table_and_head_can_be_one_weight(tmp_path):
    table, path = torch.randn(300, 200), str(tmp_path / "a.executable")
    kept = tp.Tensor(table)
    program = tp.compile(
        lambda i: tp.gather(kept, 0, i) @ tp.transpose(kept, 1, 0), args=[info((1, 2, 4), dtype=tp.int32)]
    )
    program.save(path)
    again = tp.Executable.load(path)
    for count in (2, 1, 4):
        ids = torch.arange(count, dtype=torch.int32) * 7
        expected = table[ids.long()] @ table.t()
        assert all(torch.allclose(to_torch(each(to_gpu(ids))), expected, atol=1e-3) for each in (program, again))
